"""The graphs of an artifact: one step, and chunks of a prompt, over the same weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnxscript import GraphBuilder

from rwkv_edge.artifact import GraphEntry
from rwkv_edge.errors import ExportError
from rwkv_edge.exporters.fused import FusedTracer
from rwkv_edge.exporters.layout import WeightLayout
from rwkv_edge.exporters.sequence import SequenceTracer
from rwkv_edge.exporters.tracer import DATA_TYPES, FUNCTION_DOMAIN, OPSET, Symbol, Tracer
from rwkv_edge.models.versions import Model

IR_VERSION = 10
SPEC_KEY = "rwkv_edge.spec"


@dataclass(frozen=True)
class GraphForm:
    """Which graph to build.

    Attributes:
        kind: 'step' (one token), 'prefill' (a chunk, logits of its last token) or 'score' (a chunk, all logits).
        tokens: 1, or the length of the chunk.
        wkv: 'inline', 'function', or of a step 'fused'.
        widened: compute in float32 whatever the weights' dtype; inputs and outputs stay the same.
    """

    kind: str = "step"
    tokens: int = 1
    wkv: str = "inline"
    widened: bool = False

    @property
    def file(self) -> str:
        """Its name in the artifact."""
        stem = self.kind if self.kind == "step" else f"{self.kind}-{self.tokens}"
        return f"{stem}.cpu.onnx" if self.widened else f"{stem}.onnx"


def onnx_from_model(model: Model, layout: WeightLayout, form: GraphForm) -> ir.Model:
    """A graph with weights that refer to weights.bin.

    Inputs: ``token`` [B] (``tokens`` [B, T] in chunks) int64 and the state tensors. Outputs: ``logits`` [B, V] float32
    ([B, T, V] with all logits) and the state tensors with the suffix ``.out``.
    """
    spec = model.spec
    graph = ir.Graph(
        [], [], nodes=[], opset_imports={"": OPSET}, name=f"rwkv{spec.version}_{form.kind}".replace(".", "_")
    )
    builder = GraphBuilder(graph)
    tracer = _tracer(builder, model, layout, form)
    batch = spec.batch if spec.batch is not None else "batch"
    tokens = _tokens(tracer, form, batch)
    state = {t.name: tracer.symbol(builder.input(t.name, DATA_TYPES[t.dtype], [batch, *t.shape])) for t in spec.state}
    inner = {name: tracer.act(value) if form.widened else value for name, value in state.items()}
    step = tracer.step if isinstance(tracer, FusedTracer) else partial(model.architecture.step, tracer)
    logits, after = step(spec, tokens, inner)
    shape = [batch, spec.vocab_size]
    if form.kind == "score":
        shape = [batch, form.tokens, spec.vocab_size]
        logits = tracer.symbol(tracer.op.Reshape(logits.value, [spec.batch or -1, form.tokens, spec.vocab_size]))
    _output(tracer, "logits", logits, ir.DataType.FLOAT, shape)
    for t in spec.state:
        _output(tracer, f"{t.name}.out", after[t.name], DATA_TYPES[t.dtype], [batch, *t.shape])
    found = ir.Model(graph, ir_version=IR_VERSION, producer_name="rwkv-edge", producer_version=version("rwkv-edge"))
    for function in builder.functions.values():
        found.functions[function.identifier()] = function
        graph.opset_imports[FUNCTION_DOMAIN] = 1
    found.metadata_props[SPEC_KEY] = json.dumps(spec.to_json())
    for node in graph:
        node.metadata_props.clear()  # the builder's module scopes, which nobody reads
    return found


def write_graph(model: Model, layout: WeightLayout, form: GraphForm, target: str, folder: Path) -> GraphEntry:
    """Build a graph and save it in ``folder``; returns its entry for the manifest."""
    graph = onnx_from_model(model, layout, form)
    ir.save(graph, folder / form.file)
    return GraphEntry(form.file, form.kind, form.tokens, target, len(graph.graph), form.wkv)


def check_graph(path: Path) -> None:
    """Run the full check of `onnx.checker`, shape inference included; the weights must lie beside the graph.

    Raises:
        ExportError: the graph is not valid ONNX.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} fails the ONNX checker: {error}") from error


def _tracer(builder: GraphBuilder, model: Model, layout: WeightLayout, form: GraphForm) -> Tracer:
    compute = "float32" if form.widened else None
    if form.wkv == "fused":
        return FusedTracer(builder, model.spec, layout)
    if form.kind == "step":
        return Tracer(builder, model.spec, layout, form.wkv, compute)
    return SequenceTracer(builder, model.spec, layout, form.tokens, form.wkv, compute, all_logits=form.kind == "score")


def _tokens(tracer: Tracer, form: GraphForm, batch: int | str) -> Symbol:
    """The input, as one row of tokens [R]."""
    if form.kind == "step":
        return tracer.symbol(tracer.builder.input("token", ir.DataType.INT64, [batch]))
    tokens = tracer.builder.input("tokens", ir.DataType.INT64, [batch, form.tokens])
    return tracer.symbol(tracer.op.Reshape(tokens, [-1]))


def _output(tracer: Tracer, name: str, symbol: Symbol, dtype: ir.DataType, shape: list[Any]) -> None:
    value = symbol.value
    if value.dtype != dtype:
        value = tracer.op.Cast(value, to=dtype)
    if value.is_graph_input() or value.is_graph_output():
        value = tracer.op.Identity(value)
    value.type = ir.TensorType(dtype)
    value.shape = ir.Shape(shape)
    tracer.builder.add_output(value, name)
