"""Where each parameter lies in weights.bin, known before a byte of it is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from rwkv_edge.models.params import Param

WEIGHTS_FILE = "weights.bin"
INDEX_FILE = "weights.json"
PAGE = 65536  # bytes; the mapping granularity of Windows, a multiple of every page size that matters
PAGE_FROM = 1 << 20  # tensors from this size on start on a page, so that runtimes can map them


@dataclass(frozen=True)
class Placed:
    """A parameter with its dtype, and its bytes in the weight file."""

    param: Param
    dtype: str
    offset: int
    length: int


class WeightLayout:
    """Offsets of all parameters, shared by all graphs of an artifact."""

    def __init__(self, params: Sequence[Param], act_dtype: str) -> None:
        """Places ``params`` in their order."""
        self.placed: dict[str, Placed] = {}
        end = 0
        for param in params:
            length = param.nbytes(act_dtype)
            align = PAGE if length >= PAGE_FROM else 64
            offset = -(-end // align) * align
            self.placed[param.name] = Placed(param, param.resolve_dtype(act_dtype), offset, length)
            end = offset + length
        self.nbytes = end

    def external(self, name: str) -> ir.ExternalTensor:
        """The initializer that refers to the parameter's place in the file."""
        place = self.placed[name]
        return ir.ExternalTensor(
            WEIGHTS_FILE,
            place.offset,
            place.length,
            ir.DataType[{"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}[place.dtype]],
            shape=ir.Shape(place.param.shape),
            name=name,
        )


def write_index(layout: WeightLayout, path: Path) -> None:
    """Write what lies where in weights.bin, so that runtimes and other programs can map it without ONNX."""
    lines = [
        json.dumps({"name": name, "dtype": p.dtype, "shape": p.param.shape, "offset": p.offset, "nbytes": p.length})
        for name, p in layout.placed.items()
    ]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
