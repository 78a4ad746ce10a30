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

RUN_7 = 32  # RWKV-7: measured against 16 and 64; beyond 64 e^−cum leaves float32's precision
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
    op: Any, constant: Constant, state: ir.Value, streams: Streams7, tokens: int, head_size: int
) -> tuple[ir.Value, ir.Value]:
    """RWKV-7 over T tokens, in runs of at most 32 that hand the state on.

    Args:
        op: operators.
        constant: makes initializers.
        state: S₀ [B, H, N (value), N (key)].
        streams: inputs.
        tokens: T.
        head_size: N.

    Returns:
        y [B, H, T, N] and the new S.
    """
    outputs = []
    rest = tokens % RUN_7
    for start, stop in ((0, tokens - rest), (tokens - rest, tokens)):
        if start < stop:
            part = streams if stop - start == tokens else streams.part(op, start, stop)
            y, state = _wkv7_runs(op, constant, state, part, min(RUN_7, stop - start), stop - start, head_size)
            outputs.append(y)
    return op.Concat(*outputs, axis=2) if len(outputs) > 1 else outputs[0], state


def _wkv7_runs(
    op: Any, constant: Constant, state: ir.Value, streams: Streams7, run: int, tokens: int, head_size: int
) -> tuple[ir.Value, ir.Value]:
    """RWKV-7 over C = ``tokens`` / ``run`` runs of R tokens; all but the state is computed for all runs at once.

    In a run, with P_t the product of decays up to t, α_t = −kk_t∘P_{t−1}, β_t = (kk∘a)_t/P_t, κ_t = k_t/P_t and
    ρ_t = r_t∘P_t, the removals are U = X (α Sᵀ + tril(α κᵀ, −1) V) with X = (I − tril(α βᵀ, −1))⁻¹; then
    y = ρ Sᵀ + tril(ρ βᵀ) U + tril(ρ κᵀ) V and S ← (S + Uᵀβ + Vᵀκ)∘P_R. All of it is linear in S: S ← S G + K, and
    y = Q Sᵀ + Y.
    """
    count = tokens // run
    r, decay_log, k, v, kk, a = (
        op.Reshape(x, [0, 0, count, run, head_size])
        for x in (streams.r, streams.decay_log, streams.k, streams.v, streams.kk, streams.a)
    )
    lower, strict = (constant(f"{name}{run}", make(run)) for name, make in (("tril", _lower), ("strict", _strict)))
    cum = op.MatMul(lower, decay_log)  # [B, H, C, R, N]
    last = op.Slice(cum, [run - 1], [run], [3])
    grown, left = op.Exp(op.Neg(cum)), op.Exp(op.Sub(last, cum))
    alpha = op.Neg(op.Mul(kk, op.Exp(op.Sub(cum, decay_log))))
    rate = op.Mul(kk, a)
    beta_t, kappa_t = _t(op, op.Mul(rate, grown)), _t(op, op.Mul(k, grown))
    rho = op.Mul(r, op.Exp(cum))
    inverse = inverse_of_unit_lower(op, constant, op.Mul(op.MatMul(alpha, beta_t), strict), run)
    by_state = op.MatMul(inverse, alpha)
    by_value = op.MatMul(inverse, op.MatMul(op.Mul(op.MatMul(alpha, kappa_t), strict), v))
    seen = op.Mul(op.MatMul(rho, beta_t), lower)
    fixed = op.Add(op.MatMul(op.Mul(op.MatMul(rho, kappa_t), lower), v), op.MatMul(seen, by_value))
    query = op.Add(rho, op.MatMul(seen, by_state))
    beta_end, kappa_end = op.Mul(rate, left), op.Mul(k, left)
    kept = op.Mul(constant(f"eye{head_size}", np.eye(head_size)), op.Exp(last))
    carry = op.Add(kept, op.MatMul(_t(op, by_state), beta_end))  # G
    added = op.Add(op.MatMul(_t(op, by_value), beta_end), op.MatMul(_t(op, v), kappa_end))  # K
    states, after = _carried(op, state, carry, added, count)
    y = op.Add(op.MatMul(query, _t(op, states)), fixed)
    return op.Reshape(y, [0, 0, tokens, head_size]), after


def _carried(op: Any, state: ir.Value, carry: ir.Value, added: ir.Value, count: int) -> tuple[ir.Value, ir.Value]:
    """The states before each of ``count`` runs [B, H, C, N, N], and the one after the last, by S ← S G + K."""
    current = op.Unsqueeze(state, [2])
    states = []
    carries, adds = (
        op.Split(x, axis=2, num_outputs=count, _outputs=count) if count > 1 else [x] for x in (carry, added)
    )
    for carry_c, added_c in zip(carries, adds, strict=True):
        states.append(current)
        current = op.Add(op.MatMul(current, carry_c), added_c)
    stacked = op.Concat(*states, axis=2) if count > 1 else states[0]
    return stacked, op.Squeeze(current, [2])


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
    """The last two axes exchanged."""
    assert x.shape is not None
    rank = len(x.shape)
    transposed: ir.Value = op.Transpose(x, perm=[*range(rank - 2), rank - 1, rank - 2])
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
