"""From a checkpoint to an artifact: build the graphs, stream the weights, check, and put the folder in place."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from rwkv_edge.artifact import FileEntry, GraphEntry, Manifest, file_entry, write_manifest
from rwkv_edge.checkpoints import Checkpoint
from rwkv_edge.errors import InputError
from rwkv_edge.exporters.chunks import MAX_TOKENS
from rwkv_edge.exporters.folder import artifact_folder
from rwkv_edge.exporters.fused import check_fused
from rwkv_edge.exporters.graphs import GraphForm, check_graph, write_graph
from rwkv_edge.exporters.initial_state import STATE_FILE, write_initial_state
from rwkv_edge.exporters.layout import INDEX_FILE, WEIGHTS_FILE, WeightLayout, write_index
from rwkv_edge.exporters.weights import Progress, write_weights
from rwkv_edge.models.versions import Model, model_from_checkpoint
from rwkv_edge.spec import PRECISIONS
from rwkv_edge.tokenizers import Tokenizer, save_tokenizer, tokenizer_for_vocabulary

WKV_FORMS = ("inline", "function", "fused")
DEFAULT_CHUNKS = (16, 64, 256)
HEADROOM = 1 << 24  # bytes of graphs, manifest and tokenizer beside the weights


@dataclass(frozen=True)
class ExportOptions:
    """What an export may choose.

    Attributes:
        precision: 'fp32', 'fp16' or 'bf16', of weights and activations; the recurrence stays in float32.
        batch: streams per step; None for a dynamic axis.
        wkv: 'inline' for plain operators, 'function' for the local functions ``rwkv::wkvN_step`` and ``_sequence``,
            'fused' for a step of five local functions a layer (`rwkv_edge.exporters.fused`).
        tokenizer: 'world', 'bytes', 'none', a path to tokenizer.json, or None to choose by the vocabulary size.
        rescale: layers after which the residual stream is halved, 0 for never; None for 6 in fp16 of RWKV-4 to 6.
        state: a tuned state to begin with, or None.
        chunks: lengths of the prefill graphs, each from 2 to 1024.
        all_logits: also write, for the longest chunk, a graph that gives the logits of every token.
    """

    precision: str = "fp32"
    batch: int | None = 1
    wkv: str = "inline"
    tokenizer: str | None = None
    rescale: int | None = None
    state: Path | None = None
    chunks: tuple[int, ...] = DEFAULT_CHUNKS
    all_logits: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, not '{self.precision}'")
        if self.wkv not in WKV_FORMS:
            raise InputError(f"wkv must be one of {', '.join(WKV_FORMS)}, not '{self.wkv}'")
        for chunk in self.chunks:
            if not 2 <= chunk <= MAX_TOKENS:
                raise InputError(f"a chunk must have from 2 to {MAX_TOKENS} tokens, not {chunk}")
        if self.all_logits and not self.chunks:
            raise InputError("all logits are those of a chunk, but there is none; give --chunk 64")


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
        InputError: a fused step was asked for, but the version has no fused nodes.
    """
    options = options or ExportOptions()
    target = Path(target)
    model = model_from_checkpoint(checkpoint, options.precision, options.batch, options.rescale)
    if options.wkv == "fused":
        check_fused(model.spec)
    none = options.tokenizer == "none"
    tokenizer = None if none else tokenizer_for_vocabulary(model.spec.vocab_size, options.tokenizer)
    layout = WeightLayout(model.params, model.spec.act_dtype)
    report = progress(layout.nbytes) if progress else lambda _: None
    with artifact_folder(target, layout.nbytes + HEADROOM) as folder:
        tuned = write_initial_state(model, options.state, folder)
        graphs = [write_graph(model, layout, form, place, folder) for form, place in _forms(options)]
        write_index(layout, folder / INDEX_FILE)
        digest, spoiled = write_weights(layout, checkpoint, folder / WEIGHTS_FILE, report)
        for entry in graphs:
            check_graph(folder / entry.file)
        manifest = _manifest(model, graphs, tokenizer, folder, digest, spoiled, tuned)
        write_manifest(folder, manifest)
    return manifest


def _forms(options: ExportOptions) -> list[tuple[GraphForm, str]]:
    """The graphs of an artifact and what each is for.

    Fused nodes are for steps: chunks beside them are in plain operators. In bfloat16, which ONNX Runtime's CPU provider
    has few operators for, each graph has a widened twin, in plain operators where it is of fused nodes.
    """
    others = "inline" if options.wkv == "fused" else options.wkv
    forms = [GraphForm("step", 1, options.wkv)]
    forms += [GraphForm("prefill", chunk, others) for chunk in sorted(set(options.chunks))]
    if options.all_logits:
        forms.append(GraphForm("score", max(options.chunks), others))
    if options.precision != "bf16":
        return [(form, "any") for form in forms]
    twins = [GraphForm(form.kind, form.tokens, others, widened=True) for form in forms]
    return [(form, "gpu") for form in forms] + [(form, "cpu") for form in twins]


def _manifest(
    model: Model,
    graphs: list[GraphEntry],
    tokenizer: Tokenizer | None,
    folder: Path,
    digest: str,
    spoiled: list[str],
    tuned: bool,
) -> Manifest:
    entry = save_tokenizer(tokenizer, folder) if tokenizer else None
    names = [*(graph.file for graph in graphs), INDEX_FILE]
    names += [STATE_FILE] if tuned else []
    names += [entry["file"]] if entry and entry["file"] else []
    files: dict[str, FileEntry] = {WEIGHTS_FILE: file_entry(folder / WEIGHTS_FILE, digest)}
    files.update((name, file_entry(folder / name)) for name in names)
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
        initial_state=STATE_FILE if tuned else None,
    )


def _source(model: Model) -> Mapping[str, Any]:
    tensors = model.checkpoint.tensors.values()
    return {
        "file": model.checkpoint.path.name,
        "layout": model.checkpoint.layout,
        "parameters": sum(info.numel for info in tensors),
        "dtypes": sorted({info.dtype for info in tensors}),
    }
