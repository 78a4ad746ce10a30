"""Ranges of a model's activations over real text: the stateful float graph, window by window."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_edge.artifact import Artifact, sha256_of
from rwkv_edge.calibration.checkpoint import Checkpoint
from rwkv_edge.calibration.collect import Statistics
from rwkv_edge.calibration.fingerprint import fingerprint_of
from rwkv_edge.calibration.hessian import write_hessians
from rwkv_edge.calibration.ranges import METHODS
from rwkv_edge.calibration.record import Calibration
from rwkv_edge.calibration.stream import WindowRunner, float_graph
from rwkv_edge.calibration.taps import Tapped, tapped_graph
from rwkv_edge.calibration.text import Text, WindowOptions, tokens_of, windows_of
from rwkv_edge.errors import CalibrationError, InputError
from rwkv_edge.models.versions import architecture_named
from rwkv_edge.runtime.atomic import check_writable, reason_of, write_whole
from rwkv_edge.runtime.ort_providers import onnxruntime_module
from rwkv_edge.tokenizers import Tokenizer, load_tokenizer, tokenizer_for_vocabulary

LONGEST_CHUNK = 64  # tokens; more would only hold more activations at once
TAPPED_BYTES = 1 << 26  # of activations that one run may give

Progress = Callable[[int], None]
Report = Callable[[str, int], Progress]
"""Called with what will be counted and how many there are; what it returns is told of every few."""


@dataclass(frozen=True)
class CalibrateOptions:
    """What a calibration may choose.

    Attributes:
        windows: which parts of the texts.
        method: of the thresholds; those of all methods are recorded.
        percent: of the method 'percentile'.
        hessian: also write XᵀX/n of every input of linears, for GPTQ: K² float32 each.
        hessian_memory: bytes of them that are held at once; more takes more passes over the text.
        threads: of ONNX Runtime; 0 for automatic.
        every: windows between two checkpoints, from which a killed calibration goes on.
        tokenizer: instead of the artifact's.
    """

    windows: WindowOptions = field(default_factory=WindowOptions)
    method: str = "mse"
    percent: float = 99.99
    hessian: bool = False
    hessian_memory: int = 1 << 28
    threads: int = 0
    every: int = 8
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"the method must be one of {', '.join(METHODS)}, not '{self.method}'")
        if not 50 <= self.percent <= 100:
            raise InputError(f"the percentile must be from 50 to 100, not {self.percent:g}")
        if self.every < 1 or self.hessian_memory < 1:
            raise InputError("windows between checkpoints, and bytes of Hessians, must be at least 1")


def calibrate(
    path: str | Path,
    texts: Sequence[Text],
    target: Path,
    options: CalibrateOptions | None = None,
    report: Report | None = None,
) -> Calibration:
    """Feed windows of the texts to an artifact and write what its activations were.

    Beside ``target``, the statistics of channels are written as ``<stem>.stats.safetensors`` and Hessians as
    ``<stem>.hessian-<n>.safetensors``. A calibration that was killed goes on from its last checkpoint if it is called
    with the same arguments, and gives the same files.

    Args:
        path: a float artifact, fp32 or fp16.
        texts: what to feed.
        target: the JSON file to write.
        options: windows and method.
        report: see `Report`.

    Raises:
        ArtifactError: the artifact is incomplete or damaged.
        CalibrationError: it is quantized or gives NaN, or ``target`` cannot be written.
        InputError: the texts are too short, or options that cannot be meant.
        TokenizerError: the artifact has no tokenizer.
    """
    options = options or CalibrateOptions()
    _check_target(target)
    artifact = Artifact.open(path)
    artifact.check_content()
    entry = float_graph(artifact, (options.windows.warmup, options.windows.length), LONGEST_CHUNK)
    tapped = _tapped(artifact, entry.file, entry.tokens)
    batch = artifact.manifest.spec.batch or 1
    if entry.tokens > 1 and _bytes_of(artifact, tapped, entry.tokens * batch) > TAPPED_BYTES:
        entry = float_graph(artifact, (options.windows.warmup, options.windows.length), LONGEST_CHUNK // 4)
        tapped = _tapped(artifact, entry.file, entry.tokens)
    tokenizer = _tokenizer(artifact, options.tokenizer)
    streams = [tokens_of(text, tokenizer) for text in texts]
    windows = windows_of(streams, options.windows, batch)
    runner = WindowRunner(artifact, tapped.model, entry, options.threads)
    settings = _settings(options, windows, entry.file)
    described = [text.to_json(len(stream)) for text, stream in zip(texts, streams, strict=True)]
    digest = _digest([artifact.manifest.model_hash, settings, described, sha256_of(artifact.path / entry.file)])
    checkpoint = Checkpoint(target, digest)
    try:
        statistics = _collected(runner, tapped, windows, options, checkpoint, report)
        files = _write_statistics(target, statistics, windows)
        if options.hessian:
            files |= write_hessians(target, runner, tapped, windows, options, digest, report)
        found = Calibration(
            path=target,
            model_hash=artifact.manifest.model_hash,
            version=artifact.manifest.spec.version,
            method=options.method,
            settings=settings,
            texts=tuple(described),
            fingerprint=fingerprint_of(text.content.encode("utf-8") for text in texts),
            inputs={name: s.range(tapped.linears[name], options.percent) for name, s in statistics.items()},
            files=files,
        )
        write_whole(target, (json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n").encode())
        checkpoint.remove()
    except OSError as error:
        raise CalibrationError(f"{target} cannot be written: {reason_of(error)}") from error
    return found


def _check_target(target: Path) -> None:
    problem = check_writable(target)
    if problem:
        raise CalibrationError(f"{target} cannot be written: {problem}")


def _tapped(artifact: Artifact, file: str, tokens: int) -> Tapped:
    keep = architecture_named(artifact.manifest.spec.version).keep_float
    return tapped_graph(artifact.path / file, keep, tokens)


def _bytes_of(artifact: Artifact, tapped: Tapped, rows: int) -> int:
    """Activations that one run gives; a linear's input is at most as wide as the feed-forward part."""
    spec = artifact.manifest.spec
    widths = [spec.n_ffn if name.endswith("ffn.value") else max(spec.n_embd, spec.n_att) for name in tapped.taps]
    return sum(widths) * rows * 4


def _tokenizer(artifact: Artifact, name: str | None) -> Tokenizer:
    entry = artifact.manifest.tokenizer
    if name is not None or entry is None:
        return tokenizer_for_vocabulary(artifact.manifest.spec.vocab_size, name)
    return load_tokenizer(artifact.path, entry)


def _settings(options: CalibrateOptions, windows: np.ndarray, graph: str) -> dict[str, Any]:
    return {
        **asdict(options.windows),
        "samples": len(windows),
        "tokens": int(len(windows) * options.windows.length),
        "percent": options.percent,
        "hessian": options.hessian,
        "hessian_memory": options.hessian_memory,
        "threads": options.threads,
        "graph": graph,
        "tools": {"onnxruntime": str(onnxruntime_module().__version__), "numpy": np.__version__},
    }


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _collected(
    runner: WindowRunner,
    tapped: Tapped,
    windows: np.ndarray,
    options: CalibrateOptions,
    checkpoint: Checkpoint,
    report: Report | None,
) -> dict[str, Statistics]:
    """Statistics of every tap over all windows, from the checkpoint on."""
    statistics: dict[str, Statistics] = {}
    done, arrays = checkpoint.read()
    if done:
        statistics = {name: Statistics.restored(name, arrays) for name in tapped.taps}
    update = report("tokens", windows.size) if report else lambda _: None
    update(done * windows.shape[1])
    names = list(tapped.taps)
    outputs = [tapped.taps[name] for name in names]
    groups = math.ceil(len(windows) / runner.batch)
    for group in range(done // runner.batch, groups):
        window = windows[group * runner.batch : (group + 1) * runner.batch]
        for at, values in runner.run(window, outputs):
            if at >= options.windows.warmup:
                for name, value in zip(names, values, strict=True):
                    statistics.setdefault(name, Statistics.empty(value.shape[-1])).add(name, value)
        update(window.size)
        fed = (group + 1) * runner.batch
        if (group + 1) % options.every == 0 and group + 1 < groups:
            checkpoint.write(fed, _merged(s.saved(name) for name, s in statistics.items()))
    return statistics


def _write_statistics(target: Path, statistics: Mapping[str, Statistics], windows: np.ndarray) -> dict[str, str]:
    from safetensors.numpy import save

    arrays = _merged(s.arrays(name) for name, s in statistics.items()) | {"tokens": windows}
    data: bytes = save(arrays)
    name = f"{target.stem}.stats.safetensors"
    write_whole(target.parent / name, data)
    return {name: hashlib.sha256(data).hexdigest()}


def _merged(parts: Any) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for part in parts:
        found |= part
    return found
