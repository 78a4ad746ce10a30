"""The recurrences of one token in plain operators of opset 21: inlined, or the bodies of the local functions
``rwkv::wkvN_step``.

Every function takes the builder of operators first; B streams, H heads of size N, everything float32.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

Values = tuple[ir.Value, ...]


def wkv4_step(
    op: Any, num: ir.Value, den: ir.Value, top: ir.Value, w: ir.Value, u: ir.Value, k: ir.Value, v: ir.Value
) -> Values:
    """The RWKV-4 average of values weighted by e^key; see `rwkv_edge.models.ops.Ops.wkv4`.

    Args:
        op: operators.
        num: numerator [B, A].
        den: denominator [B, A].
        top: largest exponent [B, A].
        w: decay −e^time_decay [A].
        u: bonus of the current token [A].
        k: key [B, A].
        v: value [B, A].

    Returns:
        y [B, A], and the new num, den and top.
    """
    boosted = op.Add(u, k)
    p = op.Max(top, boosted)
    old, new = op.Exp(op.Sub(top, p)), op.Exp(op.Sub(boosted, p))
    y = op.Div(op.Add(op.Mul(old, num), op.Mul(new, v)), op.Add(op.Mul(old, den), new))
    decayed = op.Add(top, w)
    q = op.Max(decayed, k)
    old, new = op.Exp(op.Sub(decayed, q)), op.Exp(op.Sub(k, q))
    return y, op.Add(op.Mul(old, num), op.Mul(new, v)), op.Add(op.Mul(old, den), new), q


def wkv6_step(op: Any, state: ir.Value, r: ir.Value, w: ir.Value, u: ir.Value, k: ir.Value, v: ir.Value) -> Values:
    """y = rᵀS + (r·(u∘k)) v, and S ← w∘S + k ⊗ v: RWKV-5 and 6.

    Args:
        op: operators.
        state: S [B, H, N (key), N (value)].
        r: receptance [B, H, N].
        w: decay [B, H, N], or [H, N] in RWKV-5.
        u: bonus of the current token [H, N].
        k: key [B, H, N].
        v: value [B, H, N].

    Returns:
        y [B, H, N] and the new S.
    """
    read = op.Squeeze(op.MatMul(op.Unsqueeze(r, [-2]), state), [-2])
    bonus = op.ReduceSum(op.Mul(op.Mul(r, u), k), [-1], keepdims=1)
    added = op.Mul(op.Unsqueeze(k, [-1]), op.Unsqueeze(v, [-2]))
    after = op.Add(op.Mul(state, op.Unsqueeze(w, [-1])), added)
    return op.Add(read, op.Mul(bonus, v)), after


def wkv7_step(
    op: Any, state: ir.Value, r: ir.Value, w: ir.Value, k: ir.Value, v: ir.Value, kk: ir.Value, a: ir.Value
) -> Values:
    """S∘w + [S kk | v]·[−kk∘a ; k], the RWKV-7 update as one product of rank 2, and y = S r.

    Args:
        op: operators.
        state: S [B, H, N (value), N (key)].
        r: receptance [B, H, N], as are the others.
        w: decay.
        k: key.
        v: value.
        kk: normalised removal key.
        a: in-context learning rate.

    Returns:
        y [B, H, N] and the new S.
    """
    removed = op.MatMul(state, op.Unsqueeze(kk, [-1]))
    columns = op.Concat(removed, op.Unsqueeze(v, [-1]), axis=-1)
    rows = op.Concat(op.Unsqueeze(op.Neg(op.Mul(kk, a)), [-2]), op.Unsqueeze(k, [-2]), axis=-2)
    after = op.Add(op.Mul(state, op.Unsqueeze(w, [-2])), op.MatMul(columns, rows))
    return op.Squeeze(op.MatMul(after, op.Unsqueeze(r, [-1])), [-1]), after
