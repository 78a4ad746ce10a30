"""RWKV-7 "Goose" (https://arxiv.org/abs/2503.14456).

Reference: the `rwkv` package (0.8.32) and the formulas of the paper's section 4. What is easily got wrong: the group
norm's eps is 64e-5 (1e-5 × 8²), layer 0 has no value residual, and S is [value, key].
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from rwkv_edge.models.architecture import LAST_NORM, RELU_SQUARED, Architecture, Smoothing, norm_smoothing
from rwkv_edge.models.blocks import stack, stack_params
from rwkv_edge.models.ops import Ops, V
from rwkv_edge.models.params import (
    Header,
    Param,
    by_head,
    deep_embedding,
    ffn_pair,
    linear,
    low_rank,
    norm,
    rescaling,
    stacked,
    vector,
)
from rwkv_edge.spec import ModelSpec, matrix_state

HEAD_NORM_EPS = 64e-5
DECAY_SCALE = -0.6065306597126334  # -exp(-0.5): keeps the decay w in (0.545, 1)

KEEP_FLOAT = (
    "k_k",
    "k_a",
    "r_k",
    "ln",
    "mix",
    ".w0",
    ".w1",
    ".w2",
    ".a0",
    ".a1",
    ".a2",
    ".v0",
    ".v1",
    ".v2",
    "blocks.0.att.output",
)
KEEP_INT8 = (".g1", ".g2")
SMOOTHING = (
    norm_smoothing(
        "ln1", tuple(f"att.{x}" for x in ("receptance", "key", "value", "w1", "a1", "v1", "g1")), "att_shift"
    ),
    Smoothing(("blocks.{i}.att.g2",), ("blocks.{i}.att.output",)),  # the gate multiplies the output's input
    norm_smoothing("ln2", ("ffn.key", "ffn.s1"), "ffn_shift"),
    RELU_SQUARED,
    LAST_NORM,
)


def describe(version: str, header: Header, precision: str, batch: int | None) -> ModelSpec:
    """Dimensions from shapes alone.

    Raises:
        CheckpointError: a tensor is missing or has a shape that fits no model.
    """
    vocab_size, n_embd = header.matrix("emb.weight")
    n_layer = header.n_layer()
    n_head, head_size = header.matrix("blocks.0.att.r_k")
    att = "blocks.0.att"
    ranks = {f"rank_{x}": header.matrix(f"{att}.{x}1")[1] for x in "wag"}
    if n_layer > 1:
        ranks["rank_v"] = header.matrix("blocks.1.att.v1")[1]
    if version == "7a":
        ranks["rank_deep_embed"] = header.matrix("blocks.0.ffn.s1")[1]
    return ModelSpec(
        version=version,
        n_layer=n_layer,
        n_embd=n_embd,
        n_att=header.matrix(f"{att}.key.weight")[0],
        n_ffn=header.matrix("blocks.0.ffn.key.weight")[0],
        n_head=n_head,
        head_size=head_size,
        vocab_size=vocab_size,
        precision=precision,
        batch=batch,
        state=matrix_state(n_layer, n_embd, n_head, head_size, precision),
        extra=ranks,
    )


def params(header: Header, spec: ModelSpec) -> list[Param]:
    """All parameters in the order in which a step reads them."""
    return stack_params(header, spec, lambda i: _att_params(header, spec, i) + _ffn_params(header, spec, i))


def _att_params(header: Header, spec: ModelSpec, i: int) -> list[Param]:
    width, inner = spec.n_embd, spec.n_att
    att = f"blocks.{i}.att"
    found = norm(header, f"blocks.{i}.ln1", f"blocks.{i}.ln1", width)
    found.append(stacked(header, f"{att}.mix", [f"{att}.x_{x}" for x in "rwkvag"], width))
    found += [linear(header, f"{att}.{x}", f"{att}.{x}.weight", width, inner) for x in ("receptance", "key", "value")]
    for x in "wavg" if i > 0 else "wag":
        rank = header.matrix(f"{att}.{x}1")[1]
        found.append(low_rank(header, f"{att}.{x}1", f"{att}.{x}1", width, rank))
        found.append(low_rank(header, f"{att}.{x}2", f"{att}.{x}2", rank, inner))
    found.append(vector(header, f"{att}.w0", f"{att}.w0", (inner,), "float32"))
    found += [vector(header, f"{att}.{x}0", f"{att}.{x}0", (inner,)) for x in ("av" if i > 0 else "a")]
    for name in ("k_k", "k_a", "r_k", "ln_x.weight", "ln_x.bias"):
        found.append(by_head(header, f"{att}.{name}", f"{att}.{name}", spec.n_head, spec.head_size))
    found.append(linear(header, f"{att}.output", f"{att}.output.weight", inner, width, rescaling(spec, i)))
    return found


def _ffn_params(header: Header, spec: ModelSpec, i: int) -> list[Param]:
    ffn, rank = f"blocks.{i}.ffn", spec.extra.get("rank_deep_embed")
    deep = (
        []
        if rank is None
        else [
            low_rank(header, f"{ffn}.s1", f"{ffn}.s1", spec.n_embd, rank),
            deep_embedding(header, f"{ffn}.s_emb", ffn, spec, rank),
            low_rank(header, f"{ffn}.s2", f"{ffn}.s2", rank, spec.n_ffn),
            vector(header, f"{ffn}.s0", f"{ffn}.s0", (spec.n_ffn,)),
        ]
    )
    return [
        *deep,
        *norm(header, f"blocks.{i}.ln2", f"blocks.{i}.ln2", spec.n_embd),
        stacked(header, f"{ffn}.mix", [f"{ffn}.x_k"], spec.n_embd),
        *ffn_pair(header, ffn, spec, rescaling(spec, i)),
    ]


def step(ops: Ops[V], spec: ModelSpec, tokens: V, state: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """Feed one token, or a sequence, to every stream.

    Args:
        ops: the interpreter.
        spec: from `describe`.
        tokens: [R] int64.
        state: by name, each [B, …].

    Returns:
        logits [B, V] float32 after the last token, and the new state.
    """
    after: dict[str, V] = {}
    v_first: V | None = None

    def block(i: int, x: V) -> V:
        nonlocal v_first
        update, v_first = time_mix(ops, i, x, v_first, state, after)
        x = ops.residual(x, update)
        return ops.residual(x, channel_mix(ops, spec, i, x, tokens, state, after))

    return stack(ops, spec, tokens, block), after


def time_mix(ops: Ops[V], i: int, x: V, v_first: V | None, state: Mapping[str, V], after: dict[str, V]) -> tuple[V, V]:
    """The attention-like half of block ``i``: its update [R, D], and the value of layer 0."""
    att = f"blocks.{i}.att"
    x = ops.layer_norm(x, f"blocks.{i}.ln1")
    before, after[f"att_shift.{i}"] = ops.token_shift(x, state[f"att_shift.{i}"])
    x_r, x_w, x_k, x_v, x_a, x_g = ops.mix(x, before - x, f"{att}.mix", 6)

    decay = ops.fp32(ops.linear(ops.tanh(ops.linear(x_w, f"{att}.w1")), f"{att}.w2")) + ops.param(f"{att}.w0")
    decay_log = ops.sigmoid(decay) * DECAY_SCALE
    rate = ops.sigmoid(ops.linear(ops.linear(x_a, f"{att}.a1"), f"{att}.a2") + ops.param(f"{att}.a0"))
    gate = ops.linear(ops.sigmoid(ops.linear(x_g, f"{att}.g1")), f"{att}.g2")
    value = ops.linear(x_v, f"{att}.value")
    if v_first is None:
        v_first = value
    else:
        blend = ops.sigmoid(ops.linear(ops.linear(x_v, f"{att}.v1"), f"{att}.v2") + ops.param(f"{att}.v0"))
        value = value + (v_first - value) * blend

    # From here to the gate everything is [R, H, N] in float32, in every precision: its error would feed the state.
    r = ops.fp32(ops.heads(ops.linear(x_r, f"{att}.receptance")))
    k = ops.fp32(ops.heads(ops.linear(x_k, f"{att}.key")))
    v = ops.fp32(ops.heads(value))
    a = ops.fp32(ops.heads(rate))
    kk = ops.normalize(k * ops.param(f"{att}.k_k"))
    k = k * ((a - 1.0) * ops.param(f"{att}.k_a") + 1.0)
    y, after[f"wkv.{i}"] = ops.wkv7(state[f"wkv.{i}"], r, ops.heads(decay_log), k, v, kk, a)
    y = ops.head_norm(y, HEAD_NORM_EPS) * ops.param(f"{att}.ln_x.weight") + ops.param(f"{att}.ln_x.bias")
    y = y + ops.head_sum(r * k * ops.param(f"{att}.r_k")) * v
    return ops.linear(ops.merge_heads(ops.act(y) * ops.heads(gate)), f"{att}.output"), v_first


def channel_mix(
    ops: Ops[V], spec: ModelSpec, i: int, x: V, tokens: V, state: Mapping[str, V], after: dict[str, V]
) -> V:
    """The feed-forward half of block ``i``: its update [R, D].

    7a (DeepEmbed) multiplies the hidden values by ((x s1)·E_token) s2 + s0, where E_token is a matrix of each token.
    """
    ffn = f"blocks.{i}.ffn"
    x = ops.layer_norm(x, f"blocks.{i}.ln2")
    before, after[f"ffn_shift.{i}"] = ops.token_shift(x, state[f"ffn_shift.{i}"])
    (x_k,) = ops.mix(x, before - x, f"{ffn}.mix", 1)
    hidden = ops.relu_squared(ops.linear(x_k, f"{ffn}.key"))
    rank = spec.extra.get("rank_deep_embed")
    if rank:
        scale = ops.token_matrix(ops.linear(x, f"{ffn}.s1"), f"{ffn}.s_emb", tokens, rank)
        hidden = hidden * (ops.linear(scale, f"{ffn}.s2") + ops.param(f"{ffn}.s0"))
    return ops.linear(hidden, f"{ffn}.value")


ARCHITECTURES = {
    version: Architecture(
        version, partial(describe, version), params, step, KEEP_FLOAT, keep_int8=KEEP_INT8, smoothing=SMOOTHING
    )
    for version in ("7", "7a")
}
