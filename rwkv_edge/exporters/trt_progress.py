"""How far a build is, and Ctrl-C while the library works: nothing may be raised through its callbacks."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """The part that is done of nested phases, from 0 to 1, never smaller than before."""

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self._most = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins, inside ``parent`` or, for None, as the outermost."""
        self._phases[name] = _Phase(parent, max(steps, 1))

    def step(self, name: str, index: int) -> None:
        """Step ``index`` of a phase is done."""
        if name in self._phases:
            self._phases[name].done = index + 1

    def finish(self, name: str) -> None:
        """A phase is over."""
        found = self._phases.pop(name, None)
        if found is not None and found.parent is None:
            self._most = 1.0

    def fraction(self) -> float:
        """The part that is done."""
        roots = [name for name, phase in self._phases.items() if phase.parent is None]
        self._most = max([self._most, *map(self._share, roots)])
        return self._most

    def _share(self, name: str) -> float:
        phase = self._phases[name]
        inner = max((self._share(child) for child, x in self._phases.items() if x.parent == name), default=0.0)
        return min(1.0, (phase.done + inner) / phase.steps)


def monitor(trt: Any, report: Callable[[float], None], interrupted: Callable[[], bool]) -> Any:
    """An IProgressMonitor that reports the part that is done and stops the build; None where TensorRT has none.

    Its ``error`` is what ``report`` raised, which must not pass through the library.
    """
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases = Phases()
            self.error: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            self.phases.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases.step(phase_name, step)
            try:
                report(self.phases.fraction())
            except BaseException as error:
                self.error = error
            return self.error is None and not interrupted()

    return Monitor()


@contextlib.contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Keep Ctrl-C until the block ends, then raise KeyboardInterrupt; yields whether it came.

    A KeyboardInterrupt inside a callback would pass through the library's C++ and end the process there. Where the
    program handles the signal itself, or this is not the main thread, nothing is changed.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    came = threading.Event()

    def hold(signum: int, frame: FrameType | None) -> None:
        came.set()

    signal.signal(signal.SIGINT, hold)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if came.is_set():
            raise KeyboardInterrupt
