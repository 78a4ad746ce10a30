"""Checkpoints in safetensors files, mapped lazily.

The header is parsed here (8 bytes of length, JSON, data; https://github.com/huggingface/safetensors#format) rather than
by the library, because `info` must describe a file without torch, and because every offset is checked before the
mapping.
"""

from __future__ import annotations

import json
import mmap
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_edge.checkpoints.base import TensorInfo, release_pages
from rwkv_edge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation


class SafetensorsCheckpoint:
    """One .safetensors file."""

    layout = "safetensors"

    def __init__(self, path: Path) -> None:
        """Reads the header only.

        Raises:
            CheckpointError: cut off, damaged, or a dtype that is not a float of 16, 32 or 64 bits.
        """
        self.path = path
        self.metadata, self._offsets, self.tensors = _read_header(path)
        self._map: mmap.mmap | None = None
        self._loaded: dict[str, torch.Tensor] = {}

    tensors: Mapping[str, TensorInfo]

    def load(self, name: str) -> torch.Tensor:
        """The mapped tensor, in its stored dtype."""
        import torch

        if name not in self._loaded:
            if self._map is None:
                with self.path.open("rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            info, start = self.tensors[name], self._offsets[name]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a read-only buffer: nothing here writes to weights
                flat = torch.frombuffer(self._map, dtype=getattr(torch, info.dtype), count=info.numel, offset=start)
            self._loaded[name] = flat.reshape(info.shape)
        return self._loaded[name]

    def release(self, name: str) -> None:
        """Drop the tensor's resident pages."""
        if name in self._loaded:
            release_pages(self._loaded[name])


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, int], dict[str, TensorInfo]]:
    """Metadata, byte offsets in the file, and shapes, each checked against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(
                f"{path} is cut off: its header should take {length} bytes; copy or download it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        offsets: dict[str, int] = {}
        tensors: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            tensors[name], offsets[name] = _read_entry(path, name, entry, length + 8, size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged safetensors header ({error}); download it again") from error
    if not tensors:
        raise CheckpointError(f"{path} holds no tensor")
    return metadata, offsets, tensors


def _read_entry(path: Path, name: str, entry: Any, data_start: int, size: int) -> tuple[TensorInfo, int]:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _DTYPES:
        raise CheckpointError(f"{path}: tensor '{name}' is {dtype}, expected one of {', '.join(_DTYPES)}")
    if not all(isinstance(n, int) and n >= 0 for n in [*shape, begin, end]):
        raise ValueError(f"tensor '{name}' has a shape or an offset that is not a size")
    info = TensorInfo(tuple(shape), _DTYPES[dtype])
    if end - begin != info.nbytes:
        raise ValueError(f"tensor '{name}' takes {info.nbytes} bytes, but {end - begin} are reserved")
    if data_start + end > size:
        raise CheckpointError(f"{path} is cut off inside tensor '{name}'; copy or download it again")
    return info, data_start + begin
