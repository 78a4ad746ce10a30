"""The vocabulary as an ONNX graph: symbolic values that record nodes.

The forms chosen here are measured (ONNX Runtime on CPU): residual additions are `Sum`, which no optimizer fuses into a
Gemm that unpacks its weight at every step; the recurrence is a rank-2 update; token-shift mixes are one multiply-add
and a `Split`; group norm is LayerNormalization over each head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder, build_function

from rwkv_edge.exporters.layout import WeightLayout
from rwkv_edge.exporters.recurrences import wkv4_step, wkv6_step, wkv7_step
from rwkv_edge.spec import ModelSpec

OPSET = 21
FUNCTION_DOMAIN = "rwkv"

DATA_TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
}


@dataclass(frozen=True)
class Symbol:
    """A value of the graph that arithmetic operators extend by nodes; floats become constants of the same dtype."""

    value: ir.Value
    op: Any  # onnxscript's OpBuilder makes its methods from operator names

    def __add__(self, other: Symbol | float) -> Symbol:
        return self._node("Add", self, other)

    def __radd__(self, other: float) -> Symbol:
        return self._node("Add", other, self)

    def __sub__(self, other: Symbol | float) -> Symbol:
        return self._node("Sub", self, other)

    def __rsub__(self, other: float) -> Symbol:
        return self._node("Sub", other, self)

    def __mul__(self, other: Symbol | float) -> Symbol:
        return self._node("Mul", self, other)

    def __rmul__(self, other: float) -> Symbol:
        return self._node("Mul", other, self)

    def __truediv__(self, other: Symbol | float) -> Symbol:
        return self._node("Div", self, other)

    def __neg__(self) -> Symbol:
        return self._node("Neg", self)

    def _node(self, op_type: str, *inputs: Symbol | float) -> Symbol:
        values = [x.value if isinstance(x, Symbol) else x for x in inputs]
        return Symbol(getattr(self.op, op_type)(*values), self.op)


class Tracer:
    """Interpreter of `rwkv_edge.models.ops.Ops` that records a graph of one token per stream.

    Args:
        builder: where nodes go.
        spec: dimensions and precision.
        layout: where each parameter lies in the weight file.
        wkv: 'inline' for plain operators, 'function' for a local function of the domain ``rwkv``.
        compute: dtype of activations; the spec's, or 'float32' to widen every weight where it is used.
    """

    def __init__(
        self,
        builder: GraphBuilder,
        spec: ModelSpec,
        layout: WeightLayout,
        wkv: str = "inline",
        compute: str | None = None,
    ) -> None:
        self.builder = builder
        self.op: Any = builder.op
        self._spec = spec
        self._layout = layout
        self._wkv = wkv
        self._act = DATA_TYPES[compute or spec.act_dtype]
        self._rows = spec.batch or -1
        self._params: dict[str, Symbol] = {}
        self._functions: dict[str, ir.Function] = {}

    def symbol(self, value: ir.Value) -> Symbol:
        """Wrap a value of the graph."""
        return Symbol(value, self.op)

    def param(self, name: str) -> Symbol:
        """See `Ops.param`, as for all that follows."""
        if name not in self._params:
            tensor = self._layout.external(name)
            stored = self.symbol(self.builder.initializer(tensor, name=name))
            widened = tensor.dtype == DATA_TYPES[self._spec.act_dtype] != self._act
            self._params[name] = self._cast(stored, self._act) if widened else stored
        return self._params[name]

    def embed(self, name: str, tokens: Symbol) -> Symbol:
        """Gather rows, then widen them if they must be: never the whole table."""
        table = self.builder.initializer(self._layout.external(name), name=name)
        return self._cast(self.symbol(self.op.Gather(table, tokens.value, axis=0)), self._act)

    def linear(self, x: Symbol, name: str) -> Symbol:
        """MatMul with a weight stored [in, out]."""
        return self.symbol(self.op.MatMul(x.value, self.param(name).value))

    def layer_norm(self, x: Symbol, name: str) -> Symbol:
        """LayerNormalization over the last axis."""
        weight, bias = self.param(f"{name}.weight").value, self.param(f"{name}.bias").value
        return self.symbol(self.op.LayerNormalization(x.value, weight, bias, axis=-1, epsilon=1e-5))

    def residual(self, x: Symbol, update: Symbol) -> Symbol:
        """Sum, not Add: see the module's docstring."""
        return self.symbol(self.op.Sum(x.value, update.value))

    def token_shift(self, x: Symbol, previous: Symbol) -> tuple[Symbol, Symbol]:
        """One token: what came before is the state, and the state becomes x."""
        return previous, x

    def mix(self, x: Symbol, delta: Symbol, name: str, count: int) -> tuple[Symbol, ...]:
        """One multiply-add for all coefficients, then Split."""
        mixed = x + delta * self.param(name)
        if count == 1:
            return (mixed,)
        parts = self.op.Split(mixed.value, axis=0, num_outputs=count, _outputs=count)
        return tuple(self.symbol(part) for part in parts)

    def heads(self, x: Symbol) -> Symbol:
        """Reshape to [R, H, N]."""
        return self._reshape(x, [self._rows, self._spec.n_head, self._spec.head_size])

    def merge_heads(self, x: Symbol) -> Symbol:
        """Reshape to [R, D]."""
        return self._reshape(x, [self._rows, self._spec.n_att])

    def fp32(self, x: Symbol) -> Symbol:
        """Cast, or nothing."""
        return self._cast(x, ir.DataType.FLOAT)

    def act(self, x: Symbol) -> Symbol:
        """Cast, or nothing."""
        return self._cast(x, self._act)

    def sigmoid(self, x: Symbol) -> Symbol:
        """Sigmoid."""
        return self.symbol(self.op.Sigmoid(x.value))

    def tanh(self, x: Symbol) -> Symbol:
        """Tanh."""
        return self.symbol(self.op.Tanh(x.value))

    def exp(self, x: Symbol) -> Symbol:
        """Exp."""
        return self.symbol(self.op.Exp(x.value))

    def relu_squared(self, x: Symbol) -> Symbol:
        """Relu, times itself."""
        positive = self.symbol(self.op.Relu(x.value))
        return positive * positive

    def normalize(self, x: Symbol) -> Symbol:
        """Div by the norm, which is at least 1e-12."""
        norm = self.op.ReduceL2(x.value, [-1], keepdims=1)
        return self.symbol(self.op.Div(x.value, self.op.Max(norm, 1e-12)))

    def head_norm(self, x: Symbol, eps: float) -> Symbol:
        """LayerNormalization over each head, with a scale of ones."""
        ones = self._constant("head_norm.ones", np.ones(self._spec.head_size))
        return self.symbol(self.op.LayerNormalization(x.value, ones, axis=-1, epsilon=eps))

    def head_sum(self, x: Symbol) -> Symbol:
        """ReduceSum over N."""
        return self.symbol(self.op.ReduceSum(x.value, [-1], keepdims=1))

    def wkv4(
        self, state: tuple[Symbol, Symbol, Symbol], decay: Symbol, first: Symbol, k: Symbol, v: Symbol
    ) -> tuple[Symbol, tuple[Symbol, Symbol, Symbol]]:
        """One token of the recurrence."""
        names = ("num", "den", "top", "w", "u", "k", "v")
        y, num, den, top = self._lowered("wkv4_step", wkv4_step, names, [*state, decay, first, k, v], (5, 0, 1, 2))
        return y, (num, den, top)

    def wkv5(
        self, state: Symbol, r: Symbol, decay_log: Symbol, first: Symbol, k: Symbol, v: Symbol
    ) -> tuple[Symbol, Symbol]:
        """One token of the recurrence."""
        return self._wkv56("wkv5_step", state, r, decay_log, first, k, v)

    def wkv6(
        self, state: Symbol, r: Symbol, decay_log: Symbol, first: Symbol, k: Symbol, v: Symbol
    ) -> tuple[Symbol, Symbol]:
        """One token of the recurrence."""
        return self._wkv56("wkv6_step", state, r, decay_log, first, k, v)

    def _wkv56(
        self, name: str, state: Symbol, r: Symbol, decay_log: Symbol, first: Symbol, k: Symbol, v: Symbol
    ) -> tuple[Symbol, Symbol]:
        inputs = [state, r, self.exp(decay_log), first, k, v]
        y, after = self._lowered(name, wkv6_step, ("S", "r", "w", "u", "k", "v"), inputs, (1, 0))
        return y, after

    def wkv7(
        self, state: Symbol, r: Symbol, decay_log: Symbol, k: Symbol, v: Symbol, kk: Symbol, a: Symbol
    ) -> tuple[Symbol, Symbol]:
        """One token of the recurrence."""
        inputs = [state, r, self.exp(decay_log), k, v, kk, a]
        y, after = self._lowered("wkv7_step", wkv7_step, ("S", "r", "w", "k", "v", "kk", "a"), inputs, (1, 0))
        return y, after

    def mix_lora(self, x: Symbol, delta: Symbol, name: str, inner: Symbol, count: int) -> tuple[Symbol, ...]:
        """One batched MatMul for all second halves, one multiply-add, then Split."""
        rank = self._layout.placed[f"{name}.w2"].param.shape[1]
        parts = self.op.Transpose(self._reshape(inner, [self._rows, count, rank]).value, perm=[1, 0, 2])
        added = self.symbol(self.op.MatMul(parts, self.param(f"{name}.w2").value))
        mixed = x + delta * (added + self.param(name))
        split = self.op.Split(mixed.value, axis=0, num_outputs=count, _outputs=count)
        return tuple(self.symbol(part) for part in split)

    def token_matrix(self, x: Symbol, name: str, tokens: Symbol, rank: int) -> Symbol:
        """Gather, and one batched MatMul."""
        matrices = self._reshape(self.embed(name, tokens), [self._rows, rank, rank])
        rows = self._reshape(x, [self._rows, 1, rank])
        return self._reshape(self.symbol(self.op.MatMul(rows.value, matrices.value)), [self._rows, rank])

    def last_row(self, x: Symbol) -> Symbol:
        """One token: x itself."""
        return x

    def _lowered(
        self,
        name: str,
        body: Callable[..., tuple[ir.Value, ...]],
        arguments: Sequence[str],
        inputs: Sequence[Symbol],
        like: Sequence[int],
    ) -> tuple[Symbol, ...]:
        """``body`` in place, or as a call of a local function that holds it.

        ``like`` says of each output which input has its type and shape: the builder cannot infer through a function.
        """
        values = [x.value for x in inputs]
        if self._wkv == "inline":
            return tuple(self.symbol(value) for value in body(self.op, *values))
        if name not in self._functions:
            formal = [
                ir.Value(name=argument, type=value.type, shape=value.shape)
                for argument, value in zip(arguments, values, strict=True)
            ]
            self._functions[name] = build_function(
                body, formal, domain=FUNCTION_DOMAIN, name=name, opset_imports={"": OPSET}
            )
        outputs = self.builder.call(self._functions[name], *values, _outputs=len(like))
        producer = outputs[0].producer()
        assert producer is not None  # the call
        producer.attributes.add(ir.AttrString("plugin_namespace", FUNCTION_DOMAIN))  # where TensorRT looks for a plugin
        for value, index in zip(outputs, like, strict=True):
            value.type, value.shape = values[index].type, values[index].shape
        return tuple(self.symbol(value) for value in outputs)

    def _cast(self, x: Symbol, dtype: ir.DataType) -> Symbol:
        return x if x.value.dtype == dtype else self.symbol(self.op.Cast(x.value, to=dtype))

    def _reshape(self, x: Symbol, shape: list[int]) -> Symbol:
        return self.symbol(self.op.Reshape(x.value, shape))

    def _constant(self, name: str, value: np.ndarray) -> ir.Value:
        """A small float32 initializer inside the graph, made once."""
        if name not in self._params:
            tensor = ir.tensor(value.astype(np.float32), name=name)
            self._params[name] = self.symbol(self.builder.initializer(tensor, name=name))
        return self._params[name].value
