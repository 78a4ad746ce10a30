"""The bodies of the fused nodes of RWKV-7 and 7a: what the kernels compute, in plain operators.

Every body takes the interpreter, which has the node's inputs by name, and gives its outputs by name; both are in
`rwkv_edge.plugins.fused_nodes`. Source of the formulas: `rwkv_edge.models.v7`.
"""

from __future__ import annotations

from rwkv_edge.exporters.fused_tracer import BodyTracer
from rwkv_edge.exporters.tracer import Symbol
from rwkv_edge.models.v7 import DECAY_SCALE, HEAD_NORM_EPS


def time_mix_in(ops: BodyTracer) -> dict[str, Symbol]:
    """Residual sum, norm, six mixes, receptance, key and value, the first halves of the LoRAs."""
    normed, before, found = ops.normed()
    x_r, x_w, x_k, x_v, x_a, x_g = ops.mix(normed, before - normed, "mix", 6)
    inputs = {"receptance": x_r, "key": x_k, "value": x_v, "w1": x_w, "a1": x_a, "g1": x_g}
    made = ops.products(inputs | ({"v1": x_v} if "v1" in ops else {}))
    found |= {"r": made["receptance"], "k": made["key"], "v": made["value"], "v_first": made["value"]}
    found |= {"hw": ops.tanh(made["w1"]), "ha": made["a1"], "hg": ops.sigmoid(made["g1"])}
    return found | ({"hv": made["v1"]} if "v1" in ops else {})


def wkv(ops: BodyTracer) -> dict[str, Symbol]:
    """The second halves of the LoRAs, decay, value residual, removal key, recurrence, group norm, bonus, gate."""
    value = ops["v_first"]
    if "v" in ops:  # not in layer 0
        blend = ops.sigmoid(ops.linear(ops["hv"], "v2") + ops.param("v0"))
        value = ops["v"] + (value - ops["v"]) * blend
    decay_log = ops.sigmoid(ops.linear(ops["hw"], "w2") + ops.param("w0")) * DECAY_SCALE
    a = ops.heads(ops.sigmoid(ops.linear(ops["ha"], "a2") + ops.param("a0")))
    r, k, v = (ops.heads(x) for x in (ops["r"], ops["k"], value))
    kk = ops.normalize(k * ops.param("k_k"))
    k = k * ((a - 1.0) * ops.param("k_a") + 1.0)
    y, after = ops.wkv7(ops["wkv"], r, ops.heads(decay_log), k, v, kk, a)
    y = ops.head_norm(y, HEAD_NORM_EPS) * ops.param("ln_x.weight") + ops.param("ln_x.bias")
    y = y + ops.head_sum(r * k * ops.param("r_k")) * v
    return {"y": ops.merge_heads(y * ops.heads(ops.linear(ops["hg"], "g2"))), "wkv": after}


def channel_mix_in(ops: BodyTracer) -> dict[str, Symbol]:
    """Residual sum, norm, mix, key, relu²; in 7a s1 too, which takes the norm's output as it is."""
    normed, before, found = ops.normed()
    (x_k,) = ops.mix(normed, before - normed, "mix", 1)
    found["hidden"] = ops.relu_squared(ops.linear(x_k, "key"))
    return found | ({"hs": ops.linear(normed, "s1")} if "s1" in ops else {})


def deep_embed(ops: BodyTracer) -> dict[str, Symbol]:
    """hidden ∘= ((x s1)·E_token) s2 + s0."""
    scale = ops.token_matrix(ops["hs"], "s_emb", ops["tokens"], ops.size("s2", 0))
    return {"hidden": ops["hidden"] * (ops.linear(scale, "s2") + ops.param("s0"))}


def channel_mix_out(ops: BodyTracer) -> dict[str, Symbol]:
    """Value, as a partial sum for the residual stream."""
    return ops.parts(ops.linear(ops["hidden"], "value"))


BODIES = {
    "time_mix_in": time_mix_in,
    "wkv": wkv,
    "time_mix_out": BodyTracer.output,
    "channel_mix_in": channel_mix_in,
    "deep_embed": deep_embed,
    "channel_mix_out": channel_mix_out,
}
