"""From a checkpoint to an artifact: build the graphs, stream the weights, check, and put the folder in place."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnxscript import GraphBuilder

from rwkv_edge.artifact import FileEntry, GraphEntry, Manifest, artifact_folder, file_entry, write_manifest
from rwkv_edge.checkpoints import Checkpoint
from rwkv_edge.errors import ExportError, InputError
from rwkv_edge.exporters.layout import WEIGHTS_FILE, WeightLayout
from rwkv_edge.exporters.tracer import DATA_TYPES, FUNCTION_DOMAIN, OPSET, Symbol, Tracer
from rwkv_edge.exporters.weights import Progress, write_weights
from rwkv_edge.models.versions import Model, model_from_checkpoint
from rwkv_edge.spec import PRECISIONS
from rwkv_edge.tokenizers import Tokenizer, save_tokenizer, tokenizer_for_vocabulary

IR_VERSION = 10
SPEC_KEY = "rwkv_edge.spec"
WKV_FORMS = ("inline", "function")
HEADROOM = 1 << 22  # bytes of graphs, manifest and tokenizer beside the weights


@dataclass(frozen=True)
class ExportOptions:
    """What an export may choose.

    Attributes:
        precision: 'fp32', 'fp16' or 'bf16', of weights and activations; the recurrence stays in float32.
        batch: streams per step; None for a dynamic axis.
        wkv: 'inline' for plain operators, 'function' for the local function ``rwkv::wkv7_step``.
        tokenizer: 'world', 'bytes', 'none', a path to tokenizer.json, or None to choose by the vocabulary size.
        rescale: layers after which the residual stream is halved, 0 for never; None for 6 in fp16 of RWKV-4 to 6.
        state: a tuned state to begin with, or None.
    """

    precision: str = "fp32"
    batch: int | None = 1
    wkv: str = "inline"
    tokenizer: str | None = None
    rescale: int | None = None
    state: Path | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, not '{self.precision}'")
        if self.wkv not in WKV_FORMS:
            raise InputError(f"wkv must be one of {', '.join(WKV_FORMS)}, not '{self.wkv}'")


def export_checkpoint(
    checkpoint: Checkpoint,
    target: str | Path,
    options: ExportOptions | None = None,
    progress: Callable[[int], Progress] | None = None,
) -> Manifest:
    """Write the artifact of a checkpoint.

    Args:
        checkpoint: an open checkpoint.
        target: the folder to create; an artifact that stands there is replaced at the end.
        options: precision, batch and form.
        progress: called once with the bytes of weights that will be written; returns the callback that is told of them.

    Returns:
        The manifest as written; its ``warnings`` name tensors that hold NaN.

    Raises:
        CheckpointError: the checkpoint is not a model that can be exported.
        ArtifactError: the target cannot be written.
        ExportError: the graph fails the ONNX checker.
        TokenizerError: no tokenizer fits the vocabulary.
    """
    options = options or ExportOptions()
    target = Path(target)
    model = model_from_checkpoint(checkpoint, options.precision, options.batch, options.rescale)
    none = options.tokenizer == "none"
    tokenizer = None if none else tokenizer_for_vocabulary(model.spec.vocab_size, options.tokenizer)
    layout = WeightLayout(model.params, model.spec.act_dtype)
    report = progress(layout.nbytes) if progress else lambda _: None
    with artifact_folder(target, layout.nbytes + HEADROOM) as folder:
        graphs = _write_graphs(model, layout, options, folder)
        digest, spoiled = write_weights(layout, checkpoint, folder / WEIGHTS_FILE, report)
        for entry in graphs:
            check_graph(folder / entry.file)
        manifest = _manifest(model, graphs, tokenizer, folder, digest, spoiled)
        write_manifest(folder, manifest)
    return manifest


def onnx_from_model(model: Model, layout: WeightLayout, wkv: str, widen: bool = False) -> ir.Model:
    """The step graph, with weights that refer to weights.bin.

    Args:
        model: spec and step.
        layout: places of the parameters.
        wkv: 'inline' or 'function'.
        widen: compute in float32 whatever the weights' dtype; inputs and outputs stay the same.
    """
    spec = model.spec
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=f"rwkv{spec.version}_step")
    builder = GraphBuilder(graph)
    tracer = Tracer(builder, spec, layout, wkv, compute="float32" if widen else None)
    batch = spec.batch if spec.batch is not None else "batch"
    token = tracer.symbol(builder.input("token", ir.DataType.INT64, [batch]))
    state = {t.name: tracer.symbol(builder.input(t.name, DATA_TYPES[t.dtype], [batch, *t.shape])) for t in spec.state}
    inner = {name: tracer.act(value) if widen else value for name, value in state.items()}
    logits, after = model.architecture.step(tracer, spec, token, inner)
    _output(tracer, "logits", logits, ir.DataType.FLOAT, [batch, spec.vocab_size])
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


def check_graph(path: Path) -> None:
    """Run the full check of `onnx.checker`, shape inference included.

    Raises:
        ExportError: the graph is not valid ONNX.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} fails the ONNX checker: {error}") from error


def _output(tracer: Tracer, name: str, symbol: Symbol, dtype: ir.DataType, shape: list[Any]) -> None:
    value = symbol.value
    if value.dtype != dtype:
        value = tracer.op.Cast(value, to=dtype)
    if value.is_graph_input() or value.is_graph_output():
        value = tracer.op.Identity(value)
    value.type = ir.TensorType(dtype)
    value.shape = ir.Shape(shape)
    tracer.builder.add_output(value, name)


def _write_graphs(model: Model, layout: WeightLayout, options: ExportOptions, folder: Path) -> list[GraphEntry]:
    """step.onnx; and for bfloat16, which ONNX Runtime's CPU provider has few operators for, its widened twin."""
    forms = [("step.onnx", "any", False)]
    if options.precision == "bf16":
        forms = [("step.onnx", "gpu", False), ("step.cpu.onnx", "cpu", True)]
    entries = []
    for file, target, widen in forms:
        graph = onnx_from_model(model, layout, options.wkv, widen)
        ir.save(graph, folder / file)
        entries.append(GraphEntry(file, "step", 1, target, len(graph.graph), options.wkv))
    return entries


def _manifest(
    model: Model, graphs: list[GraphEntry], tokenizer: Tokenizer | None, folder: Path, digest: str, spoiled: list[str]
) -> Manifest:
    entry = save_tokenizer(tokenizer, folder) if tokenizer else None
    files: dict[str, FileEntry] = {WEIGHTS_FILE: file_entry(folder / WEIGHTS_FILE, digest)}
    for name in [*(graph.file for graph in graphs), *([entry["file"]] if entry and entry["file"] else [])]:
        files[name] = file_entry(folder / name)
    warnings = [f"NaN or infinity in {', '.join(sorted(set(spoiled)))}"] if spoiled else []
    return Manifest(
        spec=model.spec,
        graphs=tuple(graphs),
        files=files,
        tokenizer=entry,
        model_hash=digest,
        source=_source(model),
        tools={"rwkv-edge": version("rwkv-edge"), "onnx": onnx.__version__, "python": platform.python_version()},
        warnings=tuple(warnings),
    )


def _source(model: Model) -> Mapping[str, Any]:
    tensors = model.checkpoint.tensors.values()
    return {
        "file": model.checkpoint.path.name,
        "layout": model.checkpoint.layout,
        "parameters": sum(info.numel for info in tensors),
        "dtypes": sorted({info.dtype for info in tensors}),
    }
