"""What `step_gpu.py` times: a session on ONNX Runtime and one on the fused kernels, and the measures of each."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rwkv_edge.artifact import Artifact
from rwkv_edge.runtime.cuda import CudaSession
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.ort_device import DeviceState
from rwkv_edge.runtime.session import Session, open_session

ORT, FUSED = "ONNX Runtime", "fused kernels"
CALLS = 60  # whose median is one measure, where the host waits for each
FED_BACK = 200  # steps of one measure of the fused kernels, where it does not
PROMPT = 512
NAMES_KEPT = 12  # kernels that a count names


@dataclass(frozen=True)
class Engine:
    """An open session.

    Attributes:
        session: it.
        measures: figures by name, each a function that returns seconds. 'step_s' is a step on the GPU alone, 'call_s'
            one with its token and logits, 'plain_s' one without a CUDA graph.
        once: the step of 'step_s' once, for a profiler.
    """

    session: Session[Any]
    measures: dict[str, Callable[[], float]]
    once: Callable[[], object]


@contextlib.contextmanager
def onnxruntime_engine(artifact: Path, provider: str) -> Iterator[Engine]:
    """'step_s' is the run alone: nothing is chosen, no token goes in."""
    session = _opened(artifact, provider)
    plain = _opened(artifact, f"{provider}:enable_cuda_graph=0" if provider == "cuda" else provider)
    run, call, without = _runner(session), _caller(session), _runner(plain)
    yield Engine(
        session,
        {"step_s": lambda: _seconds(run), "call_s": lambda: _seconds(call), "plain_s": lambda: _seconds(without)},
        run,
    )
    plain.close()
    session.close()


@contextlib.contextmanager
def fused_engine(artifact: Path) -> Iterator[Engine]:
    """'step_s' is one of many in a row, each with the greedy choice of the one before it."""
    session = CudaSession(Artifact.open(artifact), check_content=False)
    state, call = session.initial_state(), _caller(session)
    yield Engine(
        session,
        {"step_s": lambda: session.step_seconds(state, FED_BACK), "call_s": lambda: _seconds(call)},
        lambda: session.greedy([5], state, 1),
    )
    session.close()


def logits_of(session: Session[Any], tokens: np.ndarray) -> np.ndarray:
    """[T] → [T, V], token by token from the initial state."""
    state = session.initial_state()
    return np.concatenate([session.step([int(t)], state) for t in tokens])


def greedy_is_argmax(session: CudaSession, token: int, count: int) -> bool:
    """Whether the choice that is fed back on the GPU is that of the logits, for some tokens."""
    chosen = session.greedy([token], session.initial_state(), count)[0]
    state = session.initial_state()
    expected = []
    for _ in range(count):
        token = int(session.step([token], state)[0].argmax())
        expected.append(token)
    return bool((chosen == expected).all())


def prefill_speed(session: Session[Any], runs: int) -> float:
    """Tokens a second of a prompt."""
    state, prompt = session.initial_state(), [[5] * PROMPT]
    session.prefill(prompt, state)
    found = []
    for _ in range(min(runs, 3)):
        start = time.perf_counter()
        session.prefill(prompt, state)
        found.append(time.perf_counter() - start)
    return PROMPT / statistics.median(found)


def kernels_of(call: Callable[[], object]) -> dict[str, Any]:
    """Kernels that a call launches, without copies and fills: how many, their time, and those that take most of it."""
    call()
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if e.self_device_time_total > 0 and not _is_transfer(e.key)]
    events.sort(key=lambda e: -e.self_device_time_total)
    return {
        "count": sum(e.count for e in events),
        "busy_s": sum(e.self_device_time_total for e in events) / 1e6,
        "names": [(e.key[:120], e.count, round(e.self_device_time_total, 1)) for e in events[:NAMES_KEPT]],
    }


def used_memory() -> int:
    """Bytes of the GPU's memory that are taken, by anybody."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def copy_bandwidth(runs: int) -> float:
    """Bytes read plus bytes written each second by a copy of 1 GiB."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    event: Any = torch.cuda.Event  # untyped in torch
    found = []
    for _ in range(4 * runs):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        found.append(float(start.elapsed_time(end)) / 1e3)
    nbytes = 2 * target.nbytes
    del source, target
    torch.cuda.empty_cache()
    return nbytes / statistics.median(found)


def _opened(artifact: Path, provider: str) -> OrtSession:
    """A session, its files not hashed again."""
    session = open_session(artifact, providers=[provider], check_content=False)
    if not isinstance(session, OrtSession):
        raise SystemExit("the session is not ONNX Runtime's")
    return session


def _caller(session: Session[Any]) -> Callable[[], object]:
    """`Session.step` on a state of its own."""
    state = session.initial_state()
    return lambda: session.step([5], state)


def _runner(session: OrtSession) -> Callable[[], object]:
    """The run alone: no token goes in, no logits come out."""
    state, graph = session.initial_state(), session._step
    if not isinstance(state, DeviceState):
        return _caller(session)
    session.step([5], state)
    session.step([5], state)

    def run() -> None:
        bound = state._memory.bound(state._room, graph, state.current, 1)
        graph.session.run_with_iobinding(bound.binding, bound.run_options)
        state.current = 1 - state.current

    return run


def _seconds(call: Callable[[], object]) -> float:
    """Median of some calls, each of which waits for the GPU."""
    found = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _is_transfer(name: str) -> bool:
    return name.startswith(("Memcpy", "Memset"))
