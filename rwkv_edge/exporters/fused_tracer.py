"""Interpreters for graphs of fused nodes: everything but products of matrices is float32, as in the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rwkv_edge.exporters.layout import WeightLayout
from rwkv_edge.exporters.tracer import Symbol, Tracer
from rwkv_edge.spec import ModelSpec


class WideTracer(Tracer):
    """`Tracer` whose values are float32: parameters are widened, products take activations and give float32."""

    def param(self, name: str) -> Symbol:
        """A parameter in float32."""
        return self.fp32(self._stored(name))

    def linear(self, x: Symbol, name: str) -> Symbol:
        """MatMul of the activations with the weight as it is stored."""
        return self.fp32(self.symbol(self.op.MatMul(self.act(x).value, self._stored(name).value)))

    def summed(self, stream: Symbol, parts: Symbol) -> Symbol:
        """The residual stream [B, D] and the partial sums [S, B, D] that are still to be added to it."""
        return self.residual(stream, self.symbol(self.op.ReduceSum(parts.value, [0], keepdims=0)))

    def as_parts(self, update: Symbol) -> Symbol:
        """What is to be added to the residual stream [B, D] as one partial sum [1, B, D]."""
        return self.symbol(self.op.Unsqueeze(update.value, [0]))

    def _stored(self, name: str) -> Symbol:
        return super().param(name)


class BodyTracer(WideTracer):
    """`WideTracer` inside a local function, whose parameters are the function's inputs.

    Args:
        op: operators of the function.
        spec: dimensions and precision.
        layout: of the model; a function has no weights of its own.
        given: the function's inputs by name.
    """

    def __init__(self, op: Any, spec: ModelSpec, layout: WeightLayout, given: Mapping[str, Symbol]) -> None:
        super().__init__(op.builder, spec, layout)
        self._given = given

    def embed(self, name: str, tokens: Symbol) -> Symbol:
        """Rows of an input."""
        return self.fp32(self.symbol(self.op.Gather(self._stored(name).value, tokens.value, axis=0)))

    def _stored(self, name: str) -> Symbol:
        return self._given[name]
