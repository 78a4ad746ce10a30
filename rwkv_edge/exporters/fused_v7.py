"""The bodies of RWKV-7's fused nodes: what the kernels compute, in plain operators.

Every body takes the interpreter and the node's inputs by name, and gives its outputs by name; both are in
`rwkv_edge.plugins.fused_nodes`. Source of the formulas: `rwkv_edge.models.v7`.
"""

from __future__ import annotations

from collections.abc import Mapping

from rwkv_edge.exporters.fused_tracer import BodyTracer
from rwkv_edge.exporters.tracer import Symbol
from rwkv_edge.models.v7 import DECAY_SCALE, HEAD_NORM_EPS

Values = Mapping[str, Symbol]


def time_mix_in_first(ops: BodyTracer, given: Values) -> dict[str, Symbol]:
    """`time_mix_in` of layer 0, whose stream is the token's embedding and whose value is v_first."""
    found = _projected(ops, ops.embed("emb", given["tokens"]), given)
    return {**found, "v_first": found["v"]}


def time_mix_in(ops: BodyTracer, given: Values) -> dict[str, Symbol]:
    """Residual sum, norm, six mixes, receptance, key and value, the first halves of the LoRAs."""
    return _projected(ops, ops.summed(given["stream"], given["parts"]), given)


def _projected(ops: BodyTracer, x: Symbol, given: Values) -> dict[str, Symbol]:
    normed = ops.layer_norm(x, "ln")
    mixed = ops.mix(normed, ops.fp32(given["shift"]) - normed, "mix", 6)
    x_r, x_w, x_k, x_v, x_a, x_g = (ops.act(value) for value in mixed)
    found = {
        "stream": x,
        "shift": ops.act(normed),
        "r": ops.linear(x_r, "receptance"),
        "k": ops.linear(x_k, "key"),
        "v": ops.linear(x_v, "value"),
        "hw": ops.tanh(ops.linear(x_w, "w1")),
        "ha": ops.linear(x_a, "a1"),
        "hg": ops.sigmoid(ops.linear(x_g, "g1")),
    }
    return found | ({"hv": ops.linear(x_v, "v1")} if "v1" in given else {})


def wkv_first(ops: BodyTracer, given: Values) -> dict[str, Symbol]:
    """`wkv` of layer 0, which has no value residual."""
    return _recurrence(ops, given["v_first"], given)


def wkv(ops: BodyTracer, given: Values) -> dict[str, Symbol]:
    """The second halves of the LoRAs, decay, value residual, removal key, recurrence, group norm, bonus, gate."""
    value = given["v"]
    blend = ops.sigmoid(ops.linear(given["hv"], "v2") + ops.param("v0"))
    return _recurrence(ops, value + (given["v_first"] - value) * blend, given)


def _recurrence(ops: BodyTracer, value: Symbol, given: Values) -> dict[str, Symbol]:
    decay_log = ops.sigmoid(ops.linear(given["hw"], "w2") + ops.param("w0")) * DECAY_SCALE
    a = ops.heads(ops.sigmoid(ops.linear(given["ha"], "a2") + ops.param("a0")))
    r, k, v = (ops.heads(x) for x in (given["r"], given["k"], value))
    kk = ops.normalize(k * ops.param("k_k"))
    k = k * ((a - 1.0) * ops.param("k_a") + 1.0)
    y, after = ops.wkv7(given["wkv"], r, ops.heads(decay_log), k, v, kk, a)
    y = ops.head_norm(y, HEAD_NORM_EPS) * ops.param("ln_x.weight") + ops.param("ln_x.bias")
    y = y + ops.head_sum(r * k * ops.param("r_k")) * v
    return {"y": ops.merge_heads(y * ops.heads(ops.linear(given["hg"], "g2"))), "wkv": after}


def time_mix_out(ops: BodyTracer, given: Values) -> dict[str, Symbol]:
    """Output, as a partial sum for the residual stream."""
    return {"parts": ops.as_parts(ops.linear(given["y"], "output"))}


def channel_mix_in(ops: BodyTracer, given: Values) -> dict[str, Symbol]:
    """Residual sum, norm, mix, key, relu²."""
    x = ops.summed(given["stream"], given["parts"])
    normed = ops.layer_norm(x, "ln")
    (x_k,) = ops.mix(normed, ops.fp32(given["shift"]) - normed, "mix", 1)
    return {"stream": x, "shift": ops.act(normed), "hidden": ops.relu_squared(ops.linear(x_k, "key"))}


def channel_mix_out(ops: BodyTracer, given: Values) -> dict[str, Symbol]:
    """Value, as a partial sum for the residual stream."""
    return {"parts": ops.as_parts(ops.linear(given["hidden"], "value"))}


BODIES = {
    "v7_time_mix_in_first": time_mix_in_first,
    "v7_time_mix_in": time_mix_in,
    "v7_wkv_first": wkv_first,
    "v7_wkv": wkv,
    "v7_time_mix_out": time_mix_out,
    "v7_channel_mix_in": channel_mix_in,
    "v7_channel_mix_out": channel_mix_out,
}
