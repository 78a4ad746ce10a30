"""What `step_gpu.py` times: sessions on ONNX Runtime and on the fused kernels, Albatross, and the measures of each."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import albatross
import numpy as np
import torch
from common import relative

from rwkv_edge.artifact import Artifact
from rwkv_edge.evaluation.tune import tune
from rwkv_edge.plugins.fused_spec import Choice, Tuning
from rwkv_edge.runtime.cuda import CudaSession
from rwkv_edge.runtime.cuda_state import CudaState
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.ort_device import DeviceState
from rwkv_edge.runtime.sampling import Sampler, SamplerConfig
from rwkv_edge.runtime.session import Session, open_session

ORT, FUSED, ALBATROSS = "ONNX Runtime", "fused kernels", "Albatross v3a"
CALLS = 60  # whose median is one measure, where the host waits for each
FED_BACK = 100  # steps of one measure, where it does not
STREAMS, STREAM_STEPS = 64, 20  # of a batch
PROMPT, PROMPTS = 512, 5
WORST = "worst stream"
SAMPLING = SamplerConfig(temperature=0.8, top_k=100, top_p=0.9, presence_penalty=0.4, frequency_penalty=0.4, seed=0)

Measures = Mapping[str, Callable[[], float]]


@dataclass(frozen=True)
class Engine:
    """A model that is ready to run.

    Attributes:
        fresh: the initial state of so many streams.
        step: tokens [B] and a state → logits [B, V].
        prefill: tokens [B, T] and a state → logits [B, V] of the last.
        measures: figures by name, each a function that returns seconds. 'step_s' is a step on the GPU alone, 'call_s'
            one with its token and logits, 'plain_s' one without a CUDA graph, 'bare_s' one that chooses no token,
            'sample_s' one whose token is drawn on the GPU by `SAMPLING`.
        slow: those of which few turns are enough: 'batch_s', a step of `STREAMS`, and 'prefill_s', `PROMPT` tokens.
        greedy: a token and a count → the tokens chosen on the GPU, each fed back.
        tuning: choices of our kernels: the defaults, or what `rwkv-edge tune` left in the cache.
    """

    fresh: Callable[[int], Any]
    step: Callable[[Any, Any], np.ndarray]
    prefill: Callable[[Any, Any], np.ndarray]
    measures: Measures
    slow: Measures
    greedy: Callable[[int, int], np.ndarray] | None = field(default=None)
    tuning: str = ""


@contextlib.contextmanager
def onnxruntime_engine(artifact: Path, provider: str) -> Iterator[Engine]:
    """'step_s' is the run alone: nothing is chosen, no token goes in."""
    session = _opened(artifact, provider)
    plain = _opened(artifact, f"{provider}:enable_cuda_graph=0" if provider == "cuda" else provider)
    run, call, without = _runner(session), _caller(session), _runner(plain)
    yield Engine(
        session.initial_state,
        session.step,
        session.prefill,
        {"step_s": lambda: _seconds(run), "call_s": lambda: _seconds(call), "plain_s": lambda: _seconds(without)},
        {"prefill_s": lambda: _prompt_seconds(session)},
    )
    plain.close()
    session.close()


@contextlib.contextmanager
def fused_engine(artifact: Path, tuning_seconds: float = 0) -> Iterator[Engine]:
    """'step_s' is one of many in a row, each with the greedy choice of the one before it; so is 'batch_s'.

    ``tuning_seconds``: of the search for the fastest choices, as `rwkv-edge tune` does it; 0: none.
    """
    session = CudaSession(Artifact.open(artifact), check_content=False)
    if tuning_seconds:
        tune(session, tuning_seconds)
    state, streams, call = session.initial_state(), session.initial_state(STREAMS), _caller(session)
    drawing = session.initial_state()
    yield Engine(
        session.initial_state,
        session.step,
        session.prefill,
        {
            "step_s": lambda: session.step_seconds(state, FED_BACK),
            "call_s": lambda: _seconds(call),
            "sample_s": lambda: _sampled_seconds(session, drawing),
        },
        {
            "batch_s": lambda: session.step_seconds(streams, STREAM_STEPS),
            "prefill_s": lambda: _prompt_seconds(session),
        },
        lambda token, count: session.greedy([token], session.initial_state(), count)[0],
        tuning_text(session.tuning),
    )
    session.close()


def tuning_text(tuning: Tuning) -> str:
    """Choices on one line: of each kernel tile / split / loads ahead / threads."""
    values = {one.name: getattr(tuning, one.name) for one in dataclasses.fields(tuning)}
    texts = {
        name: "/".join(map(str, dataclasses.astuple(value))) if isinstance(value, Choice) else str(value).lower()
        for name, value in values.items()
    }
    return ", ".join(f"{name} {text}" for name, text in texts.items())


@contextlib.contextmanager
def albatross_engine(folder: Path, checkpoint: Path) -> Iterator[Engine]:
    """All by replays of CUDA graphs; 'bare_s', 'batch_s' and 'prefill_s' as in its own benchmark.

    That starts from embedded tokens and ends with logits; 'step_s' has the embedding and the greedy choice as well.
    """
    module = albatross.imported(folder)
    with albatross.loaded(module, checkpoint) as model:
        bare, greedy = albatross.forward_replay(module, model, 1, 1), albatross.greedy_replay(model)
        streams = albatross.forward_replay(module, model, STREAMS, 1)
        prompt = albatross.forward_replay(module, model, 1, PROMPT)
        yield Engine(
            model.zero_state,
            lambda tokens, state: albatross.logits_of(model, np.asarray(tokens)[:, None], state),
            lambda tokens, state: albatross.logits_of(model, np.asarray(tokens), state),
            {"step_s": lambda: greedy.seconds(FED_BACK), "bare_s": lambda: bare.seconds(FED_BACK)},
            {"batch_s": lambda: streams.seconds(STREAM_STEPS), "prefill_s": lambda: prompt.seconds(PROMPTS)},
        )


@dataclass(frozen=True)
class Expected:
    """What the reference says: tokens [T, B] with logits [T, B, V], of one stream and of several."""

    one: tuple[np.ndarray, np.ndarray]
    streams: tuple[np.ndarray, np.ndarray]


def differences(engine: Engine, expected: Expected) -> dict[str, float]:
    """How far the engine is from the reference: by steps, as a prompt, and in a batch of `STREAMS`.

    'batch' is the median over all streams and tokens. A few streams that start from a state of zeros have a head whose
    k·r nearly vanishes: rounding to fp16 turns its sign, group norm makes it large again, the state keeps it, and
    logits move by a tenth in every engine. So 'worst stream', the largest median over one stream's tokens, has a bound
    of its own, far below what one stream in another's place makes of it.
    """
    tokens, logits = expected.one
    found = {"steps": relative(stepped(engine, tokens), logits)}
    found["prefill"] = relative(engine.prefill(tokens.T, engine.fresh(1)), logits[-1])
    if "batch_s" in engine.slow:
        logits = stepped(engine, expected.streams[0])
        found["batch"], found[WORST] = stream_differences(logits, expected.streams[1])
    return found


def stream_differences(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """[T, B, V] → the median of the relative differences of logits over streams and tokens, and the worst stream's."""
    differences = np.abs(found - expected).max(2) / np.abs(expected).max(2)
    return float(np.median(differences)), float(np.median(differences, 0).max())


def stepped(engine: Engine, tokens: np.ndarray) -> np.ndarray:
    """[T, B] → [T, B, V], token by token from the initial state."""
    state = engine.fresh(tokens.shape[1])
    return np.stack([engine.step(row, state) for row in tokens])


def greedy_is_argmax(engine: Engine, token: int, count: int) -> bool:
    """Whether the choice that is fed back on the GPU is that of the logits, for some tokens."""
    if engine.greedy is None:
        return True
    chosen, state = engine.greedy(token, count), engine.fresh(1)
    expected = []
    for _ in range(count):
        token = int(engine.step([token], state)[0].argmax())
        expected.append(token)
    return bool((chosen == expected).all())


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


def warmed(artifact: Path) -> None:
    """Run everything once, so that what is compiled for it lies in the caches of kernels."""
    with fused_engine(artifact) as engine:
        for measure in (*engine.measures.values(), *engine.slow.values()):
            measure()


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


def _sampled_seconds(session: CudaSession, state: CudaState) -> float:
    """Of one of many steps in a row, from the first token to the last one's way to the host."""
    start = time.perf_counter()
    session.sample([5], state, [Sampler(SAMPLING)], FED_BACK)
    return (time.perf_counter() - start) / FED_BACK


def _prompt_seconds(session: Session[Any]) -> float:
    """Median of some prompts, from tokens to the last one's logits on the host."""
    prompt = np.arange(PROMPT)[None] * 7919 % session.spec.vocab_size
    found = []
    for _ in range(PROMPTS):
        state = session.initial_state()
        start = time.perf_counter()
        session.prefill(prompt, state)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _seconds(call: Callable[[], object]) -> float:
    """Median of some calls, each of which waits for the GPU."""
    found = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)
