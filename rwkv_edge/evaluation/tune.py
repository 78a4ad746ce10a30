"""The search for the fused kernels' fastest choices: one kernel after another, by the time of whole steps."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_edge.artifact import Artifact
from rwkv_edge.errors import ExportError, FileError, InputError, SessionError
from rwkv_edge.plugins.fused_spec import MAX_BATCH, Choice, Tuning
from rwkv_edge.runtime.cuda import CudaSession

if TYPE_CHECKING:
    from rwkv_edge.runtime.cuda_state import CudaState

TILES = (16, 32, 64, 128)
SPLITS = (1, 2, 4, 8)
THREADS = (128, 256, 512)
AHEAD = (4, 8, 16, 24, 32)
SPLIT_KERNELS = ("time_mix_out", "channel_mix_out")
ORDER = ("channel_mix_out", "channel_mix_in", "time_mix_in", "time_mix_out", "wkv", "head")
"""Those with most bytes first."""

STEPS = 40  # of one measure
TURNS = 3  # measures, of which the shortest counts: others use the GPU too
GAIN = 0.995  # a choice must be faster by half a percent: less is noise
TRIES = 1.05  # what is slower than this is not measured again

Progress = Callable[[str, float], None]
"""Told of the kernel that is being looked at, and the seconds of a step so far."""


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        tuning: the fastest choices.
        before: seconds of a step of one stream with the choices at the start.
        after: with those found.
        tried: number of choices measured.
        seconds: that it took.
    """

    tuning: Tuning
    before: float
    after: float
    tried: int
    seconds: float


def tune(session: CudaSession, seconds: float = 120, progress: Progress | None = None) -> Tuned:
    """Search from the session's choices on; the session has the fastest ones afterwards.

    Args:
        session: of the model, on the GPU that it will run on.
        seconds: after which no further choice is looked at.
        progress: told now and then.

    Raises:
        SessionError: a kernel fails with the choices at the start.
    """
    search = _Search(session, time.perf_counter() + seconds, progress)
    start = time.perf_counter()
    before = search.best
    search.flags()
    for name in ORDER:
        search.kernel(name)
    search.flags()
    if session.chunks:
        search.wide_from()
    session.retune(search.tuning)
    return Tuned(search.tuning, before, search.best, search.tried, time.perf_counter() - start)


def tune_artifact(path: Path, seconds: float, progress: Progress | None = None) -> tuple[Tuned, Path]:
    """Search for an artifact on GPU 0, and keep what is found where sessions look for it.

    Returns:
        What was found, and the file.

    Raises:
        ArtifactError: the artifact is damaged.
        SessionError: no GPU, or the kernels do not run this model.
        FileError: the cache folder cannot be written.
    """
    session = CudaSession(Artifact.open(path))
    try:
        found = tune(session, seconds, progress)
        return found, session.keep_tuning()
    except OSError as error:
        raise FileError(f"the cache folder cannot be written: {error}; set RWKV_EDGE_CACHE") from error
    finally:
        session.close()


class _Search:
    """The best so far."""

    def __init__(self, session: CudaSession, end: float, progress: Progress | None) -> None:
        self._session, self._end, self._progress = session, end, progress
        self._state = session.initial_state()
        self.tuning, self.tried = session.tuning, 0
        self.best = self._measured(session.tuning)

    def kernel(self, name: str) -> None:
        """Tile and split first, then threads and loads in flight."""
        for candidates in (_shapes, _depths):
            if self._progress:
                self._progress(name, self.best)
            choice: Choice = getattr(self.tuning, name)
            self._fastest([self._with(name, c) for c in candidates(name, choice) if c != choice])

    def flags(self) -> None:
        """What is true or false."""
        names = [f.name for f in dataclasses.fields(Tuning) if isinstance(getattr(self.tuning, f.name), bool)]
        self._fastest([self._with(name, not getattr(self.tuning, name)) for name in names])

    def wide_from(self) -> None:
        """The fewest streams from which the wide kernels are faster than a chain of matrix-vector products."""
        if self._progress:
            self._progress("wide_from", self.best)
        found = MAX_BATCH + 1
        for batch in range(MAX_BATCH, 1, -1):
            if time.perf_counter() > self._end:
                return
            state = self._session.initial_state(batch)
            wide, narrow = (self._shortest(self._with("wide_from", n), state) for n in (batch, batch + 1))
            if not wide < GAIN * narrow:
                break
            found = batch
        self.tuning = self._with("wide_from", found)

    def _shortest(self, tuning: Tuning, state: CudaState) -> float:
        self._session.retune(tuning)
        self.tried += 1
        return min(self._session.step_seconds(state, STEPS) for _ in range(TURNS))

    def _with(self, name: str, value: Choice | int) -> Tuning:
        changes: dict[str, Any] = {name: value}
        return replace(self.tuning, **changes)

    def _fastest(self, candidates: list[Tuning]) -> None:
        if time.perf_counter() > self._end:
            return
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            fitting = [c for c, fits in zip(candidates, pool.map(self._compiles, candidates), strict=True) if fits]
        for candidate in fitting:
            if time.perf_counter() > self._end:
                return
            found = self._measured(candidate)
            if found < GAIN * self.best:
                self.best, self.tuning = found, candidate

    def _compiles(self, tuning: Tuning) -> bool:
        try:
            self._session.compile(tuning)
        except (InputError, ExportError):
            return False
        return True

    def _measured(self, tuning: Tuning) -> float:
        """Seconds of a step; infinity where the GPU cannot run it."""
        try:
            self._session.retune(tuning)
            found = self._session.step_seconds(self._state, STEPS)
            if self.tried and found > TRIES * self.best:
                return found
            found = min(found, *(self._session.step_seconds(self._state, STEPS) for _ in range(TURNS - 1)))
        except SessionError:
            if not self.tried:
                raise
            return float("inf")
        finally:
            self.tried += 1
        return found


def _shapes(name: str, choice: Choice) -> Iterator[Choice]:
    for tile in (choice.tile,) if name == "wkv" else TILES:
        for split in SPLITS if name in SPLIT_KERNELS else (1,):
            yield replace(choice, tile=tile, split=split)


def _depths(name: str, choice: Choice) -> Iterator[Choice]:
    for threads in THREADS:
        for ahead in AHEAD:
            yield replace(choice, threads=threads, ahead=ahead)
