"""The bodies of the local functions ``rwkv::wkvN_sequence``: a chunk of T tokens in parallel form, in plain operators.

Inputs and outputs are those of the CUDA kernels (`rwkv_edge.plugins.spec`), so that a TensorRT plugin of the same name
can take the place of the function: streams token by token, [B, T, H, N], and decays themselves, not their logarithms.
Every function takes the builder of operators first, then the inputs, then dimensions; everything is float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from rwkv_edge.exporters.chunks import Constant, Streams7, wkv4_chunk, wkv6_chunk, wkv7_chunk

Values = tuple[ir.Value, ...]

LEAST_DECAY = float(np.finfo(np.float32).tiny)  # its logarithm, −87, is finite; what decays so much is gone anyway


def wkv4_sequence(
    op: Any,
    num: ir.Value,
    den: ir.Value,
    top: ir.Value,
    w: ir.Value,
    u: ir.Value,
    k: ir.Value,
    v: ir.Value,
    *,
    tokens: int,
) -> Values:
    """See `rwkv_edge.exporters.chunks.wkv4_chunk`, whose layout is the kernel's: y [B, T, A], new num, den and top."""
    y, after = wkv4_chunk(op, _constants(op), (num, den, top), w, u, k, v, tokens)
    return y, *after


def wkv5_sequence(
    op: Any, state: ir.Value, r: ir.Value, w: ir.Value, u: ir.Value, k: ir.Value, v: ir.Value, *, tokens: int
) -> Values:
    """`wkv6_sequence` with a decay w [H, N] that all tokens share."""
    constant = _constants(op)
    decay_log = op.Mul(op.Unsqueeze(_log(op, w), [0, 2]), constant("tokens", np.ones((tokens, 1))))  # [1, H, T, N]
    return _wkv56(op, constant, tokens, state, r, decay_log, u, k, v)


def wkv6_sequence(
    op: Any, state: ir.Value, r: ir.Value, w: ir.Value, u: ir.Value, k: ir.Value, v: ir.Value, *, tokens: int
) -> Values:
    """RWKV-6 over T tokens.

    Args:
        op: operators.
        state: S [B, H, N (key), N (value)].
        r: receptance [B, T, H, N], as are k and v.
        w: decay [B, T, H, N].
        u: bonus of the current token [H, N].
        k: key.
        v: value.
        tokens: T.

    Returns:
        y [B, T, H, N] and the new S.
    """
    return _wkv56(op, _constants(op), tokens, state, r, _by_head(op, _log(op, w)), u, k, v)


def wkv7_sequence(
    op: Any,
    state: ir.Value,
    r: ir.Value,
    w: ir.Value,
    k: ir.Value,
    v: ir.Value,
    kk: ir.Value,
    a: ir.Value,
    *,
    tokens: int,
    head_size: int,
) -> Values:
    """RWKV-7 over T tokens.

    Args:
        op: operators.
        state: S [B, H, N (value), N (key)].
        r: receptance [B, T, H, N], as are the others.
        w: decay.
        k: key.
        v: value.
        kk: normalised removal key.
        a: in-context learning rate.
        tokens: T.
        head_size: N.

    Returns:
        y [B, T, H, N] and the new S.
    """
    streams = Streams7(*(_by_head(op, x) for x in (r, _log(op, w), k, v, kk, a)))
    y, after = wkv7_chunk(op, _constants(op), state, streams, tokens, head_size)
    return _by_token(op, y), after


def _wkv56(
    op: Any,
    constant: Constant,
    tokens: int,
    state: ir.Value,
    r: ir.Value,
    decay_log: ir.Value,
    u: ir.Value,
    k: ir.Value,
    v: ir.Value,
) -> Values:
    r_h, k_h, v_h = (_by_head(op, x) for x in (r, k, v))
    bonus = op.Unsqueeze(u, [1])  # [H, 1, N]
    y, after = wkv6_chunk(op, constant, state, r_h, decay_log, bonus, k_h, v_h, tokens)
    return _by_token(op, y), after


def _log(op: Any, w: ir.Value) -> ir.Value:
    """Log of a decay in [0, 1], where 0 counts as the least normal float."""
    found: ir.Value = op.Log(op.Max(w, LEAST_DECAY))
    return found


def _by_head(op: Any, x: ir.Value) -> ir.Value:
    """[B, T, H, N] → [B, H, T, N]."""
    found: ir.Value = op.Transpose(x, perm=[0, 2, 1, 3])
    return found


_by_token = _by_head  # and back


def _constants(op: Any) -> Constant:
    """Makes each constant of a function once, as a node: functions have no initializers."""
    made: dict[str, ir.Value] = {}

    def constant(name: str, value: np.ndarray) -> ir.Value:
        if name not in made:
            made[name] = op.Constant(value=ir.tensor(value.astype(np.float32)))
        return made[name]

    return constant
