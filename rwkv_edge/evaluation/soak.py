"""A long run of the step loop: speed, memory, the size of the state, NaN, and the drift from float64."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rwkv_edge.artifact import Artifact
from rwkv_edge.errors import InputError, StateError
from rwkv_edge.evaluation.memory import resident_bytes
from rwkv_edge.evaluation.soak_reference import Arrays, Reference, ReferenceSource
from rwkv_edge.evaluation.soak_report import (
    SoakPoint,
    SoakReport,
    array_from_points,
    points_from_array,
    rss_growth_mb,
)
from rwkv_edge.runtime.sampling import Sampler, SamplerConfig
from rwkv_edge.runtime.session import Session, open_session
from rwkv_edge.runtime.snapshot import History, Snapshot, check_target, load_snapshot, save_snapshot
from rwkv_edge.tokenizers import Tokenizer, load_tokenizer

TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 5e-2}
"""Largest |difference| of logits and of each state tensor from float64, relative to the largest |reference|."""

LEAST_NORMAL = 2.0**-14  # of float16: tensors below it have no relative precision to speak of there
_REFERENCE = "reference."


class Tokens(Protocol):
    """Where a soak's tokens come from."""

    @property
    def name(self) -> str:
        """What identifies the source."""
        ...

    def begin(self, position: int) -> None:
        """A block starts; what follows may only depend on this position and on the logits."""
        ...

    def token(self, position: int, logits: np.ndarray | None) -> int:
        """The token at a position, given the logits [V] after the one before."""
        ...


class TextTokens:
    """A text, over and over."""

    def __init__(self, ids: Sequence[int]) -> None:
        if not len(ids):
            raise InputError("the text has no tokens to feed")
        self._ids = [int(token) for token in ids]
        digest = hashlib.sha256(np.array(self._ids, np.int64).tobytes()).hexdigest()
        self.name = f"text of {len(self._ids)} tokens, sha256 {digest[:12]}"

    def begin(self, position: int) -> None:
        """Nothing to do."""

    def token(self, position: int, logits: np.ndarray | None) -> int:
        """The text's."""
        return self._ids[position % len(self._ids)]


class SampledTokens:
    """The model's own: drawn from its distribution, by a generator that every block seeds anew."""

    def __init__(self, seed: int, first: int) -> None:
        self._seed, self._first = seed, first
        self.name = f"sampled with seed {seed}"
        self.begin(0)

    def begin(self, position: int) -> None:
        """Seed by the position."""
        seed = int(np.random.SeedSequence([self._seed, position]).generate_state(1)[0])
        self._sampler = Sampler(SamplerConfig(seed=seed))

    def token(self, position: int, logits: np.ndarray | None) -> int:
        """One draw."""
        return self._first if logits is None else self._sampler.sample(logits)


@dataclass
class _Run:
    """What a soak carries from checkpoint to checkpoint."""

    state: Any
    history: History = field(default_factory=History)
    points: list[SoakPoint] = field(default_factory=list)
    number: int = 0
    seconds: float = 0.0
    nonfinite_at: int | None = None
    logits: np.ndarray | None = None
    reference_state: Arrays | None = None


@dataclass(frozen=True)
class SoakOptions:
    """What a soak may choose.

    Attributes:
        tokens: how many, counted from the beginning.
        every: tokens between checkpoints.
        text: to feed over and over; None to feed what the model draws.
        seed: of the draws.
        state: a file that is written at every checkpoint; where it exists, the soak goes on from it.
        reference: weights of a float64 reference; None for no reference.
        tolerance: bound on the drift; None for the precision's.
        providers: execution providers of ONNX Runtime.
        threads: compute threads.
        backend: that runs the artifact.
    """

    tokens: int = 1_000_000
    every: int = 10_000
    text: str | None = None
    seed: int = 0
    state: Path | None = None
    reference: ReferenceSource | None = None
    tolerance: float | None = None
    providers: Sequence[str] = ()
    threads: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("tokens", "every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")


def soak(artifact: str | Path, options: SoakOptions, progress: Callable[[SoakPoint], None] | None = None) -> SoakReport:
    """Feed tokens one at a time and look at everything at checkpoints.

    Speed counts the steps alone, not the checkpoints. The reference is fed the same tokens, in sequences of 256.

    Args:
        artifact: the folder.
        options: how many tokens, which, and what to compare with.
        progress: told of every checkpoint.

    Raises:
        RwkvEdgeError: artifact, text, reference or state file cannot be used.
    """
    opened = Artifact.open(artifact)
    tokens = _tokens(opened, options)
    if options.state:
        check_target(options.state)
    session = open_session(artifact, options.backend, providers=options.providers, threads=options.threads)
    reference = None
    try:
        run = _begin(session, tokens, options)
        if options.reference:
            start = run.reference_state or session.export_state(run.state)
            reference = Reference(options.reference, session.spec, start, options.threads)
        while run.history.tokens < options.tokens and run.nonfinite_at is None:
            _block(session, run, tokens, min(options.every, options.tokens - run.history.tokens), reference)
            if progress:
                progress(run.points[-1])
            if options.state and run.nonfinite_at is None:
                _save(session, run, tokens, options)
        return _report(Path(artifact), session, run, tokens, options)
    finally:
        if reference:
            reference.close()
        session.close()


def _tokens(artifact: Artifact, options: SoakOptions) -> Tokens:
    entry = artifact.manifest.tokenizer
    tokenizer: Tokenizer | None = None
    if entry is not None:
        if entry["file"] is not None:
            artifact.check_content(entry["file"])
        tokenizer = load_tokenizer(artifact.path, entry)
    if options.text is None:
        return SampledTokens(options.seed, min(tokenizer.eos_ids, default=0) if tokenizer else 0)
    if tokenizer is None:
        raise InputError(f"{artifact.path} was exported without a tokenizer, so no text can be fed; leave --text out")
    return TextTokens(tokenizer.encode(options.text))


def _block(session: Session[Any], run: _Run, tokens: Tokens, count: int, reference: Reference | None) -> None:
    """Steps up to the next checkpoint, and the look at it."""
    start = run.history.tokens
    tokens.begin(start)
    fed: list[int] = []
    token = run.history.pending[0] if run.history.pending else tokens.token(start, None)
    began = time.perf_counter()
    while len(fed) < count and run.nonfinite_at is None:
        run.logits = session.step([token], run.state)[0]
        fed.append(token)
        if not np.isfinite(run.logits).all():
            run.nonfinite_at = start + len(fed)
        else:
            token = tokens.token(start + len(fed), run.logits)
    seconds = time.perf_counter() - began
    run.seconds += seconds
    run.history = run.history.after(fed, [token])
    rss = resident_bytes()
    arrays = session.export_state(run.state)
    if run.nonfinite_at is None and not all(np.isfinite(array).all() for array in arrays.values()):
        run.nonfinite_at = run.history.tokens
    largest = {name: float(np.abs(array).max()) for name, array in arrays.items()}
    name = max(largest, key=largest.__getitem__)
    drift = _drift(session, run, arrays, np.array(fed), reference) if reference else ()
    rss_mb = None if rss is None else round(rss / 1e6, 3)
    run.points.append(
        SoakPoint(run.history.tokens, run.number, round(len(fed) / seconds, 1), rss_mb, largest[name], name, *drift)
    )


def _drift(
    session: Session[Any], run: _Run, arrays: Arrays, fed: np.ndarray, reference: Reference
) -> tuple[float, float, str]:
    expected, run.reference_state = reference.feed(fed)
    assert run.logits is not None
    least = LEAST_NORMAL if session.spec.precision == "fp16" else 1e-30
    differences = {name: _relative(arrays[name], array, least) for name, array in run.reference_state.items()}
    worst = max(differences, key=differences.__getitem__)
    return _relative(run.logits, expected, least), differences[worst], worst


def _relative(found: np.ndarray, expected: np.ndarray, least: float) -> float:
    """Largest |difference| over the largest |expected|; NaN counts as infinite."""
    difference = float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), least))
    return difference if np.isfinite(difference) else float("inf")


def _begin(session: Session[Any], tokens: Tokens, options: SoakOptions) -> _Run:
    """From the initial state, or from the file."""
    if options.state is None or not options.state.exists():
        return _Run(session.initial_state(1))
    snapshot = load_snapshot(options.state, session)
    notes = snapshot.notes.get("soak")
    if not isinstance(notes, Mapping) or len(snapshot.streams) != 1:
        raise StateError(f"{options.state} is a snapshot, but not of a soak; give the name of a new file")
    expected = _settings(tokens, options)
    for name, value in expected.items():
        if notes.get(name) != value:
            raise StateError(
                f"{options.state} is of a soak with {name} {notes.get(name)!r}, not {value!r}; "
                "use the same options, or give the name of a new file"
            )
    return _resumed(session, snapshot, notes)


def _resumed(session: Session[Any], snapshot: Snapshot, notes: Mapping[str, Any]) -> _Run:
    points = points_from_array(snapshot.extra["points"], [t.name for t in session.spec.state])
    reference = {n.removeprefix(_REFERENCE): a for n, a in snapshot.extra.items() if n.startswith(_REFERENCE)}
    return _Run(
        session.import_state(snapshot.arrays),
        snapshot.streams[0],
        points,
        number=points[-1].run + 1,
        seconds=float(notes["seconds"]),
        reference_state=reference or None,
    )


def _settings(tokens: Tokens, options: SoakOptions) -> dict[str, Any]:
    return {"source": tokens.name, "every": options.every, "reference": options.reference is not None}


def _save(session: Session[Any], run: _Run, tokens: Tokens, options: SoakOptions) -> None:
    assert options.state
    notes = {**_settings(tokens, options), "seconds": run.seconds}
    extra = {_REFERENCE + name: array for name, array in (run.reference_state or {}).items()}
    extra["points"] = array_from_points(run.points, [t.name for t in session.spec.state])
    save_snapshot(options.state, session, run.state, [run.history], extra=extra, notes={"soak": notes})


def _report(artifact: Path, session: Session[Any], run: _Run, tokens: Tokens, options: SoakOptions) -> SoakReport:
    tolerance = TOLERANCE[session.spec.precision] if options.tolerance is None else options.tolerance
    drift = max(point.drift for point in run.points) if options.reference else None
    return SoakReport(
        artifact=artifact.name,
        version=session.spec.version,
        precision=session.spec.precision,
        tokens=run.history.tokens,
        source=tokens.name,
        reference=options.reference.checkpoint.name if options.reference else None,
        backend=session.numerics,
        tokens_per_second=round(run.history.tokens / run.seconds, 1),
        rss_growth_mb=rss_growth_mb(run.points),
        nonfinite_at=run.nonfinite_at,
        drift=drift,
        tolerance=tolerance,
        passed=run.nonfinite_at is None and (drift is None or drift <= tolerance),
        points=tuple(run.points),
    )
