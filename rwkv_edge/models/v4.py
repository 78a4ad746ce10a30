"""RWKV-4 (https://arxiv.org/abs/2305.13048).

Reference: the `rwkv` package (0.8.32), which computes key, value and the recurrence in float32 in every precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rwkv_edge.models.architecture import LAST_NORM, RELU_SQUARED, Architecture, norm_smoothing
from rwkv_edge.models.blocks import from_before, gated_ffn, gated_ffn_params, stack, stack_params
from rwkv_edge.models.ops import Ops, V
from rwkv_edge.models.params import (
    Header,
    Param,
    linear,
    norm,
    rescaling,
    stacked,
    transformed,
    vector,
)
from rwkv_edge.spec import ACT_DTYPE, ModelSpec, StateTensor

if TYPE_CHECKING:
    import torch

EMPTY_MAX = -1e30  # the largest exponent before the first token: e^-1e30 is 0, and no infinity is subtracted

KEEP_FLOAT = ("time_decay", "time_first", "ln", "mix", "blocks.0.att.output")
SMOOTHING = (
    norm_smoothing("ln1", ("att.receptance", "att.key", "att.value"), "att_shift"),
    norm_smoothing("ln2", ("ffn.key", "ffn.receptance"), "ffn_shift"),
    RELU_SQUARED,
    LAST_NORM,
)


def describe(header: Header, precision: str, batch: int | None) -> ModelSpec:
    """Dimensions from shapes alone; one head as wide as the attention.

    Raises:
        CheckpointError: a tensor is missing or has a shape that fits no model.
    """
    vocab_size, n_embd = header.matrix("emb.weight")
    n_layer, n_att = header.n_layer(), header.matrix("blocks.0.att.key.weight")[0]
    act = ACT_DTYPE.get(precision, precision)
    state: list[StateTensor] = []
    for i in range(n_layer):
        state.append(StateTensor(f"att_shift.{i}", (n_embd,), act))
        state.append(StateTensor(f"wkv_num.{i}", (n_att,), "float32"))
        state.append(StateTensor(f"wkv_den.{i}", (n_att,), "float32"))
        state.append(StateTensor(f"wkv_max.{i}", (n_att,), "float32", EMPTY_MAX))
        state.append(StateTensor(f"ffn_shift.{i}", (n_embd,), act))
    return ModelSpec(
        version="4",
        n_layer=n_layer,
        n_embd=n_embd,
        n_att=n_att,
        n_ffn=header.matrix("blocks.0.ffn.key.weight")[0],
        n_head=1,
        head_size=n_att,
        vocab_size=vocab_size,
        precision=precision,
        batch=batch,
        state=tuple(state),
    )


def params(header: Header, spec: ModelSpec) -> list[Param]:
    """All parameters in the order in which a step reads them."""
    return stack_params(
        header, spec, lambda i: _att_params(header, spec, i) + gated_ffn_params(header, spec, i, "time_mix")
    )


def _att_params(header: Header, spec: ModelSpec, i: int) -> list[Param]:
    att, width, inner = f"blocks.{i}.att", spec.n_embd, spec.n_att
    return [
        *norm(header, f"blocks.{i}.ln1", f"blocks.{i}.ln1", width),
        *(stacked(header, f"{att}.mix_{x}", [f"{att}.time_mix_{x}"], width) for x in "rkv"),
        *(linear(header, f"{att}.{x}", f"{att}.{x}.weight", width, inner) for x in ("receptance", "key", "value")),
        transformed(header, f"{att}.decay", f"{att}.time_decay", (inner,), _decay),
        vector(header, f"{att}.first", f"{att}.time_first", (inner,), "float32"),
        linear(header, f"{att}.output", f"{att}.output.weight", inner, width, rescaling(spec, i)),
    ]


def _decay(stored: torch.Tensor) -> torch.Tensor:
    """w = −e^time_decay."""
    return -stored.exp()


def step(ops: Ops[V], spec: ModelSpec, tokens: V, state: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """Feed one token, or a sequence, to every stream; see `rwkv_edge.models.architecture.StepFunction`."""
    after: dict[str, V] = {}

    def block(i: int, x: V) -> V:
        x = ops.residual(x, time_mix(ops, i, x, state, after))
        return ops.residual(x, gated_ffn(ops, i, x, state, after, from_before))

    return stack(ops, spec, tokens, block), after


def time_mix(ops: Ops[V], i: int, x: V, state: Mapping[str, V], after: dict[str, V]) -> V:
    """The attention-like half of block ``i``: its update [R, D]."""
    att = f"blocks.{i}.att"
    x = ops.layer_norm(x, f"blocks.{i}.ln1")
    before, after[f"att_shift.{i}"] = ops.token_shift(x, state[f"att_shift.{i}"])
    # x·μ + before·(1−μ), as before + (x − before)·μ
    x_r, x_k, x_v = (ops.mix(before, x - before, f"{att}.mix_{name}", 1)[0] for name in "rkv")
    r = ops.sigmoid(ops.linear(x_r, f"{att}.receptance"))
    k, v = ops.fp32(ops.linear(x_k, f"{att}.key")), ops.fp32(ops.linear(x_v, f"{att}.value"))
    names = (f"wkv_num.{i}", f"wkv_den.{i}", f"wkv_max.{i}")
    num, den, top = (state[name] for name in names)
    y, new = ops.wkv4((num, den, top), ops.param(f"{att}.decay"), ops.param(f"{att}.first"), k, v)
    after.update(zip(names, new, strict=True))
    return ops.linear(r * ops.act(y), f"{att}.output")


ARCHITECTURES = {"4": Architecture("4", describe, params, step, KEEP_FLOAT, fp16_rescale=6, smoothing=SMOOTHING)}
