"""What a version's file offers to the rest of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from rwkv_edge.models.ops import Ops, V
from rwkv_edge.models.params import Header, Param
from rwkv_edge.spec import ModelSpec


class StepFunction(Protocol):
    """The step of a version; see `rwkv_edge.models.v7.step`."""

    def __call__(self, ops: Ops[V], spec: ModelSpec, tokens: V, state: Mapping[str, V], /) -> tuple[V, dict[str, V]]:
        """Logits after the last token, and the new state."""
        ...


@dataclass(frozen=True)
class Architecture:
    """One RWKV version.

    Attributes:
        version: the name in manifests, such as '7'.
        describe: header, precision and batch → spec.
        params: header and spec → parameters.
        step: the model itself, for any interpreter.
        keep_float: parts of parameter names that quantization must leave alone.
        fp16_rescale: layers after which the residual stream must be halved in float16; 0 for never.
        tuned_state_transposed: whether files of state tuning, which are [head, value, key], must be transposed to be
        the state of this version.
    """

    version: str
    describe: Callable[[Header, str, int | None], ModelSpec]
    params: Callable[[Header, ModelSpec], list[Param]]
    step: StepFunction
    keep_float: tuple[str, ...]
    fp16_rescale: int = 0
    tuned_state_transposed: bool = False
