"""The bodies of the fused nodes of RWKV-4 to 6: what the kernels compute, in plain operators.

See `rwkv_edge.exporters.fused_v7`. Source of the formulas: `rwkv_edge.models.v4`, `v5`, `v6` and `blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from rwkv_edge.exporters.fused_tracer import BodyTracer
from rwkv_edge.exporters.tracer import Symbol
from rwkv_edge.models.blocks import from_before, from_current
from rwkv_edge.models.v5 import HEAD_NORM_EPS
from rwkv_edge.models.v6 import MIXES

Shifted = Callable[[Symbol, Symbol], tuple[Symbol, Symbol]]
"""The base and the delta of a version's token-shift mix."""


def channel_mix_in(shifted: Shifted, ops: BodyTracer) -> dict[str, Symbol]:
    """Residual sum, norm, mixes, key and relu², receptance and its sigmoid."""
    normed, before, found = ops.normed()
    base, delta = shifted(normed, before)
    x_k, x_r = (ops.mix(base, delta, f"mix_{name}", 1)[0] for name in "kr")
    hidden, factor = ops.relu_squared(ops.linear(x_k, "key")), ops.sigmoid(ops.linear(x_r, "receptance"))
    return {**found, "hidden": hidden, "factor": factor}


def channel_mix_out(ops: BodyTracer) -> dict[str, Symbol]:
    """Value times the receptance, as a partial sum for the residual stream."""
    return ops.parts(ops.linear(ops["hidden"], "value") * ops["factor"])


def _mixed_products(matrices: Sequence[str], ops: BodyTracer) -> tuple[dict[str, Symbol], dict[str, Symbol]]:
    """Residual sum, norm, and the product of a mix of its own with each matrix, by the matrix's initial."""
    normed, before, found = ops.normed()
    base, delta = from_before(normed, before)
    mixed = {name: ops.mix(base, delta, f"mix_{name[0]}", 1)[0] for name in matrices}
    return {name[0]: product for name, product in ops.products(mixed).items()}, found


def time_mix_in4(ops: BodyTracer) -> dict[str, Symbol]:
    """Receptance and its sigmoid, key, value."""
    made, found = _mixed_products(("receptance", "key", "value"), ops)
    return {**found, **made, "r": ops.sigmoid(made["r"])}


def wkv4(ops: BodyTracer) -> dict[str, Symbol]:
    """The recurrence, times the receptance."""
    names = ("wkv_num", "wkv_den", "wkv_max")
    num, den, top = (ops[name] for name in names)
    y, after = ops.wkv4((num, den, top), ops.param("decay"), ops.param("first"), ops["k"], ops["v"])
    return {"y": ops["r"] * y, **dict(zip(names, after, strict=True))}


def time_mix_in5(ops: BodyTracer) -> dict[str, Symbol]:
    """Receptance, key, value, and from 5.1 on the gate."""
    made, found = _mixed_products(("receptance", "key", "value", *(["gate"] if "gate" in ops else [])), ops)
    return {**found, **made}


def wkv5(ops: BodyTracer) -> dict[str, Symbol]:
    """The recurrence, group norm and gate."""
    r, k, v = (ops.heads(ops[name]) for name in "rkv")
    y, after = ops.wkv5(ops["wkv"], r, ops.param("decay_log"), ops.param("first"), k, v)
    return {"y": _gated(ops, y), "wkv": after}


def time_mix_norm6(ops: BodyTracer) -> dict[str, Symbol]:
    """Residual sum, norm, and the first half of the mixes' LoRA."""
    normed, before, found = ops.normed()
    (mixed,) = ops.mix(normed, before - normed, "mix_x", 1)
    return {**found, "normed": normed, "h": ops.tanh(ops.linear(mixed, "mix.w1"))}


def time_mix_mixes6(ops: BodyTracer) -> dict[str, Symbol]:
    """The mixes' second halves, and the five mixed inputs, stacked."""
    count, rank = len(MIXES), ops.size("mix.w2", 1)
    added = ops.linear(ops.by_mix(ops["h"], count, rank), "mix.w2")
    delta = ops.fp32(ops["shift"]) - ops["normed"]
    return {"mixed": ops["normed"] + delta * (added + ops.param("mix"))}


def time_mix_in6(ops: BodyTracer) -> dict[str, Symbol]:
    """Receptance, key, value, gate, and the first half of the decay's LoRA."""
    x_w, x_k, x_v, x_r, x_g = ops.split(ops["mixed"], len(MIXES))
    made = ops.products({"receptance": x_r, "key": x_k, "value": x_v, "gate": x_g, "decay.w1": x_w})
    return {**{name[0]: x for name, x in made.items()}, "hw": ops.tanh(made["decay.w1"])}


def wkv6(ops: BodyTracer) -> dict[str, Symbol]:
    """The second half of the decay's LoRA, the recurrence, group norm and gate."""
    decay_log = -ops.exp(ops.linear(ops["hw"], "decay.w2") + ops.param("decay"))
    r, k, v = (ops.heads(ops[name]) for name in "rkv")
    y, after = ops.wkv6(ops["wkv"], r, ops.heads(decay_log), ops.param("first"), k, v)
    return {"y": _gated(ops, y), "wkv": after}


def _gated(ops: BodyTracer, y: Symbol) -> Symbol:
    y = ops.head_norm(y, HEAD_NORM_EPS) * ops.param("ln_x.weight") + ops.param("ln_x.bias")
    if "g" in ops:
        y = y * ops.heads(ops["g"] * ops.sigmoid(ops["g"]))
    return ops.merge_heads(y)


def _bodies(
    shifted: Shifted, **time_mix: Callable[[BodyTracer], dict[str, Symbol]]
) -> dict[str, Callable[..., dict[str, Symbol]]]:
    return {
        **time_mix,
        "time_mix_out": BodyTracer.output,
        "channel_mix_in": partial(channel_mix_in, shifted),
        "channel_mix_out": channel_mix_out,
    }


BODIES4 = _bodies(from_before, time_mix_in=time_mix_in4, wkv=wkv4)
BODIES5 = _bodies(from_before, time_mix_in=time_mix_in5, wkv=wkv5)
BODIES6 = _bodies(
    from_current, time_mix_norm=time_mix_norm6, time_mix_mixes=time_mix_mixes6, time_mix_in=time_mix_in6, wkv=wkv6
)
