"""Memory of a device through ONNX Runtime alone: blocks of bytes, views into them, copies between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from rwkv_edge.errors import SessionError
from rwkv_edge.runtime.ort_providers import CPU, first_line, onnxruntime_module

ALIGNMENT = 256  # bytes, as cudaMalloc aligns
UINT8 = 2  # TensorProto.DataType


@dataclass(frozen=True)
class Device:
    """Where memory lies, in ONNX Runtime's words: 'cuda' and the number of the GPU, or 'cpu'."""

    kind: str
    number: int = 0

    def block(self, nbytes: int) -> Any:
        """An OrtValue of uint8 [nbytes], whose content is what was there.

        Raises:
            SessionError: the device has not so much memory, or is not there.
        """
        return self.tensor([nbytes], np.uint8)

    def tensor(self, shape: Sequence[int], dtype: Any) -> Any:
        """An OrtValue of a numpy dtype, likewise."""
        make = onnxruntime_module().OrtValue.ortvalue_from_shape_and_type
        try:
            return make(list(shape), dtype, self.kind, self.number)
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            raise SessionError(
                f"ONNX Runtime gives no memory on {self.kind}:{self.number} ({first_line(error)}); "
                "check its driver and libraries with 'rwkv-edge doctor', and that nothing else fills the memory"
            ) from error


def view(block: Any, device: Device, offset: int, shape: Sequence[int], onnx_type: int = UINT8) -> Any:
    """An OrtValue inside a block, which must outlive it.

    ONNX Runtime's Python has no function for that, but binds raw pointers as outputs and hands out what is bound.
    """
    binding = _any_session().io_binding()
    binding.bind_output("y", device.kind, device.number, onnx_type, list(shape), block.data_ptr() + offset)
    return binding.get_outputs()[0]


def copy(source: Any, target: Any) -> None:
    """Copy an OrtValue into another of the same size, both of uint8; on the device where ONNX Runtime can do that."""
    try:
        target.update_inplace(source)
    except TypeError:  # before 1.24 it takes arrays only
        target.update_inplace(source.numpy())


def bytes_of(array: np.ndarray) -> np.ndarray:
    """A contiguous array as uint8 [n], which every version of ONNX Runtime copies to a device as it is."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@lru_cache(maxsize=1)
def _any_session() -> Any:
    """A session, since only sessions make bindings: y = Identity(x), both uint8 [n]."""
    ort = onnxruntime_module()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(_identity_model(), options, providers=[CPU])


def _identity_model() -> bytes:
    """ONNX as protocol buffers, by hand: what runs on the device does not import onnx.

    Field numbers are those of onnx.proto: ModelProto, GraphProto, NodeProto, ValueInfoProto, TypeProto.
    """

    def field(number: int, payload: bytes) -> bytes:
        return bytes([number << 3 | 2, len(payload)]) + payload

    def varint(number: int, value: int) -> bytes:
        return bytes([number << 3, value])

    def value(name: bytes) -> bytes:
        return field(1, name) + field(2, field(1, varint(1, UINT8) + field(2, field(1, field(2, b"n")))))

    node = field(1, b"x") + field(2, b"y") + field(4, b"Identity")
    graph = field(1, node) + field(2, b"identity") + field(11, value(b"x")) + field(12, value(b"y"))
    return varint(1, 8) + field(7, graph) + field(8, varint(2, 13))  # IR version 8, opset 13
