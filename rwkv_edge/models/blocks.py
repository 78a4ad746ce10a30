"""What several versions have in common: the stack of blocks, and the feed-forward part with a receptance."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rwkv_edge.models.ops import Ops, V
from rwkv_edge.models.params import Header, Param, ffn_pair, linear, norm, normed_embedding, rescaling, stacked
from rwkv_edge.spec import ModelSpec


def stack_params(header: Header, spec: ModelSpec, block: Callable[[int], list[Param]]) -> list[Param]:
    """Embedding, blocks, last norm and head: all parameters in the order in which a step reads them."""
    found = [normed_embedding(header, "emb", spec.vocab_size, spec.n_embd)]
    for i in range(spec.n_layer):
        found += block(i)
    found += norm(header, "ln_out", "ln_out", spec.n_embd)
    found.append(linear(header, "head", "head.weight", spec.n_embd, spec.vocab_size))
    return found


def stack(ops: Ops[V], spec: ModelSpec, tokens: V, block: Callable[[int, V], V]) -> V:
    """Logits [B, V] float32 after the last token: embedding, blocks [R, D] → [R, D], last norm and head."""
    x = ops.embed("emb", tokens)
    for i in range(spec.n_layer):
        x = block(i, x)
        if spec.rescale and (i + 1) % spec.rescale == 0:
            x = x * 0.5  # what adds to it from here on is stored in the same scale
    x = ops.layer_norm(ops.last_row(x), "ln_out")
    return ops.fp32(ops.linear(x, "head"))


def gated_ffn_params(header: Header, spec: ModelSpec, i: int, mix: str) -> list[Param]:
    """Parameters of `gated_ffn`; ``mix`` is 'time_mix' (RWKV-4 and 5) or 'time_maa' (RWKV-6)."""
    ffn, width = f"blocks.{i}.ffn", spec.n_embd
    return [
        *norm(header, f"blocks.{i}.ln2", f"blocks.{i}.ln2", width),
        *(stacked(header, f"{ffn}.mix_{x}", [f"{ffn}.{mix}_{x}"], width) for x in "kr"),
        *ffn_pair(header, ffn, spec, rescaling(spec, i)),
        linear(header, f"{ffn}.receptance", f"{ffn}.receptance.weight", width, width),
    ]


def gated_ffn(
    ops: Ops[V], i: int, x: V, state: Mapping[str, V], after: dict[str, V], shifted: Callable[[V, V], tuple[V, V]]
) -> V:
    """σ(W_r x_r) ∘ W_v relu(W_k x_k)², the feed-forward half of block ``i`` in RWKV-4 to 6: its update [R, D].

    ``shifted`` makes of the norm's output and the row before it the base and the delta of the token-shift mix: x·μ +
    x'·(1−μ) is x' + (x − x')·μ in RWKV-4 and 5; RWKV-6 has x + (x' − x)·μ.
    """
    ffn = f"blocks.{i}.ffn"
    x = ops.layer_norm(x, f"blocks.{i}.ln2")
    before, after[f"ffn_shift.{i}"] = ops.token_shift(x, state[f"ffn_shift.{i}"])
    base, delta = shifted(x, before)
    x_k, x_r = (ops.mix(base, delta, f"{ffn}.mix_{name}", 1)[0] for name in "kr")
    hidden = ops.relu_squared(ops.linear(x_k, f"{ffn}.key"))
    return ops.sigmoid(ops.linear(x_r, f"{ffn}.receptance")) * ops.linear(hidden, f"{ffn}.value")


def from_before(x: V, before: V) -> tuple[V, V]:
    """The mix of RWKV-4 and 5: μ weighs the current row."""
    return before, x - before


def from_current(x: V, before: V) -> tuple[V, V]:
    """The mix of RWKV-6: μ weighs the row before."""
    return x, before - x
