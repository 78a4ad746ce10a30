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

    def summed(self, stream: Symbol, parts: Symbol, halves: bool) -> Symbol:
        """The residual stream [B, D] with the partial sums [S, B, D] that are still to be added, perhaps halved."""
        x = self.residual(stream, self.symbol(self.op.ReduceSum(parts.value, [0], keepdims=0)))
        return x * 0.5 if halves else x

    def _stored(self, name: str) -> Symbol:
        return super().param(name)


class BodyTracer(WideTracer):
    """`WideTracer` inside a local function, whose parameters are the function's inputs.

    Args:
        op: operators of the function.
        spec: dimensions and precision.
        layout: of the model; a function has no weights of its own.
        given: the function's inputs by name.
        halves: the residual stream is halved where it is summed.
    """

    def __init__(
        self, op: Any, spec: ModelSpec, layout: WeightLayout, given: Mapping[str, Symbol], halves: bool
    ) -> None:
        super().__init__(op.builder, spec, layout)
        self._given, self._halves = given, halves

    def __contains__(self, name: str) -> bool:
        """Whether the function has such an input."""
        return name in self._given

    def __getitem__(self, name: str) -> Symbol:
        """An input."""
        return self._given[name]

    def size(self, name: str, axis: int) -> int:
        """A dimension of an input that is a weight."""
        shape = self[name].value.shape
        assert shape is not None  # it lies in weights.bin
        return int(shape.numpy()[axis])

    def embed(self, name: str, tokens: Symbol) -> Symbol:
        """Rows of an input."""
        return self.fp32(self.symbol(self.op.Gather(self._stored(name).value, tokens.value, axis=0)))

    def stream(self) -> Symbol:
        """The residual stream: rows of the embedding, or the open sum."""
        if "emb" in self:
            return self.embed("emb", self["tokens"])
        return self.summed(self["stream"], self["parts"], self._halves)

    def normed(self) -> tuple[Symbol, Symbol, dict[str, Symbol]]:
        """The stream's layer norm, what it was a token ago, and the outputs that follow from the two."""
        x = self.stream()
        normed = self.layer_norm(x, "ln")
        return normed, self.fp32(self["shift"]), {"stream": x, "shift": self.act(normed)}

    def by_mix(self, x: Symbol, count: int, rank: int) -> Symbol:
        """[B, count·rank] → [count, B, rank]."""
        return self.symbol(self.op.Transpose(self._reshape(x, [self._rows, count, rank]).value, perm=[1, 0, 2]))

    def split(self, x: Symbol, count: int) -> tuple[Symbol, ...]:
        """[count, B, D] → ``count`` values [1, B, D]."""
        parts = self.op.Split(x.value, axis=0, num_outputs=count, _outputs=count)
        return tuple(self.symbol(part) for part in parts)

    def products(self, mixed: Mapping[str, Symbol]) -> dict[str, Symbol]:
        """Products with the matrices named, of inputs that are rounded once."""
        acted = {id(x): self.act(x) for x in mixed.values()}
        return {name: self.linear(acted[id(x)], name) for name, x in mixed.items()}

    def parts(self, update: Symbol) -> dict[str, Symbol]:
        """What is to be added to the residual stream [B, D], as one partial sum [1, B, D]."""
        return {"parts": self.symbol(self.op.Unsqueeze(update.value, [0]))}

    def output(self) -> dict[str, Symbol]:
        """The product that ends the time mix of every version."""
        return self.parts(self.linear(self["y"], "output"))

    def _stored(self, name: str) -> Symbol:
        return self._given[name]
