"""One contender of a benchmark in a process of its own: its memory is its own, and so are the libraries it loads.

The processes exchange pickles over the child's standard input and output. The child ends with its parent, even when
that is killed: its input ends then.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from rwkv_edge.errors import RwkvEdgeError, SessionError

WARM_STEPS = 3  # before steps are timed: threads wake up, CUDA graphs are captured

GRACE = 0.5  # seconds for an idle process to end


@dataclass(frozen=True)
class Contender:
    """What a process shall run.

    Attributes:
        kind: 'artifact', or 'rwkv' for the `rwkv` package.
        path: the folder, or the checkpoint.
        version: of RWKV, which the package must be told.
        strategy: of the package.
        backend: of an artifact's session, as the others that follow.
        providers: execution providers of ONNX Runtime.
        threads: compute threads.
        prepack: see `rwkv_edge.runtime.session.open_session`.
    """

    kind: str
    path: Path
    version: str = ""
    strategy: str = "cpu fp32"
    backend: str = "auto"
    providers: tuple[str, ...] = ()
    threads: int = 0
    prepack: bool = False


class Runner(Protocol):
    """A model in the child."""

    name: str

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Begin anew with a prompt [B, T]; returns the logits [B, V] after it."""
        ...

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """One token [B] each; returns the logits [B, V]."""
        ...


class Worker:
    """The process, seen from the parent."""

    def __init__(self, contender: Contender) -> None:
        """Start it; nothing is loaded yet."""
        command = [sys.executable, "-m", "rwkv_edge.evaluation.bench_worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.contender = contender

    def load(self) -> dict[str, Any]:
        """Open the model: its ``name``, ``seconds`` without imports, and ``host_bytes_before``.

        Raises:
            RwkvEdgeError: it cannot be opened.
        """
        return self.ask("load", self.contender)

    def prefill(self, tokens: np.ndarray) -> dict[str, Any]:
        """``seconds`` of a prompt [B, T] from the initial state to the most likely next tokens, and the ``logits``."""
        return self.ask("prefill", tokens)

    def decode(self, count: int) -> list[float]:
        """Seconds of each of ``count`` greedy steps after the prompt; some unmeasured ones come first."""
        found: list[float] = self.ask("decode", count)["seconds"]
        return found

    def peak_bytes(self) -> int | None:
        """The most memory that the process ever had, mapped weights included."""
        peak: int | None = self.ask("memory", None)["peak"]
        return peak

    def ask(self, what: str, value: Any) -> dict[str, Any]:
        """One question and its answer.

        Raises:
            RwkvEdgeError: the child's error, or that it ended.
        """
        assert self._process.stdin
        assert self._process.stdout
        try:
            _send(self._process.stdin, (what, value))
            failure, answer = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise SessionError(
                f"the process that runs {self.contender.path} ended; is there enough memory? Try a smaller --batch"
            ) from error
        if failure:
            raise failure
        found: dict[str, Any] = answer
        return found

    def close(self) -> None:
        """End the process; one that is at work, after Ctrl-C, does not see that its input ended."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _SessionRunner:
    """An artifact."""

    def __init__(self, contender: Contender) -> None:
        from rwkv_edge.runtime.session import open_session

        self._session = open_session(
            contender.path,
            contender.backend,
            list(contender.providers),
            contender.threads,
            prepack=contender.prepack,
        )
        self.name = self._session.numerics

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        self._state = self._session.initial_state(len(tokens))
        return self._session.prefill(tokens, self._state)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        return self._session.step(tokens, self._state)


class _PackageRunner:
    """The `rwkv` package, one stream."""

    def __init__(self, contender: Contender) -> None:
        import torch

        if contender.threads:
            torch.set_num_threads(contender.threads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model: Any = _import_package(contender)(str(contender.path.with_suffix("")), contender.strategy)
        self.name = f"rwkv {importlib.metadata.version('rwkv')}, {contender.strategy}, torch {torch.__version__}"

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        logits, self._state = self._model.forward([int(t) for t in tokens[0]], None)
        return self._numpy(logits)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        logits, self._state = self._model.forward([int(tokens[0])], self._state)
        return self._numpy(logits)

    @staticmethod
    def _numpy(logits: Any) -> np.ndarray:
        found: np.ndarray = logits.float().cpu().numpy()[None]
        return found


def _import_package(contender: Contender) -> Any:
    """The model's class; the package decides at import, by the environment, which versions it runs."""
    seven = "1" if contender.version.startswith("7") else "0"
    os.environ.update({"RWKV_V7_ON": seven, "RWKV_DE_VERSION": "1" if contender.version == "7a" else "0"})
    os.environ.update({"RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, which is that package's concern
        from rwkv.model import RWKV
    return RWKV


def _import_backend(backend: str) -> None:
    """What a session imports; where something is missing, opening one says it better."""
    modules = _MODULES.get(backend, _MODULES["onnxruntime"])
    with contextlib.suppress(ImportError):
        for module in modules:
            import_module(module)


_MODULES = {
    "onnxruntime": ("rwkv_edge.runtime.onnxruntime", "onnxruntime"),
    "cuda": ("rwkv_edge.runtime.cuda", "cuda.bindings.driver", "cuda.bindings.nvrtc"),
    "tensorrt": ("rwkv_edge.runtime.tensorrt", "cuda.bindings.driver", "tensorrt"),
    "tensorrt-rtx": ("rwkv_edge.runtime.tensorrt", "cuda.bindings.driver", "tensorrt_rtx"),
}
"""Backend → what it imports, in that order."""

_RUNNERS: dict[str, Callable[[Contender], Runner]] = {"artifact": _SessionRunner, "rwkv": _PackageRunner}


class _Child:
    """What answers the questions."""

    def __init__(self) -> None:
        self._runner: Runner | None = None
        self._next = np.empty(0, np.int64)

    def load(self, contender: Contender) -> dict[str, Any]:
        if contender.kind == "rwkv":
            _import_package(contender)  # which is not the model's load
        else:
            _import_backend(contender.backend)
        before = _status_bytes("VmRSS")
        start = time.perf_counter()
        self._runner = _RUNNERS[contender.kind](contender)
        return {
            "name": self._runner.name,
            "seconds": time.perf_counter() - start,
            "host_bytes_before": before,
        }

    def prefill(self, tokens: np.ndarray) -> dict[str, Any]:
        assert self._runner
        start = time.perf_counter()
        logits = self._runner.prefill(tokens)
        self._next = logits.argmax(-1)
        return {"seconds": time.perf_counter() - start, "logits": logits}

    def decode(self, count: int) -> dict[str, Any]:
        assert self._runner
        seconds = []
        for i in range(WARM_STEPS + count):
            start = time.perf_counter()
            self._next = self._runner.step(self._next).argmax(-1)
            if i >= WARM_STEPS:
                seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def memory(self, _: None) -> dict[str, Any]:
        return {"peak": _status_bytes("VmHWM") or _peak_by_usage()}


def _status_bytes(field: str) -> int | None:
    """A size in /proc/self/status; None elsewhere than on Linux."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _peak_by_usage() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes but for macOS


def _send(pipe: IO[bytes], value: Any) -> None:
    pickle.dump(value, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def _serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    child = _Child()
    while True:
        what, value = pickle.load(questions)
        try:
            answer = getattr(child, what)(value)
        except RwkvEdgeError as error:
            _send(answers, (SessionError(str(error)), None))
        except (RuntimeError, ValueError, MemoryError, OSError, ImportError, AssertionError, KeyError) as error:
            # what torch and the package raise
            text = (str(error).splitlines() or [type(error).__name__])[0][:300]
            _send(answers, (SessionError(f"it cannot be run: {text}"), None))
        else:
            _send(answers, (None, answer))


def main() -> None:
    """The child: what is printed goes to standard error, since standard output carries the answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.simplefilter("ignore")  # the parent opened the same session before, and said it
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the package prints all it does
    with contextlib.suppress(EOFError, BrokenPipeError):
        _serve(sys.stdin.buffer, answers)
    with contextlib.suppress(BrokenPipeError):
        answers.close()


if __name__ == "__main__":
    main()
