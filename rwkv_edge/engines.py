"""What an artifact says of its TensorRT engines, and whether one fits the machine: no TensorRT is imported here.

An engine belongs to one backend in one version, to the GPUs it was built for, and to the weights it was built from.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from rwkv_edge.errors import SessionError


@dataclass(frozen=True)
class Backend:
    """A builder and runtime of engines.

    ``name`` is what the command line and the manifest call it, ``words`` what a sentence does, ``module`` its Python
    module, and ``extra`` the extra of rwkv-edge that installs it.
    """

    name: str
    words: str
    module: str
    extra: str


ENGINE_BACKENDS: Mapping[str, Backend] = {
    "tensorrt": Backend("tensorrt", "TensorRT", "tensorrt", "tensorrt"),
    "tensorrt-rtx": Backend("tensorrt-rtx", "TensorRT for RTX", "tensorrt_rtx", "tensorrt-rtx"),
}
"""In the order in which 'auto' looks for them."""

WKV_CHOICES = ("plugin", "fused", "function", "inline")
"""How a step runs: CUDA kernels in the place of local functions, the bodies of fused nodes, the body of the
recurrence's function, or operators in the graph."""

CANDIDATE_LOGITS, CANDIDATE_TOKENS, CANDIDATE_NORM = "candidates.logits", "candidates.tokens", "candidates.norm"
"""Outputs of an engine with candidates: the K largest logits of each stream, their tokens, and log Σ exp(logits)."""

MOST_CANDIDATES = 3840
"""TensorRT's documentation of ITopKLayer: the largest K."""


@dataclass(frozen=True)
class EngineEntry:
    """One engine of the manifest; size and sha256 are with the other files.

    Attributes:
        file: its name in the artifact: 'step.engine'.
        graph: the ONNX graph that it was built from.
        kind: 'step', 'prefill' or 'score', as the graph's.
        tokens: tokens of each stream that it takes at once.
        batch: most streams that it takes at once; exactly these where the artifact's batch size is fixed.
        backend: a name in `ENGINE_BACKENDS`.
        version: the backend's version in full: '10.13.3.9'.
        targets: the GPUs that it was built for: 'sm86'.
        wkv: one of `WKV_CHOICES`.
        model_hash: the manifest's ``model_hash`` when it was built.
        seconds: how long the build took.
        refit: its weights can be exchanged.
        version_compatible: later versions of the backend's major release run it too.
        sample_k: how many of the largest logits it finds itself; 0 where it gives all only. Absent from manifests that
            were written before there was such a choice.
    """

    file: str
    graph: str
    kind: str
    tokens: int
    batch: int
    backend: str
    version: str
    targets: tuple[str, ...]
    wkv: str
    model_hash: str
    seconds: float
    refit: bool = False
    version_compatible: bool = False
    sample_k: int = 0


def engine_entry(data: Any) -> EngineEntry:
    """The entry that was written to a manifest.

    Raises:
        ValueError: a field is missing, unknown, or has a value that cannot be meant.
    """
    expected = sorted(part.name for part in fields(EngineEntry))
    data = {"sample_k": 0, **data} if isinstance(data, dict) else data
    if not isinstance(data, dict) or sorted(data) != expected:
        raise ValueError(f"an engine should have the fields {', '.join(expected)}, but is {data!r}")
    if not isinstance(data["targets"], list):
        raise ValueError(f"targets is {data['targets']!r}, not a list")
    entry = EngineEntry(**{**data, "targets": tuple(data["targets"])})
    checks: dict[str, bool] = {
        "backend": entry.backend in tuple(ENGINE_BACKENDS),
        "wkv": entry.wkv in WKV_CHOICES,
        "version": isinstance(entry.version, str) and bool(version_numbers(entry.version)),
        "targets": bool(entry.targets) and all(isinstance(x, str) and is_target(x) for x in entry.targets),
        "seconds": isinstance(entry.seconds, (int, float)) and 0 <= entry.seconds < float("inf"),
        "model_hash": isinstance(entry.model_hash, str) and bool(re.fullmatch(r"[0-9a-f]{64}", entry.model_hash)),
    }
    checks |= {name: isinstance(getattr(entry, name), str) for name in ("file", "graph", "kind")}
    checks |= {name: _is_positive(getattr(entry, name)) for name in ("tokens", "batch")}
    checks |= {name: isinstance(getattr(entry, name), bool) for name in ("refit", "version_compatible")}
    checks["sample_k"] = (entry.sample_k == 0 and entry.sample_k is not False) or _is_candidates(entry)
    for name, holds in checks.items():
        if not holds:
            raise ValueError(f"{name} of an engine is {data[name]!r}")
    return entry


def check_engine(
    entry: EngineEntry, model_hash: str, backend: str, version: str, capability: tuple[int, int] | None
) -> None:
    """Refuse an engine that this machine cannot run, before any of it is loaded.

    Args:
        entry: what the manifest says of it.
        model_hash: the manifest's: the weights of the artifact.
        backend: the one that would run it.
        version: that backend's version, as its module says.
        capability: compute capability of the GPU, (8, 6) for sm86; None where there is none.

    Raises:
        SessionError: built from other weights, by another backend or version of it, or for another GPU.
    """
    again = "run 'rwkv-edge build' again"
    if entry.model_hash != model_hash:
        found = f"(sha256 {entry.model_hash[:12]}…, expected {model_hash[:12]}…)"
        raise SessionError(f"{entry.file} was built from other weights {found}; {again}")
    built = ENGINE_BACKENDS[entry.backend].words
    if entry.backend != backend:
        here = ENGINE_BACKENDS[backend].words
        raise SessionError(
            f"{entry.file} was built by {built}, which {here} cannot run; {again} with --backend {backend}"
        )
    if not _runs_in(entry, version):
        raise SessionError(
            f"{entry.file} was built by {built} {entry.version}, but {version} is installed; {again} on this machine"
        )
    if capability is None:
        raise SessionError(f"{entry.file} was built for {_or(entry.targets)}, but no NVIDIA GPU was found here")
    if target_of(capability) not in entry.targets:
        here = target_of(capability)
        raise SessionError(
            f"{entry.file} was built for {_or(entry.targets)}, but this GPU is {here}; {again} with --target {here}"
        )


def version_numbers(version: str) -> tuple[int, ...]:
    """'10.13.3.9' → (10, 13, 3, 9); empty where it does not begin with a number."""
    found = re.match(r"\d{1,9}(\.\d{1,9})*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def target_of(capability: tuple[int, int]) -> str:
    """(8, 6) → 'sm86'."""
    return f"sm{capability[0]}{capability[1]}"


def is_target(text: str) -> bool:
    """Whether ``text`` looks like a target: 'sm86', 'sm120'."""
    return re.fullmatch(r"sm[1-9]\d{1,2}", text) is not None


@functools.cache
def error_log(trt: Any) -> Any:
    """A logger that keeps the sentences of errors in its list ``errors``.

    There is one for all builders and runtimes of a process: TensorRT keeps to the first that it is given.

    Args:
        trt: the module of a backend.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)

    return Log()


def reason_of(log: Any, error: Exception | None = None) -> str:
    """The library's first error without the places in its source, else the exception's words."""
    text = log.errors[0] if log.errors else str(error or "it does not say why")
    return one_line(re.sub(r"^[\w:]+: (?=Error Code)|\[\w+\.\w+:\d+: \w+\] |\s*In \S+ at \S+:\d+", "", text))


def one_line(text: str) -> str:
    """One line of at most 300 characters."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= 300 else line[:299] + "…"


def _runs_in(entry: EngineEntry, version: str) -> bool:
    """The same version to the last number; a later one of the same major release where the engine allows it."""
    built, installed = version_numbers(entry.version), version_numbers(version)
    return built == installed or (entry.version_compatible and built[0] == installed[0] and built <= installed)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _is_candidates(entry: EngineEntry) -> bool:
    return entry.kind == "step" and _is_positive(entry.sample_k) and entry.sample_k <= MOST_CANDIDATES


def _or(names: Collection[str]) -> str:
    return " or ".join(names)
