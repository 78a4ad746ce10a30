"""The recurrences over a chunk of T tokens in parallel form, in plain operators of opset 21 and in float32.

None of them divides by a decay, but for RWKV-7, whose decay is above 0.545: there e^−cum stays below 1e17 for T ≤ 64.
Streams are [B, H, T, N] (RWKV-4: [B, T, A]); every function takes the builder of operators first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

MAX_TOKENS = 1024
"""The longest chunk: what a graph of unrolled runs may reasonably hold."""

RUN_7 = 64  # RWKV-7: beyond it e^−cum leaves float32's precision
RUN_6 = 16  # RWKV-5 and 6: tokens whose pairwise decays are held at once, [B, H, 16, 16, N]
NOTHING = -1e30  # exponent of an empty sum in RWKV-4

Constant = Callable[[str, np.ndarray], ir.Value]
"""Makes an initializer of a name and a value, once."""


@dataclass(frozen=True)
class Streams7:
    """Inputs of RWKV-7's chunk, each [B, H, T, N]; see `rwkv_edge.models.ops.Ops.wkv7`."""

    r: ir.Value
    decay_log: ir.Value
    k: ir.Value
    v: ir.Value
    kk: ir.Value
    a: ir.Value

    def part(self, op: Any, start: int, stop: int) -> Streams7:
        """The tokens from ``start`` to ``stop``."""
        values = (self.r, self.decay_log, self.k, self.v, self.kk, self.a)
        return Streams7(*(op.Slice(x, [start], [stop], [2]) for x in values))


def wkv7_chunk(
    op: Any, constant: Constant, state: ir.Value, streams: Streams7, tokens: int
) -> tuple[ir.Value, ir.Value]:
    """RWKV-7 over T tokens, in runs of 64 that hand the state on.

    Args:
        op: operators.
        constant: makes initializers.
        state: S₀ [B, H, N (value), N (key)].
        streams: inputs.
        tokens: T.

    Returns:
        y [B, H, T, N] and the new S.
    """
    if tokens <= RUN_7:
        return _wkv7_run(op, constant, state, streams, tokens)
    outputs = []
    for start in range(0, tokens, RUN_7):
        stop = min(start + RUN_7, tokens)
        y, state = _wkv7_run(op, constant, state, streams.part(op, start, stop), stop - start)
        outputs.append(y)
    return op.Concat(*outputs, axis=2), state


def _wkv7_run(
    op: Any, constant: Constant, state: ir.Value, streams: Streams7, tokens: int
) -> tuple[ir.Value, ir.Value]:
    """RWKV-7 over at most 64 tokens.

    With P_t the product of decays up to t, α_t = −kk_t∘P_{t−1}, β_t = (kk∘a)_t/P_t, κ_t = k_t/P_t, ρ_t = r_t∘P_t, the
    removals U solve (I − A) U = α S₀ᵀ + B V with A = tril(α βᵀ, −1) and B = tril(α κᵀ, −1); then
    y = ρ S₀ᵀ + tril(ρ βᵀ) U + tril(ρ κᵀ) V and S = (S₀ + Uᵀβ + Vᵀκ)∘P_T.
    """
    lower, strict = (
        constant(f"{name}{tokens}", make(tokens)) for name, make in (("tril", _lower), ("strict", _strict))
    )
    cum = op.MatMul(lower, streams.decay_log)
    grown, shrunk = op.Exp(op.Neg(cum)), op.Exp(cum)
    alpha = op.Neg(op.Mul(streams.kk, op.Exp(op.Sub(cum, streams.decay_log))))
    beta = op.Mul(op.Mul(streams.kk, streams.a), grown)
    kappa = op.Mul(streams.k, grown)
    rho = op.Mul(streams.r, shrunk)
    beta_t, kappa_t, state_t = _t(op, beta), _t(op, kappa), _t(op, state)
    inverse = inverse_of_unit_lower(op, constant, op.Mul(op.MatMul(alpha, beta_t), strict), tokens)
    known = op.Mul(op.MatMul(alpha, kappa_t), strict)
    removed = op.MatMul(inverse, op.Add(op.MatMul(alpha, state_t), op.MatMul(known, streams.v)))
    y = op.Add(
        op.MatMul(rho, state_t),
        op.Add(
            op.MatMul(op.Mul(op.MatMul(rho, beta_t), lower), removed),
            op.MatMul(op.Mul(op.MatMul(rho, kappa_t), lower), streams.v),
        ),
    )
    added = op.Add(op.MatMul(_t(op, removed), beta), op.MatMul(_t(op, streams.v), kappa))
    total = op.Slice(shrunk, [tokens - 1], [tokens], [2])  # P_T [B, H, 1, N]
    return y, op.Mul(op.Add(state, added), total)


def inverse_of_unit_lower(op: Any, constant: Constant, a: ir.Value, tokens: int) -> ir.Value:
    """(I − A)⁻¹ for strictly lower triangular A [..., T, T], by masked recursion.

    X = I + A∘M₁, then X ← X + X (A∘M_s) X for s = 2, 4, …, where M_s holds the lower left s × s block of every 2s × 2s
    block on the diagonal. The shorter product (I+A)(I+A²)(I+A⁴)… is not used: on repeated tokens its terms cancel, and
    it is wrong by 5e9 at T = 64.
    """
    inverse: ir.Value = op.Add(
        constant(f"eye{tokens}", np.eye(tokens)), op.Mul(a, constant(f"blocks{tokens}.1", _blocks(tokens, 1)))
    )
    size = 2
    while size < tokens:
        corner = op.Mul(a, constant(f"blocks{tokens}.{size}", _blocks(tokens, size)))
        inverse = op.Add(inverse, op.MatMul(op.MatMul(inverse, corner), inverse))
        size *= 2
    return inverse


def wkv6_chunk(
    op: Any,
    constant: Constant,
    state: ir.Value,
    r: ir.Value,
    decay_log: ir.Value,
    first: ir.Value,
    k: ir.Value,
    v: ir.Value,
    tokens: int,
) -> tuple[ir.Value, ir.Value]:
    """RWKV-5 and 6 over T tokens, in runs of 16 that hand the state on.

    Inside a run, with c the cumulated log decay,
    y_t = (r_t∘e^{c_{t−1}}) S + Σ_{j<t} (Σ_n r_tn k_jn e^{c_{t−1,n} − c_jn}) v_j + (r_t·(u∘k_t)) v_t.
    Every exponent is a difference that is at most 0, so decays of 1e-10 and less do no harm.

    Args:
        op: operators.
        constant: makes initializers.
        state: S [B, H, N (key), N (value)].
        r: receptance [B, H, T, N].
        decay_log: log of the decay [B, H, T, N].
        first: u [H, 1, N].
        k: key [B, H, T, N].
        v: value [B, H, T, N].
        tokens: T.

    Returns:
        y [B, H, T, N] and the new S.
    """
    bonus = op.Mul(op.ReduceSum(op.Mul(op.Mul(r, first), k), [-1], keepdims=1), v)
    outputs = []
    for start in range(0, tokens, RUN_6):
        stop = min(start + RUN_6, tokens)
        parts = [op.Slice(x, [start], [stop], [2]) for x in (r, decay_log, k, v)]
        y, state = _wkv6_run(op, constant, state, parts, stop - start)
        outputs.append(y)
    y = op.Concat(*outputs, axis=2) if len(outputs) > 1 else outputs[0]
    return op.Add(y, bonus), state


def _wkv6_run(
    op: Any, constant: Constant, state: ir.Value, parts: list[ir.Value], count: int
) -> tuple[ir.Value, ir.Value]:
    r, decay_log, k, v = parts
    cum = op.MatMul(constant(f"tril{count}", _lower(count)), decay_log)
    before = op.Sub(cum, decay_log)  # c_{t−1}
    y = op.MatMul(op.Mul(r, op.Exp(before)), state)
    if count > 1:
        # pairs above the diagonal would have positive exponents: they are bounded by 0 first, then masked
        pairs = op.Min(op.Sub(op.Unsqueeze(before, [3]), op.Unsqueeze(cum, [2])), 0.0)  # [B, H, t, j, N]
        weighted = op.Mul(op.Mul(op.Exp(pairs), op.Unsqueeze(r, [3])), op.Unsqueeze(k, [2]))
        scores = op.Mul(op.ReduceSum(weighted, [-1], keepdims=0), constant(f"strict{count}", _strict(count)))
        y = op.Add(y, op.MatMul(scores, v))
    total = op.Slice(cum, [count - 1], [count], [2])  # [B, H, 1, N]
    left = op.Mul(k, op.Exp(op.Sub(total, cum)))  # each key, decayed to the end of the run
    state = op.Add(op.Mul(state, _t(op, op.Exp(total))), op.MatMul(_t(op, left), v))
    return y, state


def wkv4_chunk(
    op: Any,
    constant: Constant,
    state: tuple[ir.Value, ir.Value, ir.Value],
    w: ir.Value,
    u: ir.Value,
    k: ir.Value,
    v: ir.Value,
    tokens: int,
) -> tuple[ir.Value, tuple[ir.Value, ir.Value, ir.Value]]:
    """RWKV-4 over T tokens: a prefix sum by doubling of (numerator, denominator, exponent), stable at every step.

    The state before the chunk is the first of T + 1 elements; after the step with span s, element t holds the sum over
    the last 2s elements, those of the earlier half decayed by s·w.

    Args:
        op: operators.
        constant: makes initializers.
        state: num, den and top, each [B, A].
        w: decay −e^time_decay [A].
        u: bonus of the current token [A].
        k: key [B, T, A].
        v: value [B, T, A].
        tokens: T.

    Returns:
        y [B, T, A] and the new state.
    """
    ones = op.Expand(constant("one", np.ones(())), op.Shape(k))
    num, den, top = (op.Concat(op.Unsqueeze(s, [1]), x, axis=1) for s, x in zip(state, (v, ones, k), strict=True))
    span = 1
    while span <= tokens:
        decay = op.Mul(w, constant(f"span{span}", np.full((), span)))
        earlier_num, earlier_den = (_shifted(op, constant, x, span, tokens + 1, 0.0) for x in (num, den))
        earlier_top = _shifted(op, constant, top, span, tokens + 1, NOTHING)
        num, den, top = _merged(op, earlier_num, earlier_den, op.Add(earlier_top, decay), num, den, top)
        span *= 2
    y_num, y_den, y_top = (op.Slice(x, [0], [tokens], [1]) for x in (num, den, top))
    boosted = op.Add(k, u)
    p = op.Max(y_top, boosted)
    old, new = op.Exp(op.Sub(y_top, p)), op.Exp(op.Sub(boosted, p))
    y = op.Div(op.Add(op.Mul(old, y_num), op.Mul(new, v)), op.Add(op.Mul(old, y_den), new))
    last = tuple(op.Squeeze(op.Slice(x, [tokens], [tokens + 1], [1]), [1]) for x in (num, den, top))
    return y, (last[0], last[1], last[2])


def _merged(
    op: Any,
    earlier_num: ir.Value,
    earlier_den: ir.Value,
    earlier_top: ir.Value,
    num: ir.Value,
    den: ir.Value,
    top: ir.Value,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The sum of two weighted sums, relative to the larger exponent."""
    p = op.Max(earlier_top, top)
    old, new = op.Exp(op.Sub(earlier_top, p)), op.Exp(op.Sub(top, p))
    return op.Add(op.Mul(old, earlier_num), op.Mul(new, num)), op.Add(op.Mul(old, earlier_den), op.Mul(new, den)), p


def _shifted(op: Any, constant: Constant, x: ir.Value, span: int, length: int, fill: float) -> ir.Value:
    """x [B, length, A] moved ``span`` places later, with ``fill`` before it."""
    value = constant(f"fill{fill:g}", np.full((), fill))
    moved: ir.Value = op.Pad(op.Slice(x, [0], [length - span], [1]), [0, span, 0, 0, 0, 0], value)
    return moved


def _t(op: Any, x: ir.Value) -> ir.Value:
    """The last two of four axes exchanged."""
    transposed: ir.Value = op.Transpose(x, perm=[0, 1, 3, 2])
    return transposed


def _lower(tokens: int) -> np.ndarray:
    return np.tril(np.ones((tokens, tokens)))


def _strict(tokens: int) -> np.ndarray:
    return np.tril(np.ones((tokens, tokens)), -1)


def _blocks(tokens: int, size: int) -> np.ndarray:
    """1 in the lower left ``size`` × ``size`` block of every diagonal block of twice that size."""
    row, column = np.arange(tokens)[:, None], np.arange(tokens)[None]
    same = row // (2 * size) == column // (2 * size)
    corner: np.ndarray = same & ((row // size) % 2 == 1) & ((column // size) % 2 == 0)
    return corner.astype(np.float64)
