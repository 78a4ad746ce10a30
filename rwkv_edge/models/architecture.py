"""What a version's file offers to the rest of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
class Smoothing:
    """Where channels can be scaled without changing the model: what is divided and what is multiplied by the same.

    Names are those of parameters; '{i}' stands for the block. Those that a model lacks are left out.

    Attributes:
        divided: vectors [D], or linears by their columns, that make the value.
        multiplied: linears by their rows: all that take the value.
        power: of the factor in the value: 2 behind relu².
        state: the token-shift state that holds the value and is divided with it; None without one.
    """

    divided: tuple[str, ...]
    multiplied: tuple[str, ...]
    power: int = 1
    state: str | None = None


RELU_SQUARED = Smoothing(("blocks.{i}.ffn.key",), ("blocks.{i}.ffn.value",), power=2)
LAST_NORM = Smoothing(("ln_out.weight", "ln_out.bias"), ("head",))


def norm_smoothing(norm: str, linears: Sequence[str], state: str) -> Smoothing:
    """Of a norm before a token shift: the mixes work channel by channel, so a factor passes through them."""
    divided = tuple(f"blocks.{{i}}.{norm}.{part}" for part in ("weight", "bias"))
    return Smoothing(divided, tuple(f"blocks.{{i}}.{linear}" for linear in linears), state=f"{state}.{{i}}")


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
        keep_int8: parts of names of linears that must not have less than 8 bits.
        smoothing: factors that may be moved between parameters.
    """

    version: str
    describe: Callable[[Header, str, int | None], ModelSpec]
    params: Callable[[Header, ModelSpec], list[Param]]
    step: StepFunction
    keep_float: tuple[str, ...]
    fp16_rescale: int = 0
    tuned_state_transposed: bool = False
    keep_int8: tuple[str, ...] = ()
    smoothing: tuple[Smoothing, ...] = ()
