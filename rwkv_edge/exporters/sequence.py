"""The vocabulary as the graph of a chunk: T tokens of every stream at once, the recurrences in parallel form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder

from rwkv_edge.errors import InputError
from rwkv_edge.exporters.chunks import MAX_TOKENS, Streams7, wkv4_chunk, wkv6_chunk, wkv7_chunk
from rwkv_edge.exporters.layout import WeightLayout
from rwkv_edge.exporters.sequence_functions import wkv4_sequence, wkv5_sequence, wkv6_sequence, wkv7_sequence
from rwkv_edge.exporters.tracer import Symbol, Tracer
from rwkv_edge.spec import ModelSpec


class SequenceTracer(Tracer):
    """Interpreter of `rwkv_edge.models.ops.Ops` that records a graph of ``tokens`` tokens per stream.

    Args:
        builder: see `Tracer`, as for the next two.
        spec: dimensions and precision.
        layout: places of the parameters.
        tokens: T, from 2 to 1024.
        wkv: 'inline' for plain operators, 'function' for a local function ``rwkv::wkvN_sequence``.
        compute: dtype of activations.
        all_logits: keep every row for the head, instead of the last.
    """

    def __init__(
        self,
        builder: GraphBuilder,
        spec: ModelSpec,
        layout: WeightLayout,
        tokens: int,
        wkv: str = "inline",
        compute: str | None = None,
        all_logits: bool = False,
    ) -> None:
        if not 2 <= tokens <= MAX_TOKENS:
            raise InputError(f"a chunk has from 2 to {MAX_TOKENS} tokens, not {tokens}")
        super().__init__(builder, spec, layout, wkv, compute)
        self._tokens = tokens
        self._batch = spec.batch or -1
        self._rows = spec.batch * tokens if spec.batch else -1
        self._all_logits = all_logits

    def mix(self, x: Symbol, delta: Symbol, name: str, count: int) -> tuple[Symbol, ...]:
        """A multiply-add for each coefficient: of many rows, a Split would be one more copy."""
        if count == 1:
            return super().mix(x, delta, name, count)
        parts = self.op.Split(self.param(name).value, axis=0, num_outputs=count, _outputs=count)
        return tuple(x + delta * self.symbol(self.op.Squeeze(part, [0])) for part in parts)

    def token_shift(self, x: Symbol, previous: Symbol) -> tuple[Symbol, Symbol]:
        """The state and all rows but the last; and the last."""
        width = self._spec.n_embd
        streams = self._reshape(x, [self._batch, self._tokens, width]).value
        earlier = self.op.Slice(streams, [0], [self._tokens - 1], [1])
        before = self.op.Concat(self.op.Unsqueeze(previous.value, [1]), earlier, axis=1)
        return self._reshape(self.symbol(before), [self._rows, width]), self._last(streams)

    def last_row(self, x: Symbol) -> Symbol:
        """The last row of each stream, or all rows where all logits are wanted."""
        if self._all_logits:
            return x
        return self._last(self._reshape(x, [self._batch, self._tokens, self._spec.n_embd]).value)

    def wkv4(
        self, state: tuple[Symbol, Symbol, Symbol], decay: Symbol, first: Symbol, k: Symbol, v: Symbol
    ) -> tuple[Symbol, tuple[Symbol, Symbol, Symbol]]:
        """A prefix sum by doubling."""
        shape = [self._batch, self._tokens, self._spec.n_att]
        if self._wkv == "function":
            inputs = [*state, decay, first, *(self._reshape(x, shape) for x in (k, v))]
            names = ("num", "den", "top", "w", "u", "k", "v")
            body = partial(wkv4_sequence, tokens=self._tokens)
            found = self._lowered("wkv4_sequence", body, names, inputs, (5, 0, 1, 2))
            return self._reshape(found[0], [self._rows, self._spec.n_att]), (found[1], found[2], found[3])
        keys, values = (self._reshape(x, shape).value for x in (k, v))
        num, den, top = state
        y, after = wkv4_chunk(
            self.op,
            self._constant,
            (num.value, den.value, top.value),
            decay.value,
            first.value,
            keys,
            values,
            self._tokens,
        )
        rows = self._reshape(self.symbol(y), [self._rows, self._spec.n_att])
        return rows, (self.symbol(after[0]), self.symbol(after[1]), self.symbol(after[2]))

    def wkv5(
        self, state: Symbol, r: Symbol, decay_log: Symbol, first: Symbol, k: Symbol, v: Symbol
    ) -> tuple[Symbol, Symbol]:
        """`wkv6` with the same decay for every token."""
        if self._wkv == "function":
            body = partial(wkv5_sequence, tokens=self._tokens)
            inputs = {"state": state, "r": r, "w": self.exp(decay_log), "u": first, "k": k, "v": v}
            return self._sequence("wkv5_sequence", body, inputs)
        ones = self._constant("wkv5.ones", np.ones((self._tokens, 1)))
        spread = self.op.Mul(self.op.Unsqueeze(decay_log.value, [0, 2]), ones)  # [1, H, T, N]
        return self._chunk56(state, r, spread, first, k, v)

    def wkv6(
        self, state: Symbol, r: Symbol, decay_log: Symbol, first: Symbol, k: Symbol, v: Symbol
    ) -> tuple[Symbol, Symbol]:
        """Decay-masked attention in runs of 16 tokens."""
        if self._wkv == "function":
            body = partial(wkv6_sequence, tokens=self._tokens)
            inputs = {"state": state, "r": r, "w": self.exp(decay_log), "u": first, "k": k, "v": v}
            return self._sequence("wkv6_sequence", body, inputs)
        return self._chunk56(state, r, self._streams(decay_log), first, k, v)

    def _chunk56(
        self, state: Symbol, r: Symbol, decay_log: ir.Value, first: Symbol, k: Symbol, v: Symbol
    ) -> tuple[Symbol, Symbol]:
        bonus = self.op.Unsqueeze(first.value, [1])  # [H, 1, N]
        r_t, k_t, v_t = (self._streams(x) for x in (r, k, v))
        y, after = wkv6_chunk(self.op, self._constant, state.value, r_t, decay_log, bonus, k_t, v_t, self._tokens)
        return self._rows_of(y), self.symbol(after)

    def wkv7(
        self, state: Symbol, r: Symbol, decay_log: Symbol, k: Symbol, v: Symbol, kk: Symbol, a: Symbol
    ) -> tuple[Symbol, Symbol]:
        """The chunk form by masked recursion."""
        if self._wkv == "function":
            body = partial(wkv7_sequence, tokens=self._tokens, head_size=self._spec.head_size)
            inputs = {"state": state, "r": r, "w": self.exp(decay_log), "k": k, "v": v, "kk": kk, "a": a}
            return self._sequence("wkv7_sequence", body, inputs)
        streams = Streams7(*(self._streams(x) for x in (r, decay_log, k, v, kk, a)))
        y, after = wkv7_chunk(self.op, self._constant, state.value, streams, self._tokens, self._spec.head_size)
        return self._rows_of(y), self.symbol(after)

    def _sequence(
        self, name: str, body: Callable[..., tuple[ir.Value, ...]], inputs: Mapping[str, Symbol]
    ) -> tuple[Symbol, Symbol]:
        """A call of a function; rows [R, H, N] become streams [B, T, H, N], which is the same memory."""
        shape = [self._batch, self._tokens, self._spec.n_head, self._spec.head_size]
        rows = ("r", "k", "v", "kk", "a", *(("w",) if name != "wkv5_sequence" else ()))
        values = [self._reshape(x, shape) if argument in rows else x for argument, x in inputs.items()]
        y, after = self._lowered(name, body, tuple(inputs), values, (1, 0))
        return self._reshape(y, [self._rows, *shape[2:]]), after

    def _last(self, streams: ir.Value) -> Symbol:
        """[B, T, D] → [B, D]."""
        last = self.op.Slice(streams, [self._tokens - 1], [self._tokens], [1])
        return self.symbol(self.op.Squeeze(last, [1]))

    def _streams(self, x: Symbol) -> ir.Value:
        """[R, H, N] → [B, H, T, N]."""
        shape = [self._batch, self._tokens, self._spec.n_head, self._spec.head_size]
        streams: ir.Value = self.op.Transpose(self._reshape(x, shape).value, perm=[0, 2, 1, 3])
        return streams

    def _rows_of(self, y: ir.Value) -> Symbol:
        """[B, H, T, N] → [R, H, N]."""
        rows = self.symbol(self.op.Transpose(y, perm=[0, 2, 1, 3]))
        return self._reshape(rows, [self._rows, self._spec.n_head, self._spec.head_size])
