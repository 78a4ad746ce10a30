"""The vocabulary in which every RWKV version is written once.

Two interpreters run it: `rwkv_edge.models.torch_ops` (eager torch, the reference) and
`rwkv_edge.exporters.tracer` (symbolic values that record an ONNX graph).

Shapes in all docstrings: R rows = batch × tokens, D width, H heads, N head size. Row-wise operations see [R, D] whether
the graph is a single step (R = B) or a sequence (R = B·T); only `token_shift`, the WKV operations and `last_row` know
of time.
A mixed value may carry a leading axis of 1, [1, R, D], which every operation accepts.
"""

from __future__ import annotations

from typing import Protocol, TypeVar


class Value(Protocol):
    """What an operation takes and returns: a torch tensor, or a symbol of the graph."""

    def __add__(self: V, other: V | float, /) -> V: ...
    def __radd__(self: V, other: float, /) -> V: ...
    def __sub__(self: V, other: V | float, /) -> V: ...
    def __rsub__(self: V, other: float, /) -> V: ...
    def __mul__(self: V, other: V | float, /) -> V: ...
    def __rmul__(self: V, other: float, /) -> V: ...
    def __truediv__(self: V, other: V | float, /) -> V: ...
    def __neg__(self: V) -> V: ...


V = TypeVar("V", bound=Value)


class Ops(Protocol[V]):
    """One interpreter of the vocabulary."""

    def param(self, name: str) -> V:
        """A parameter of the version, in the dtype that its `Param` declares."""
        ...

    def embed(self, name: str, tokens: V) -> V:
        """Rows of the table ``name`` [V, D] by token: [R, D]."""
        ...

    def linear(self, x: V, name: str) -> V:
        """x · W for the parameter ``name`` stored [in, out]: [..., R, in] → [..., R, out]."""
        ...

    def layer_norm(self, x: V, name: str) -> V:
        """LayerNorm over D with eps 1e-5 and the parameters ``name.weight`` and ``name.bias``."""
        ...

    def residual(self, x: V, update: V) -> V:
        """x + update, [R, D], as the form of addition that no backend fuses into the linear before it."""
        ...

    def token_shift(self, x: V, previous: V) -> tuple[V, V]:
        """The row before each row of x [R, D], and the new state: the last row of each stream, [B, D].

        ``previous`` [B, D] is the state: what came before the first token.
        """
        ...

    def mix(self, x: V, delta: V, name: str, count: int) -> tuple[V, ...]:
        """x + delta∘μ_i for the stacked coefficients ``name`` [count, 1, D]: ``count`` values [1, R, D].

        A single coefficient is stored as [1, D] and gives one value [R, D].
        """
        ...

    def heads(self, x: V) -> V:
        """[..., R, D] → [R, H, N]."""
        ...

    def merge_heads(self, x: V) -> V:
        """[R, H, N] → [R, D]."""
        ...

    def fp32(self, x: V) -> V:
        """x in float32 (float64 where the reference runs in float64)."""
        ...

    def act(self, x: V) -> V:
        """x in the dtype of the activations."""
        ...

    def sigmoid(self, x: V) -> V:
        """1 / (1 + e^-x)."""
        ...

    def tanh(self, x: V) -> V:
        """Hyperbolic tangent."""
        ...

    def exp(self, x: V) -> V:
        """e^x."""
        ...

    def relu_squared(self, x: V) -> V:
        """max(x, 0)²."""
        ...

    def normalize(self, x: V) -> V:
        """x / max(‖x‖₂, 1e-12) over the last axis."""
        ...

    def head_norm(self, x: V, eps: float) -> V:
        """(x − mean) / √(var + eps) over N of [R, H, N]: group norm without its affine part."""
        ...

    def head_sum(self, x: V) -> V:
        """Sum over N of [R, H, N], keeping the axis: [R, H, 1]."""
        ...

    def wkv7(self, state: V, r: V, decay_log: V, k: V, v: V, kk: V, a: V) -> tuple[V, V]:
        """The RWKV-7 recurrence.

        S ← S·diag(w) − (S kk)(kk∘a)ᵀ + v kᵀ, then y = S r, with w = e^decay_log, for every token of a stream in turn.

        Args:
            state: S [B, H, N (value), N (key)] float32.
            r: receptance [R, H, N] float32, like all that follow.
            decay_log: natural logarithm of the decay w.
            k: key.
            v: value.
            kk: normalised removal key.
            a: in-context learning rate.

        Returns:
            y [R, H, N] and the new S.
        """
        ...

    def wkv4(self, state: tuple[V, V, V], decay: V, first: V, k: V, v: V) -> tuple[V, tuple[V, V, V]]:
        """The RWKV-4 recurrence: an average of values weighted by e^key, with its exponents kept near zero.

        p = max(pp, u+k); y = (e^{pp−p} aa + e^{u+k−p} v) / (e^{pp−p} bb + e^{u+k−p}); q = max(pp+w, k);
        aa ← e^{pp+w−q} aa + e^{k−q} v; bb ← e^{pp+w−q} bb + e^{k−q}; pp ← q.

        Args:
            state: numerator aa, denominator bb and largest exponent pp, each [B, A] float32.
            decay: w = −e^time_decay [A] float32.
            first: u [A] float32, the bonus of the current token.
            k: key [R, A] float32.
            v: value [R, A] float32.

        Returns:
            y [R, A] and the new state.
        """
        ...

    def wkv5(self, state: V, r: V, decay_log: V, first: V, k: V, v: V) -> tuple[V, V]:
        """The RWKV-5 recurrence: `wkv6` with a decay that is a parameter, ``decay_log`` [H, N]."""
        ...

    def wkv6(self, state: V, r: V, decay_log: V, first: V, k: V, v: V) -> tuple[V, V]:
        """The RWKV-6 recurrence: y = rᵀ(S + u∘k ⊗ v), then S ← w∘S + k ⊗ v, with w = e^decay_log along the key axis.

        Args:
            state: S [B, H, N (key), N (value)] float32.
            r: receptance [R, H, N] float32, like all that follow.
            decay_log: natural logarithm of the decay w.
            first: u [H, N], the bonus of the current token.
            k: key.
            v: value.

        Returns:
            y [R, H, N] and the new S.
        """
        ...

    def mix_lora(self, x: V, delta: V, name: str, inner: V, count: int) -> tuple[V, ...]:
        """x + delta∘(μ_i + inner_i·W_i): `mix` with coefficients that depend on the input, as in RWKV-6.

        Args:
            x: [R, D].
            delta: [R, D].
            name: of the static coefficients ``name`` [count, 1, D] and of W, ``name.w2`` [count, r, D].
            inner: [R, count·r].
            count: how many.
        """
        ...

    def token_matrix(self, x: V, name: str, tokens: V, rank: int) -> V:
        """x times a matrix of each token: row ``tokens`` of the table ``name`` [V, r·r] as [r, r]; [..., R, r]."""
        ...

    def last_row(self, x: V) -> V:
        """The last token's row of each stream: [B, D]."""
        ...
