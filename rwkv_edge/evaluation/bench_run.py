"""The whole of `rwkv-edge bench`: parity first, then the measurements, in turns."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_edge.artifact import Artifact
from rwkv_edge.errors import InputError, MissingDependencyError, VerificationError
from rwkv_edge.evaluation.bench_bandwidth import copy_bandwidth
from rwkv_edge.evaluation.bench_machine import Machine
from rwkv_edge.evaluation.bench_parity import (
    Check,
    Parity,
    near_prediction,
    package_parity,
    self_consistency,
    tolerance_of,
)
from rwkv_edge.evaluation.bench_power import EnergyMeter
from rwkv_edge.evaluation.bench_report import BenchReport, Measured, Turn
from rwkv_edge.evaluation.bench_worker import WARM_STEPS, Contender, Worker
from rwkv_edge.evaluation.roofline import read_bandwidth
from rwkv_edge.runtime.atomic import write_file
from rwkv_edge.runtime.session import checked_batch, open_session

PACKAGE = "rwkv"
"""What `--compare` is called for the `rwkv` package."""

REST = 0.1  # seconds before a measurement: ONNX Runtime's threads spin for 40 ms after a run (measured)
INDEX = "weights.json"


@dataclass(frozen=True)
class BenchOptions:
    """What a benchmark may choose.

    Attributes:
        tokens: steps of a turn.
        batch: streams; None for the artifact's, 1 where it is dynamic.
        prompt: tokens of a prompt.
        runs: turns.
        checkpoint: to compare the artifact with; None to hold it against itself.
        compare: another artifact, or 'rwkv' for the package on ``checkpoint``.
        tolerance: of parity; None by precision.
        backend: of the sessions.
        providers: execution providers of ONNX Runtime.
        threads: compute threads.
        prepack: see `rwkv_edge.runtime.session.open_session`.
    """

    tokens: int = 64
    batch: int | None = None
    prompt: int = 256
    runs: int = 5
    checkpoint: Path | None = None
    compare: str | None = None
    tolerance: float | None = None
    backend: str = "auto"
    providers: Sequence[str] = ()
    threads: int = 0
    prepack: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "prompt", "runs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.compare == PACKAGE and self.checkpoint is None:
            raise InputError("the rwkv package runs the checkpoint, so it must be given; add --checkpoint FILE")


Start = Callable[[str, int], Callable[[int], None]]


def bench(artifact: Path, options: BenchOptions, start: Start | None = None) -> BenchReport:
    """Measure an artifact, and another contender in turns with it.

    Args:
        artifact: the folder.
        options: how.
        start: told of phases and their lengths.

    Raises:
        VerificationError: a contender is not right, so its speed means nothing.
        RwkvEdgeError: an artifact, a checkpoint or a package cannot be used.
    """
    start = start or (lambda label, length: lambda done: None)
    contenders = [(artifact, options.checkpoint)]
    if options.compare == PACKAGE:
        _check_package()
    elif options.compare is not None:
        contenders.append((Path(options.compare), None))
    opened = [Artifact.open(path) for path, _ in contenders]
    batch = _batch(opened[0], options)
    for other in opened[1:]:
        checked_batch(batch, other.manifest.spec)
    if options.compare == PACKAGE and batch != 1:
        raise InputError(f"the rwkv package runs one stream, not {batch}; leave --batch out")
    step = start("parity", len(contenders))
    parities, runs_on = [], []
    for one, (_, checkpoint) in zip(opened, contenders, strict=True):
        parity, numerics = _parity(one, checkpoint, options, batch)
        parities.append(parity)
        runs_on.append(numerics)
        step(1)
    vocabulary = min(one.manifest.spec.vocab_size for one in opened)
    tokens = np.random.default_rng(0).integers(0, vocabulary, (batch, options.prompt))
    return _measure(opened, parities, options, tokens, gpu_of(runs_on[0], options), start)


def _check_package() -> None:
    for name, extra in ((PACKAGE, ""), ("torch", "export")):
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(name, extra, "a comparison with the rwkv package")


def _batch(artifact: Artifact, options: BenchOptions) -> int:
    spec = artifact.manifest.spec
    return spec.batch or 1 if options.batch is None else checked_batch(options.batch, spec)


def _parity(artifact: Artifact, checkpoint: Path | None, options: BenchOptions, batch: int) -> tuple[Parity, str]:
    """Green, or an error; and what the session says that it runs on.

    A checkpoint is compared in single steps, so chunks are held against steps in any case.
    """
    tolerance = tolerance_of(artifact) if options.tolerance is None else options.tolerance
    session = open_session(
        artifact.path, options.backend, list(options.providers), options.threads, prepack=options.prepack
    )
    try:
        numerics = session.numerics
        found = self_consistency(artifact, session, options.prompt, batch, tolerance)
    finally:
        session.close()
    if checkpoint is not None and found.passed:
        found = _against_checkpoint(artifact, checkpoint, options, found)
    return _green(found, str(artifact.path)), numerics


def _against_checkpoint(artifact: Artifact, checkpoint: Path, options: BenchOptions, own: Parity) -> Parity:
    """The checks of both kinds."""
    tolerance = own.tolerance
    try:
        from rwkv_edge.evaluation.verify import verify_artifact
    except ImportError as error:
        raise MissingDependencyError("torch", "export", "parity with a checkpoint") from error
    report = verify_artifact(
        artifact.path,
        checkpoint,
        tolerance=tolerance,
        providers=list(options.providers),
        threads=options.threads,
        backend=options.backend,
    )
    if artifact.manifest.quantization is not None:
        found = [near_prediction(report.kl_mean, "it predicts what the checkpoint does")]
    else:
        state, difference = report.worst_state, report.worst_state_relative
        found = [
            Check("the logits are those of the checkpoint", report.relative, bool(report.relative <= tolerance)),
            Check(f"the state is that of the checkpoint ({state})", difference, bool(difference <= tolerance)),
        ]
    return Parity("checkpoint and self-consistency", report.tokens, tolerance, (*found, *own.checks))


def _green(parity: Parity, name: str) -> Parity:
    if not parity.passed:
        raise VerificationError(
            f"{name} is not right, so its speed means nothing: the check by {parity.method} that '{parity.reason}' "
            f"failed, with a tolerance of {parity.tolerance:g}; export it again"
        )
    return parity


def _measure(
    artifacts: Sequence[Artifact],
    parities: Sequence[Parity],
    options: BenchOptions,
    tokens: np.ndarray,
    gpu: int | None,
    start: Start,
) -> BenchReport:
    machine = Machine(gpu)
    with contextlib.ExitStack() as stack:
        stack.callback(machine.close)
        workers: list[Worker] = []
        found: list[Measured] = []
        for artifact, parity in zip(artifacts, parities, strict=True):
            workers.append(_started(stack, _contender(artifact, options)))
            found.append(_loaded(workers[-1], artifact, parity, tokens, machine)[0])
        if options.compare == PACKAGE:
            workers.append(_started(stack, _package(artifacts[0], options, gpu)))
            found.append(_loaded_package(workers, artifacts[0], options, tokens, machine))
        clocks = {"before": machine.clocks()}
        step = start("turns", options.runs)
        for _ in range(options.runs):
            for worker, measured in zip(workers, found, strict=True):
                measured.turns.append(_turn(worker, options, tokens, gpu))
            step(1)
        clocks["after"] = machine.clocks()
        for worker, measured in zip(workers, found, strict=True):
            measured.joules_per_token = _joules_per_token(worker, measured, tokens, machine.meter)
            measured.peak_host_bytes = worker.peak_bytes()
        return BenchReport(
            contenders=tuple(found),
            prompt=tokens.shape[1],
            tokens=options.tokens,
            batch=len(tokens),
            machine=machine.facts(),
            clocks=clocks,
            energy_source=machine.meter.source if machine.meter else None,
            date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        )


def gpu_of(numerics: str, options: BenchOptions) -> int | None:
    """The number of the GPU that computes, by what a session says of itself; None where the CPU does."""
    if not numerics.startswith("onnxruntime"):
        return 0  # engines and our own kernels run on the first
    from rwkv_edge.runtime.ort_providers import NVIDIA, checked_providers

    provider = checked_providers(list(options.providers))[0]
    return provider.device_id if provider.name in NVIDIA else None


def _contender(artifact: Artifact, options: BenchOptions) -> Contender:
    return Contender(
        "artifact",
        artifact.path,
        backend=options.backend,
        providers=tuple(options.providers),
        threads=options.threads,
        prepack=options.prepack,
    )


def _package(artifact: Artifact, options: BenchOptions, gpu: int | None) -> Contender:
    assert options.checkpoint
    device = f"cuda:{gpu}" if gpu else "cuda"
    strategy = "cpu fp32" if gpu is None else f"{device} {artifact.manifest.spec.precision}"
    version = artifact.manifest.spec.version
    return Contender(PACKAGE, options.checkpoint, version, strategy, threads=options.threads)


def _started(stack: contextlib.ExitStack, contender: Contender) -> Worker:
    worker = Worker(contender)
    stack.callback(worker.close)
    return worker


def _loaded(
    worker: Worker, artifact: Artifact, parity: Parity, tokens: np.ndarray, machine: Machine
) -> tuple[Measured, np.ndarray]:
    """What opening and the first prompt took, and the logits after that."""
    before = machine.nvml.used_bytes() if machine.nvml else None
    with machine.device_memory() as peak:
        opened = worker.load()
        first = worker.prefill(tokens)
        worker.decode(1)
    spec, manifest = artifact.manifest.spec, artifact.manifest
    quantization = manifest.quantization
    package = worker.contender.kind == PACKAGE
    own = " ".join([spec.precision, *([str(quantization["scheme"])] if quantization else [])])
    measured = Measured(
        name=PACKAGE if package else artifact.path.resolve().name,
        runs_on=opened["name"],
        kind=worker.contender.kind,
        precision=worker.contender.strategy.split()[-1] if package else own,
        model_hash=None if package else manifest.model_hash,
        parity=parity,
        load=opened["seconds"],
        first_prefill=first["seconds"],
        host_bytes_before=opened["host_bytes_before"],
        peak_device_bytes=peak[0] - before if peak and before is not None else None,
        bytes_per_step=None if package else bytes_per_step(artifact, len(tokens)),
    )
    return measured, first["logits"]


def _loaded_package(
    workers: Sequence[Worker], artifact: Artifact, options: BenchOptions, tokens: np.ndarray, machine: Machine
) -> Measured:
    """The package, if it gives the logits that the artifact gives."""
    # Each of the two may be off by the tolerance, and in 16 bits each is.
    tolerance = 2 * (tolerance_of(artifact) if options.tolerance is None else options.tolerance)
    none = Parity("artifact", tokens.shape[1], tolerance, ())
    measured, logits = _loaded(workers[-1], artifact, none, tokens, machine)
    expected = workers[0].prefill(tokens)["logits"]
    measured.parity = _green(package_parity(logits, expected, artifact, tolerance, tokens.shape[1]), "the rwkv package")
    return measured


def _turn(worker: Worker, options: BenchOptions, tokens: np.ndarray, gpu: int | None) -> Turn:
    bandwidth = read_bandwidth(options.threads or None, 1) if gpu is None else copy_bandwidth(gpu)
    time.sleep(REST)
    prefill = worker.prefill(tokens)["seconds"]
    return Turn(prefill, worker.decode(options.tokens), bandwidth)


def _joules_per_token(
    worker: Worker, measured: Measured, tokens: np.ndarray, meter: EnergyMeter | None
) -> float | None:
    """Of steps after a prompt, as many as take the time that the meter needs, while the other processes are idle."""
    if meter is None:
        return None
    count = math.ceil(meter.least / statistics.median(measured.latencies))
    worker.prefill(tokens)
    meter.start()
    worker.decode(count)
    joules = meter.stop()
    return None if joules is None else joules / (len(tokens) * (WARM_STEPS + count))


def write_json(figures: dict[str, Any], path: Path) -> None:
    """Write figures as indented JSON, whole or not at all.

    Raises:
        FileError: the file cannot be written.
    """
    write_file(path, (json.dumps(figures, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


def bytes_per_step(artifact: Artifact, batch: int) -> int | None:
    """Bytes that a step must move: all weights but the tables, of which it takes a row for each stream, and the states.

    None for an artifact without its index of weights.
    """
    try:
        entries = json.loads((artifact.path / INDEX).read_bytes())
        sizes = {str(entry["name"]): int(entry["nbytes"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    spec = artifact.manifest.spec
    tables = sum(nbytes for name, nbytes in sizes.items() if "emb" in name)  # emb, and s_emb of RWKV-7a
    rows = tables // spec.vocab_size
    return sum(sizes.values()) - tables + batch * (rows + 2 * spec.state_nbytes)
