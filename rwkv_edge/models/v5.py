"""RWKV-5 "Eagle" (https://arxiv.org/abs/2404.05892) in its three forms.

5.0 has no gate, 5.0 and 5.1 have one decay per head, 5.2 one per channel. Reference: the `rwkv` package (0.8.32),
which keeps receptance, key, value, the recurrence and the group norm in float32. The group norm's eps is 64e-5; S is
[key, value].
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from rwkv_edge.errors import CheckpointError
from rwkv_edge.models.architecture import LAST_NORM, RELU_SQUARED, Architecture, Smoothing, norm_smoothing
from rwkv_edge.models.blocks import from_before, gated_ffn, gated_ffn_params, stack, stack_params
from rwkv_edge.models.ops import Ops, V
from rwkv_edge.models.params import (
    Header,
    Param,
    by_head,
    linear,
    norm,
    rescaling,
    stacked,
    transformed,
)
from rwkv_edge.spec import ModelSpec, matrix_state

if TYPE_CHECKING:
    import torch

    from rwkv_edge.models.params import Function

HEAD_NORM_EPS = 64e-5

KEEP_FLOAT = ("decay_log", "first", "ln", "mix", "blocks.0.att.output")
SMOOTHING = (
    norm_smoothing("ln1", ("att.receptance", "att.key", "att.value", "att.gate"), "att_shift"),
    Smoothing(("blocks.{i}.att.ln_x.weight", "blocks.{i}.att.ln_x.bias"), ("blocks.{i}.att.output",)),
    norm_smoothing("ln2", ("ffn.key", "ffn.receptance"), "ffn_shift"),
    RELU_SQUARED,
    LAST_NORM,
)


def describe(version: str, header: Header, precision: str, batch: int | None) -> ModelSpec:
    """Dimensions from shapes alone.

    Raises:
        CheckpointError: a tensor is missing or has a shape that fits no model.
    """
    vocab_size, n_embd = header.matrix("emb.weight")
    n_layer, n_att = header.n_layer(), header.matrix("blocks.0.att.key.weight")[0]
    n_head = header.shape("blocks.0.att.time_decay")[0] if header.shape("blocks.0.att.time_decay") else 0
    if n_head == 0 or n_att % n_head:
        raise CheckpointError(
            f"{header.path}: 'blocks.0.att.time_decay' has {n_head} heads, which do not divide the width {n_att}"
        )
    return ModelSpec(
        version=version,
        n_layer=n_layer,
        n_embd=n_embd,
        n_att=n_att,
        n_ffn=header.matrix("blocks.0.ffn.key.weight")[0],
        n_head=n_head,
        head_size=n_att // n_head,
        vocab_size=vocab_size,
        precision=precision,
        batch=batch,
        state=matrix_state(n_layer, n_embd, n_head, n_att // n_head, precision),
    )


def params(gated: bool, header: Header, spec: ModelSpec) -> list[Param]:
    """All parameters in the order in which a step reads them."""
    return stack_params(
        header, spec, lambda i: _att_params(header, spec, i, gated) + gated_ffn_params(header, spec, i, "time_mix")
    )


def _att_params(header: Header, spec: ModelSpec, i: int, gated: bool) -> list[Param]:
    att, width, inner = f"blocks.{i}.att", spec.n_embd, spec.n_att
    linears = ["receptance", "key", "value", *(["gate"] if gated else [])]
    return [
        *norm(header, f"blocks.{i}.ln1", f"blocks.{i}.ln1", width),
        stacked(header, f"{att}.mix", [f"{att}.time_mix_{name[0]}" for name in linears], width),
        *(linear(header, f"{att}.{name}", f"{att}.{name}.weight", width, inner) for name in linears),
        _per_head(header, spec, f"{att}.decay_log", f"{att}.time_decay", _decay_log),
        _first(header, spec, att),
        *(by_head(header, f"{att}.{x}", f"{att}.{x}", *_heads(spec)) for x in ("ln_x.weight", "ln_x.bias")),
        linear(header, f"{att}.output", f"{att}.output.weight", inner, width, rescaling(spec, i)),
    ]


def _heads(spec: ModelSpec) -> tuple[int, int]:
    return spec.n_head, spec.head_size


def _first(header: Header, spec: ModelSpec, att: str) -> Param:
    """u: stored as it is (time_faaaa), or in earlier files as its logarithm (time_first)."""
    if f"{att}.time_faaaa" in header.tensors:
        return _per_head(header, spec, f"{att}.first", f"{att}.time_faaaa", _unchanged)
    return _per_head(header, spec, f"{att}.first", f"{att}.time_first", _exp)


def _per_head(header: Header, spec: ModelSpec, name: str, source: str, function: Function) -> Param:
    """A parameter [H, N], from one value per channel, or per head, which is then repeated."""
    shape = header.shape(source)
    stored = _heads(spec) if header.count(source) == spec.n_att else (spec.n_head, 1)
    if header.count(source) not in (spec.n_att, spec.n_head) or not shape:
        header.expect(source, _heads(spec))
    return transformed(header, name, source, _heads(spec), function, stored)


def _decay_log(stored: torch.Tensor) -> torch.Tensor:
    """log w = −e^time_decay."""
    return -stored.exp()


def _exp(stored: torch.Tensor) -> torch.Tensor:
    return stored.exp()


def _unchanged(stored: torch.Tensor) -> torch.Tensor:
    return stored


def step(gated: bool, ops: Ops[V], spec: ModelSpec, tokens: V, state: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """Feed one token, or a sequence, to every stream; see `rwkv_edge.models.architecture.StepFunction`."""
    after: dict[str, V] = {}

    def block(i: int, x: V) -> V:
        x = ops.residual(x, time_mix(ops, i, x, state, after, gated))
        return ops.residual(x, gated_ffn(ops, i, x, state, after, from_before))

    return stack(ops, spec, tokens, block), after


def time_mix(ops: Ops[V], i: int, x: V, state: Mapping[str, V], after: dict[str, V], gated: bool) -> V:
    """The attention-like half of block ``i``: its update [R, D]."""
    att = f"blocks.{i}.att"
    x = ops.layer_norm(x, f"blocks.{i}.ln1")
    before, after[f"att_shift.{i}"] = ops.token_shift(x, state[f"att_shift.{i}"])
    # x·μ + before·(1−μ), as before + (x − before)·μ
    x_r, x_k, x_v, *x_g = ops.mix(before, x - before, f"{att}.mix", 4 if gated else 3)
    r, k, v = (
        ops.fp32(ops.heads(ops.linear(mixed, f"{att}.{name}")))
        for mixed, name in ((x_r, "receptance"), (x_k, "key"), (x_v, "value"))
    )
    y, after[f"wkv.{i}"] = ops.wkv5(
        state[f"wkv.{i}"], r, ops.param(f"{att}.decay_log"), ops.param(f"{att}.first"), k, v
    )
    y = ops.head_norm(y, HEAD_NORM_EPS) * ops.param(f"{att}.ln_x.weight") + ops.param(f"{att}.ln_x.bias")
    y = ops.merge_heads(ops.act(y))
    if gated:
        gate = ops.linear(x_g[0], f"{att}.gate")
        y = y * ops.merge_heads(gate * ops.sigmoid(gate))
    return ops.linear(y, f"{att}.output")


class _Step:
    """`step` of a form with or without a gate."""

    def __init__(self, gated: bool) -> None:
        self._gated = gated

    def __call__(self, ops: Ops[V], spec: ModelSpec, tokens: V, state: Mapping[str, V], /) -> tuple[V, dict[str, V]]:
        return step(self._gated, ops, spec, tokens, state)


def _architecture(version: str, gated: bool) -> Architecture:
    return Architecture(
        version,
        partial(describe, version),
        partial(params, gated),
        _Step(gated),
        KEEP_FLOAT,
        6,
        tuned_state_transposed=True,
        smoothing=SMOOTHING,
    )


ARCHITECTURES = {
    "5.0": _architecture("5.0", gated=False),
    "5.1": _architecture("5.1", gated=True),
    "5.2": _architecture("5.2", gated=True),
}
