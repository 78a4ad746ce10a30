"""What all stages agree on: the dimensions of a model, the tensors of its state, its precision."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rwkv_edge.errors import ArtifactError, InputError

PRECISIONS = ("fp32", "fp16", "bf16")
"""Names of the activation and weight precisions that an export can have."""

ACT_DTYPE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precision → dtype of activations and weights."""

ITEM_SIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1}
"""Bytes of one element."""


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that holds ``dtype``; bfloat16 travels as its bits in uint16 (numpy has none)."""
    return np.dtype("uint16") if dtype == "bfloat16" else np.dtype(dtype)


def float32_from_stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """Values of a stored array (bfloat16 as uint16 bits) as float32 of the same shape."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def stored_from_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """Float values in their stored form: rounded to nearest even; bfloat16 as uint16 bits."""
    if dtype != "bfloat16":
        return array.astype(numpy_dtype(dtype))
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    quiet_nan = (bits >> 16) | 0x40  # rounding must not carry a NaN into infinity
    return np.where(np.isnan(array), quiet_nan, rounded >> 16).astype(np.uint16)


@dataclass(frozen=True)
class StateTensor:
    """One named tensor of the recurrent state.

    ``shape`` is without the batch axis, which is always the first; ``fill`` is its value before the first token.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    fill: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of one row of the batch."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


def matrix_state(n_layer: int, n_embd: int, n_head: int, head_size: int, precision: str) -> tuple[StateTensor, ...]:
    """The state of RWKV-5 to 7: two token shifts and a matrix per head in every layer."""
    act = ACT_DTYPE.get(precision, precision)
    tensors: list[StateTensor] = []
    for i in range(n_layer):
        tensors.append(StateTensor(f"att_shift.{i}", (n_embd,), act))
        tensors.append(StateTensor(f"wkv.{i}", (n_head, head_size, head_size), "float32"))
        tensors.append(StateTensor(f"ffn_shift.{i}", (n_embd,), act))
    return tuple(tensors)


@dataclass(frozen=True)
class ModelSpec:
    """Dimensions and state of one exported model; the contract between exporter, calibration and runtime.

    ``batch`` is the fixed batch size of the graphs, or None where it is dynamic. ``rescale``, where it is not 0, says
    that the residual stream is halved after every so many layers, against overflow in fp16. ``extra`` holds dimensions
    that only one version has (LoRA ranks, say).
    """

    version: str
    n_layer: int
    n_embd: int
    n_att: int
    n_ffn: int
    n_head: int
    head_size: int
    vocab_size: int
    precision: str
    batch: int | None
    state: tuple[StateTensor, ...]
    extra: Mapping[str, int] = field(default_factory=dict)
    rescale: int = 0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, not '{self.precision}'")
        if self.rescale < 0:
            raise InputError(f"rescale must be 0 (off) or a number of layers, not {self.rescale}")
        if self.batch is not None and self.batch < 1:
            raise InputError(f"batch must be at least 1 or dynamic, not {self.batch}")

    @property
    def act_dtype(self) -> str:
        """dtype of the activations and of the token-shift states."""
        return ACT_DTYPE[self.precision]

    @property
    def state_nbytes(self) -> int:
        """Bytes of the state of one stream."""
        return sum(tensor.nbytes for tensor in self.state)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values that `from_json` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """The spec that `to_json` wrote.

        Raises:
            ArtifactError: a field is missing, unknown or of the wrong type.
        """
        try:
            values = dict(data)
            state = tuple(
                StateTensor(str(t["name"]), tuple(int(n) for n in t["shape"]), str(t["dtype"]), float(t["fill"]))
                for t in values.pop("state")
            )
            if any(t.dtype not in ITEM_SIZE or any(n < 1 for n in t.shape) for t in state):
                raise ValueError("a state tensor has an unknown dtype or an empty shape")
            for name in ("n_layer", "n_embd", "n_att", "n_ffn", "n_head", "head_size", "vocab_size"):
                if not isinstance(values[name], int) or values[name] < 0:
                    raise ValueError(f"{name} is {values[name]!r}, not a size")
            return cls(**values, state=state)
        except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
            raise ArtifactError(f"the model spec cannot be read ({error}); export the checkpoint again") from error
