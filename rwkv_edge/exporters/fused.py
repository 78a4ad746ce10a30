"""The step as a graph of fused nodes: five calls a layer of local functions that kernels can take the place of.

Which nodes a version has is data, `rwkv_edge.plugins.fused_nodes`; their bodies are in one module a version. The graph
takes and gives what the one in plain operators does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import onnx_ir as ir
from onnxscript import GraphBuilder, build_function

from rwkv_edge.errors import InputError
from rwkv_edge.exporters import fused_gated, fused_v7
from rwkv_edge.exporters.fused_tracer import BodyTracer, WideTracer
from rwkv_edge.exporters.layout import WeightLayout
from rwkv_edge.exporters.tracer import FUNCTION_DOMAIN, OPSET, Symbol
from rwkv_edge.plugins.fused_nodes import ACT, EMBEDDING, FUSED_VERSIONS, SCALE, FusedNode, fused_layers
from rwkv_edge.plugins.fused_versions import KERNELS
from rwkv_edge.plugins.spec import Argument
from rwkv_edge.spec import ModelSpec

BODIES: Final[Mapping[str, Mapping[str, Callable[[BodyTracer], dict[str, Symbol]]]]] = {
    "4": fused_gated.BODIES4,
    "5.0": fused_gated.BODIES5,
    "5.1": fused_gated.BODIES5,
    "5.2": fused_gated.BODIES5,
    "6": fused_gated.BODIES6,
    "7": fused_v7.BODIES,
    "7a": fused_v7.BODIES,
}
"""By version and kind of node."""

NORMS: Final = {"att": "ln1", "ffn": "ln2"}
"""The layer norm before each half of a layer."""

_DTYPES: Final = {"float32": ir.DataType.FLOAT, "int32": ir.DataType.INT32}


def check_fused(spec: ModelSpec) -> None:
    """Refuse, before anything is written, a model whose step has no fused nodes.

    Raises:
        InputError: another version.
    """
    if spec.version not in FUSED_VERSIONS:
        known = ", ".join(f"RWKV-{version}" for version in FUSED_VERSIONS)
        raise InputError(
            f"fused nodes exist for {known}, but this is RWKV-{spec.version}; export it with --wkv function or inline"
        )


class FusedTracer(WideTracer):
    """Records the step of a model as calls of fused nodes."""

    def __init__(self, builder: GraphBuilder, spec: ModelSpec, layout: WeightLayout) -> None:
        super().__init__(builder, spec, layout)
        self._layers = fused_layers(spec.version)

    def step(self, spec: ModelSpec, tokens: Symbol, state: Mapping[str, Symbol]) -> tuple[Symbol, dict[str, Symbol]]:
        """One token of every stream; see `rwkv_edge.models.v7.step` for arguments and results."""
        edges = {"tokens": self._cast(tokens, ir.DataType.INT32)}
        after: dict[str, Symbol] = {}
        for layer in range(spec.n_layer):
            edges |= self._rows_of_mix(layer)
            for node in self._layers.of(layer, spec.rescale):
                inputs = [self._input(a.name, node, layer, edges, state) for a in node.inputs]
                for name, value in self._called(node, inputs).items():
                    state_name = _state_name(name, node, layer)
                    if state_name in state:
                        after[state_name] = value
                    else:
                        edges[name] = value
        halves = spec.rescale > 0 and spec.n_layer % spec.rescale == 0
        x = self.summed(edges["stream"], edges["parts"], halves)
        return self.linear(self.layer_norm(x, "ln_out"), "head"), after

    def _rows_of_mix(self, layer: int) -> dict[str, Symbol]:
        """The coefficients that are stored stacked, for kernels that take them one by one: [1, 1, D] each."""
        names = KERNELS[self._spec.version].rows
        if not names:
            return {}
        stacked = self._stored(f"blocks.{layer}.att.mix").value
        parts = self.op.Split(stacked, axis=0, num_outputs=len(names), _outputs=len(names))
        return {f"att.{name}": self.symbol(part) for name, part in zip(names, parts, strict=True)}

    def _input(
        self, name: str, node: FusedNode, layer: int, edges: Mapping[str, Symbol], state: Mapping[str, Symbol]
    ) -> Symbol:
        """A state, an edge, or a weight as it is stored."""
        state_name = _state_name(name, node, layer)
        if state_name in state:
            return state[state_name]
        for edge in (name, f"{node.part}.{name}"):
            if edge in edges:
                return edges[edge]
        return self._stored(_weight_name(name, node, layer))

    def _called(self, node: FusedNode, inputs: Sequence[Symbol]) -> dict[str, Symbol]:
        """The outputs of a call by name, with the types and shapes that the builder cannot infer through a function."""
        if node.name not in self._functions:
            self._functions[node.name] = self._function(node, inputs)
        values = [x.value for x in inputs]
        called = self.builder.call(self._functions[node.name], *values, _outputs=len(node.outputs))
        outputs = called if len(node.outputs) > 1 else (called,)
        producer = outputs[0].producer()
        assert producer is not None  # the call
        producer.attributes.add(ir.AttrString("plugin_namespace", FUNCTION_DOMAIN))  # where TensorRT looks for a plugin
        pairs = zip(node.inputs, inputs, strict=True)
        sizes = {letter: n for a, x in pairs for letter, n in zip(a.axes, _shape(x), strict=True)}
        sizes |= {"1": 1, "S": 1}  # a body gives one partial sum
        for argument, value in zip(node.outputs, outputs, strict=True):
            value.type = ir.TensorType(self._dtype(argument))
            value.shape = ir.Shape(sizes[letter] for letter in argument.axes)
        return {a.name: self.symbol(value) for a, value in zip(node.outputs, outputs, strict=True)}

    def _function(self, node: FusedNode, inputs: Sequence[Symbol]) -> ir.Function:
        """The local function of a node."""
        body = BODIES[self._spec.version][node.kind]

        def trace(op: Any, *values: ir.Value) -> list[ir.Value]:
            given = {a.name: Symbol(value, op) for a, value in zip(node.inputs, values, strict=True)}
            found = body(BodyTracer(op, self._spec, self._layout, given, node.halves))
            outputs = [found[a.name].value for a in node.outputs]
            return [op.Identity(x) if x in outputs[:i] else x for i, x in enumerate(outputs)]

        names = [a.name for a in node.inputs]
        formal = [  # an argument may stand there twice
            ir.Value(name=name if name not in names[:i] else f"{name}.{i}", type=x.value.type, shape=x.value.shape)
            for i, (name, x) in enumerate(zip(names, inputs, strict=True))
        ]
        return build_function(trace, formal, domain=FUNCTION_DOMAIN, name=node.name, opset_imports={"": OPSET})

    def _dtype(self, argument: Argument) -> ir.DataType:
        return self._act if argument.dtype == ACT else _DTYPES[argument.dtype]


def _state_name(name: str, node: FusedNode, layer: int) -> str:
    """'att_shift.3' of 'shift', 'wkv.3' of 'wkv'; what is no state gives a name that no state has."""
    return f"{node.part}_shift.{layer}" if name == "shift" else f"{name}.{layer}"


def _weight_name(name: str, node: FusedNode, layer: int) -> str:
    """In weights.bin; in the place of a scale stands the float matrix itself."""
    name = name.removesuffix(SCALE)
    if name == EMBEDDING:
        return name
    if name.startswith("ln."):
        return f"blocks.{layer}.{NORMS[node.part]}.{name.removeprefix('ln.')}"
    return f"blocks.{layer}.{node.part}.{name}"


def _shape(x: Symbol) -> ir.Shape:
    assert x.value.shape is not None  # weights, states and what a call gave have one
    return x.value.shape
