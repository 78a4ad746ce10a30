"""RWKV-6 "Finch" (https://arxiv.org/abs/2404.05892).

Reference: the `rwkv` package (0.8.32), which keeps receptance, key, value, the recurrence and the group norm in
float32. The group norm's eps is 64e-5; S is [key, value]; the order of the dynamic mixes is w, k, v, r, g.
"""

from __future__ import annotations

from collections.abc import Mapping

from rwkv_edge.models.architecture import LAST_NORM, RELU_SQUARED, Architecture, Smoothing, norm_smoothing
from rwkv_edge.models.blocks import from_current, gated_ffn, gated_ffn_params, stack, stack_params
from rwkv_edge.models.ops import Ops, V
from rwkv_edge.models.params import (
    Header,
    Param,
    batched_low_rank,
    by_head,
    linear,
    low_rank,
    norm,
    rescaling,
    stacked,
    vector,
)
from rwkv_edge.spec import ModelSpec, matrix_state

HEAD_NORM_EPS = 64e-5
MIXES = "wkvrg"

KEEP_FLOAT = ("decay", "first", "ln", "mix", "blocks.0.att.output")
SMOOTHING = (
    norm_smoothing(
        "ln1", ("att.mix.w1", "att.receptance", "att.key", "att.value", "att.gate", "att.decay.w1"), "att_shift"
    ),
    Smoothing(("blocks.{i}.att.ln_x.weight", "blocks.{i}.att.ln_x.bias"), ("blocks.{i}.att.output",)),
    norm_smoothing("ln2", ("ffn.key", "ffn.receptance"), "ffn_shift"),
    RELU_SQUARED,
    LAST_NORM,
)


def describe(header: Header, precision: str, batch: int | None) -> ModelSpec:
    """Dimensions from shapes alone.

    Raises:
        CheckpointError: a tensor is missing or has a shape that fits no model.
    """
    vocab_size, n_embd = header.matrix("emb.weight")
    att = "blocks.0.att"
    n_layer, n_att = header.n_layer(), header.matrix(f"{att}.key.weight")[0]
    n_head, head_size = header.matrix(f"{att}.time_faaaa")
    return ModelSpec(
        version="6",
        n_layer=n_layer,
        n_embd=n_embd,
        n_att=n_att,
        n_ffn=header.matrix("blocks.0.ffn.key.weight")[0],
        n_head=n_head,
        head_size=head_size,
        vocab_size=vocab_size,
        precision=precision,
        batch=batch,
        state=matrix_state(n_layer, n_embd, n_head, head_size, precision),
        extra={
            "rank_mix": header.matrix(f"{att}.time_maa_w1")[1] // len(MIXES),
            "rank_decay": header.matrix(f"{att}.time_decay_w1")[1],
        },
    )


def params(header: Header, spec: ModelSpec) -> list[Param]:
    """All parameters in the order in which a step reads them."""
    return stack_params(
        header, spec, lambda i: _att_params(header, spec, i) + gated_ffn_params(header, spec, i, "time_maa")
    )


def _att_params(header: Header, spec: ModelSpec, i: int) -> list[Param]:
    att, width, inner = f"blocks.{i}.att", spec.n_embd, spec.n_att
    heads = (spec.n_head, spec.head_size)
    rank, decay_rank = header.matrix(f"{att}.time_maa_w1")[1] // len(MIXES), header.matrix(f"{att}.time_decay_w1")[1]
    return [
        *norm(header, f"blocks.{i}.ln1", f"blocks.{i}.ln1", width),
        stacked(header, f"{att}.mix_x", [f"{att}.time_maa_x"], width),
        low_rank(header, f"{att}.mix.w1", f"{att}.time_maa_w1", width, len(MIXES) * rank),
        batched_low_rank(header, f"{att}.mix.w2", f"{att}.time_maa_w2", len(MIXES), rank, width),
        stacked(header, f"{att}.mix", [f"{att}.time_maa_{x}" for x in MIXES], width),
        *(
            linear(header, f"{att}.{x}", f"{att}.{x}.weight", width, inner)
            for x in ("receptance", "key", "value", "gate")
        ),
        low_rank(header, f"{att}.decay.w1", f"{att}.time_decay_w1", width, decay_rank),
        low_rank(header, f"{att}.decay.w2", f"{att}.time_decay_w2", decay_rank, inner),
        vector(header, f"{att}.decay", f"{att}.time_decay", (inner,), "float32"),
        by_head(header, f"{att}.first", f"{att}.time_faaaa", *heads),
        *(by_head(header, f"{att}.{x}", f"{att}.{x}", *heads) for x in ("ln_x.weight", "ln_x.bias")),
        linear(header, f"{att}.output", f"{att}.output.weight", inner, width, rescaling(spec, i)),
    ]


def step(ops: Ops[V], spec: ModelSpec, tokens: V, state: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """Feed one token, or a sequence, to every stream; see `rwkv_edge.models.architecture.StepFunction`."""
    after: dict[str, V] = {}

    def block(i: int, x: V) -> V:
        x = ops.residual(x, time_mix(ops, i, x, state, after))
        return ops.residual(x, gated_ffn(ops, i, x, state, after, from_current))

    return stack(ops, spec, tokens, block), after


def time_mix(ops: Ops[V], i: int, x: V, state: Mapping[str, V], after: dict[str, V]) -> V:
    """The attention-like half of block ``i``: its update [R, D]."""
    att = f"blocks.{i}.att"
    x = ops.layer_norm(x, f"blocks.{i}.ln1")
    before, after[f"att_shift.{i}"] = ops.token_shift(x, state[f"att_shift.{i}"])
    delta = before - x
    inner = ops.tanh(ops.linear(ops.mix(x, delta, f"{att}.mix_x", 1)[0], f"{att}.mix.w1"))
    x_w, x_k, x_v, x_r, x_g = ops.mix_lora(x, delta, f"{att}.mix", inner, len(MIXES))

    decay = ops.fp32(ops.linear(ops.tanh(ops.linear(x_w, f"{att}.decay.w1")), f"{att}.decay.w2"))
    decay_log = -ops.exp(decay + ops.param(f"{att}.decay"))
    r, k, v = (
        ops.fp32(ops.heads(ops.linear(mixed, f"{att}.{name}")))
        for mixed, name in ((x_r, "receptance"), (x_k, "key"), (x_v, "value"))
    )
    y, after[f"wkv.{i}"] = ops.wkv6(state[f"wkv.{i}"], r, ops.heads(decay_log), ops.param(f"{att}.first"), k, v)
    y = ops.head_norm(y, HEAD_NORM_EPS) * ops.param(f"{att}.ln_x.weight") + ops.param(f"{att}.ln_x.bias")
    gate = ops.linear(x_g, f"{att}.gate")
    y = ops.merge_heads(ops.act(y)) * ops.merge_heads(gate * ops.sigmoid(gate))
    return ops.linear(y, f"{att}.output")


ARCHITECTURES = {
    "6": Architecture(
        "6", describe, params, step, KEEP_FLOAT, fp16_rescale=6, tuned_state_transposed=True, smoothing=SMOOTHING
    )
}
