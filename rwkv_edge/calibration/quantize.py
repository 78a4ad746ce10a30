"""From a float artifact and a calibration to a quantized artifact: plan, weights, graphs, manifest."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from rwkv_edge.artifact import WEIGHTS, Artifact, FileEntry, GraphEntry, Manifest, file_entry, sha256_of, write_manifest
from rwkv_edge.calibration.pieces import QuantizedWeight, placed, quantized_weights, rounded_weight
from rwkv_edge.calibration.record import Calibration, load_calibration
from rwkv_edge.calibration.schemes import SchemeOptions, planned_formats
from rwkv_edge.calibration.smoothing import smooth
from rwkv_edge.calibration.source import INDEX, FloatWeights, Place
from rwkv_edge.calibration.stream import float_graph
from rwkv_edge.calibration.surgery import Surgeon
from rwkv_edge.calibration.taps import import_graph, linear_nodes
from rwkv_edge.errors import CalibrationError, ExportError
from rwkv_edge.exporters.folder import artifact_folder
from rwkv_edge.exporters.weights import Progress, Sink
from rwkv_edge.models.versions import architecture_named

CALIBRATION_FILE = "calibration.json"
HEADROOM = 1 << 24  # bytes of graphs, manifest and tokenizer beside the weights
DEFAULT_STRENGTH = 0.5  # of smoothing: the paper's


@dataclass(frozen=True)
class QuantizeOptions:
    """What a quantization may choose.

    Attributes:
        scheme: which linear gets which format.
        smoothing: strength from 0 (none) to 1; only inputs of w8a8 linears profit.
        formats: of linears, in place of the scheme's; from `rwkv_edge.calibration.mixed`.
        notes: what the manifest shall say beside, as JSON values.
    """

    scheme: SchemeOptions = field(default_factory=SchemeOptions)
    smoothing: float = DEFAULT_STRENGTH
    formats: Mapping[str, str] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def quantize_artifact(
    path: str | Path,
    target: str | Path,
    options: QuantizeOptions | None = None,
    calibration: Path | None = None,
    progress: Callable[[int], Progress] | None = None,
) -> Manifest:
    """Write the quantized form of a float artifact; the folder appears when it is complete and checked.

    Weights pass one at a time: memory stays near the largest.

    Args:
        path: the float artifact, fp32 or fp16.
        target: the folder to create; an artifact that stands there is replaced.
        options: the scheme.
        calibration: what `calibrate` wrote for this artifact: needed for static activations, and for w8 and w4 the
            importance of each input; with Hessians, w4 is rounded by GPTQ.
        progress: as of `export_checkpoint`.

    Returns:
        The manifest as written.

    Raises:
        ArtifactError: the artifact is damaged, or the target cannot be written.
        CalibrationError: the artifact is quantized or holds NaN, or the calibration is missing, damaged or of another
            model.
        ExportError: a graph fails the ONNX checker.
    """
    options = options or QuantizeOptions()
    artifact = Artifact.open(path)
    float_graph(artifact, (), 0)  # refuses what is quantized, and bf16
    found = checked_calibration(calibration, artifact, options.scheme.scheme)
    artifact.check_content()
    plan = _Plan(artifact, options, found)
    with artifact_folder(Path(target), plan.nbytes + HEADROOM) as folder:
        digest = plan.write_weights(folder, progress(plan.nbytes) if progress else lambda _: None)
        graphs = plan.write_graphs(folder)
        manifest = plan.manifest(folder, graphs, digest)
        write_manifest(folder, manifest)
    return manifest


def checked_calibration(path: Path | None, artifact: Artifact, scheme: str) -> Calibration | None:
    """The calibration, if it is one of this artifact.

    Raises:
        CalibrationError: it is not, or there is none where the scheme needs one.
    """
    if path is None:
        if scheme in ("w8a8", "mixed"):
            raise CalibrationError(f"the scheme {scheme} needs a calibration; run 'rwkv-edge calibrate' first")
        return None
    found = load_calibration(path)
    if found.model_hash != artifact.manifest.model_hash:
        raise CalibrationError(
            f"{path} was made with another model: its weights have sha256 {found.model_hash[:12]}…, those of "
            f"{artifact.path} {artifact.manifest.model_hash[:12]}…; calibrate this artifact"
        )
    found.check_files()
    return found


def linears_of(artifact: Artifact) -> dict[str, tuple[int, int]]:
    """Every linear of the step, [in, out], in its order."""
    graph = import_graph(artifact.path / artifact.graph("step", "cpu").file)
    return {name: _pair(node.inputs[1].shape) for name, node in linear_nodes(graph).items()}


def _pair(shape: Any) -> tuple[int, int]:
    return int(shape[0]), int(shape[1])


class _Plan:
    """Everything that is decided before a byte is written."""

    def __init__(self, artifact: Artifact, options: QuantizeOptions, calibration: Calibration | None) -> None:
        self._artifact, self._options, self._calibration = artifact, options, calibration
        manifest, scheme = artifact.manifest, options.scheme
        architecture = architecture_named(manifest.spec.version)
        self._weights = FloatWeights.open(artifact)
        self.formats = dict(options.formats or planned_formats(linears_of(artifact), architecture, scheme))
        self._inputs: dict[str, np.ndarray] = {}
        self._states: dict[str, np.ndarray] = {}
        if calibration is not None and options.smoothing > 0:
            self._inputs, self._states = smooth(
                self._weights, self.formats, architecture.smoothing, calibration, manifest.spec, options.smoothing
            )
        self._quantized = quantized_weights(
            self._weights.places, self.formats, scheme.block, scheme.embedding, manifest.spec.act_dtype, scheme.target
        )
        self.places, self.nbytes = placed(self._weights.places, self._quantized)

    def write_weights(self, folder: Path, report: Progress) -> str:
        """Stream weights.bin; returns its sha256."""
        lines = [json.dumps(_entry(place)) for place in self.places.values()]
        (folder / INDEX).write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
        sink = Sink(folder / WEIGHTS)
        position = 0
        try:
            for name in self._weights.places:
                for piece, array in self._arrays(name):
                    place = self.places[piece]
                    block = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                    if len(block) != place.nbytes:
                        raise RuntimeError(f"'{piece}' has {len(block)} bytes, its place {place.nbytes}")
                    sink.put(bytes(place.offset - position))
                    sink.put(memoryview(block))  # type: ignore[arg-type, unused-ignore]
                    report(place.nbytes)
                    position = place.offset + place.nbytes
        finally:
            digest = sink.close()
        return digest

    def _arrays(self, name: str) -> list[tuple[str, np.ndarray]]:
        quantized = self._quantized.get(name)
        if quantized is None:
            return [(name, self._weights.stored(name))]
        found = rounded_weight(self._weights, quantized, self._calibration, self._inputs)
        arrays = quantized.arrays(found, self._input_scale(quantized))
        return [(piece.name, array) for piece, array in zip(quantized.pieces(), arrays, strict=True)]

    def _input_scale(self, quantized: QuantizedWeight) -> float | None:
        if quantized.form != "w8a8":
            return None
        assert self._calibration is not None
        return input_threshold(self._calibration, quantized.name, self._inputs) / 127

    def write_graphs(self, folder: Path) -> list[GraphEntry]:
        """Rewrite every graph, and check it."""
        surgeon = Surgeon(self._quantized, self.places, self._facts())
        entries = []
        for entry in self._artifact.manifest.graphs:
            nodes = surgeon.rewrite(self._artifact.path / entry.file, folder / entry.file)
            entries.append(replace(entry, nodes=nodes))
        for entry in entries:
            _check(folder / entry.file, full=self._options.scheme.target == "any")
        return entries

    def _facts(self) -> dict[str, Any]:
        """What manifest and graphs say about the quantization, but for the formats."""
        scheme, calibration = self._options.scheme, self._calibration
        weights = "GPTQ" if calibration and calibration.has_hessians else "nearest, scales of least square error"
        return {
            "scheme": scheme.scheme,
            "target": scheme.target,
            "block": scheme.block,
            "head": self.formats.get("head", "float"),
            "embedding": scheme.embedding,
            "smoothed": len(self._inputs),
            "int4_rounding": weights,
            "method": calibration.method if calibration else None,
            "calibration": None if calibration is None else sha256_of(calibration.path),
            "texts": [dict(text) for text in calibration.texts] if calibration else [],
            "source_model_hash": self._artifact.manifest.model_hash,
            **self._options.notes,
        }

    def manifest(self, folder: Path, graphs: list[GraphEntry], digest: str) -> Manifest:
        """Copy what stays, and describe everything."""
        former = self._artifact.manifest
        names = [INDEX, *(graph.file for graph in graphs)]
        tokenizer = former.tokenizer["file"] if former.tokenizer else None
        if tokenizer:
            shutil.copyfile(self._artifact.path / tokenizer, folder / tokenizer)
            names.append(tokenizer)
        if former.initial_state:
            self._copy_state(former.initial_state, folder)
            names.append(former.initial_state)
        if self._calibration is not None:
            shutil.copyfile(self._calibration.path, folder / CALIBRATION_FILE)
            names.append(CALIBRATION_FILE)
        files: dict[str, FileEntry] = {WEIGHTS: file_entry(folder / WEIGHTS, digest)}
        files.update((name, file_entry(folder / name)) for name in names)
        return replace(
            former,
            graphs=tuple(graphs),
            files=files,
            model_hash=digest,
            tools={**former.tools, "rwkv-edge": version("rwkv-edge"), "onnx": onnx.__version__},
            engines=(),
            quantization={**self._facts(), "formats": self.formats},
        )

    def _copy_state(self, name: str, folder: Path) -> None:
        """The tuned state, its token shifts divided like the norms that they come from."""
        from safetensors.numpy import load_file, save_file

        arrays = load_file(self._artifact.path / name)
        for state, factor in self._states.items():
            if state in arrays:
                arrays[state] = arrays[state] / factor
        save_file(arrays, folder / name)


def input_threshold(calibration: Calibration, linear: str, inputs: Mapping[str, np.ndarray]) -> float:
    """The largest magnitude of the input of a linear that 8 bits reach, after smoothing.

    Of a smoothed input the peaks of channels are known, not the distribution: it is clipped by the same part as before.
    """
    source = calibration.input_of(linear)
    found, entry = calibration.threshold(linear), calibration.inputs[source]
    if linear in inputs:
        peak = entry.thresholds["minmax"]
        smoothed = float((calibration.statistic("peak", source) / inputs[linear]).max())
        found = smoothed * (found / peak if peak else 1.0)
    return found or 1.0  # an input that was always 0


def summary(manifest: Manifest) -> str:
    """'w8a8: 46 linears w8a8, 25 float', for a line on a terminal."""
    assert manifest.quantization is not None
    counts = Counter(manifest.quantization["formats"].values())
    parts = ", ".join(f"{count} {form}" for form, count in counts.most_common())
    return f"{manifest.quantization['scheme']}: linears {parts}"


def _entry(place: Place) -> dict[str, Any]:
    return {
        "name": place.name, "dtype": place.dtype, "shape": list(place.shape), "offset": place.offset,
        "nbytes": place.nbytes,
    }  # fmt: skip


def _check(path: Path, full: bool) -> None:
    """The ONNX checker; shapes too where all operators are ONNX's."""
    try:
        onnx.checker.check_model(str(path), full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} fails the ONNX checker: {error}") from error
