"""Tokens drawn on the GPU and steps that run ahead of the host: nothing of it shows but the speed.

The oracle is the same session step by step, with `Sampler` on the host. On a GPU where there is one, else on numpy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_double
import numpy as np
import pytest
from tiny import write_artifact

from rwkv_edge.artifact import Artifact
from rwkv_edge.errors import InputError, SessionError
from rwkv_edge.evaluation.demo import export_demo
from rwkv_edge.plugins.fused_spec import FusedKernel
from rwkv_edge.runtime.cuda import CudaSession
from rwkv_edge.runtime.cuda_state import CudaState
from rwkv_edge.runtime.loop import generate_step, generate_text
from rwkv_edge.runtime.sampling import Sampler, SamplerConfig
from rwkv_edge.runtime.session import open_session
from rwkv_edge.tokenizers import ByteTokenizer

CONFIGS = {
    "greedy": {"temperature": 0},
    "greedy with penalties": {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    "plain": {},
    "top-p and penalties": {
        "top_p": 0.8, "presence_penalty": 0.4, "frequency_penalty": 0.4, "penalty_decay": 0.99,
        "repetition_penalty": 1.1, "temperature": 0.9,
    },
    "top-k and a bias": {"top_k": 20, "logit_bias": {5: 2.0, 7: -np.inf}},
}  # fmt: skip


@pytest.fixture(scope="module", params=["numpy", pytest.param("gpu", marks=pytest.mark.gpu)])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CudaSession]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "gpu":
            request.getfixturevalue("gpu")
        else:
            patch.setattr("rwkv_edge.runtime.cuda.Driver", cuda_double.Driver)
            patch.setattr(FusedKernel, "ptx", cuda_double.described)
        session = CudaSession(Artifact.open(write_artifact(tmp_path_factory.mktemp("sampling") / "model")))
        yield session
        session.close()


def sampler(name: str = "plain", seed: int = 1) -> Sampler:
    return Sampler(SamplerConfig(**{"seed": seed, **CONFIGS[name]}), uncounted={1, 2})


def on_the_host(session: CudaSession, mine: Sampler, prompt: list[int], count: int) -> list[int]:
    """Tokens of a loop by hand."""
    state = session.initial_state()
    logits = session.prefill([prompt], state)
    tokens = []
    for _ in range(count):
        tokens.append(mine.sample(logits[0]))
        logits = session.step(tokens[-1:], state)
    return tokens


def state_after(session: CudaSession, prompt: list[int], tokens: list[int]) -> dict[str, np.ndarray]:
    """By prefill, then token by token."""
    return session.export_state(advanced(session, prompt, tokens)[0])


def advanced(session: CudaSession, prompt: list[int], tokens: list[int]) -> tuple[CudaState, np.ndarray]:
    state = session.initial_state()
    logits = session.prefill([prompt], state)
    for token in tokens:
        logits = session.step([token], state)
    return state, logits[0]


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def assert_samplers_agree(one: Sampler, other: Sampler) -> None:
    for name, value in vars(one.past(256)).items():
        np.testing.assert_array_equal(value, getattr(other.past(256), name))
    assert one.numbers().random() == other.numbers().random()


# Several streams


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 3, 9])
def test_streams_draw_as_on_the_host(session: CudaSession, name: str, batch: int) -> None:
    samplers = [sampler(name, seed) for seed in range(batch)]
    hosts = [one.copy() for one in samplers]
    state, other = session.initial_state(batch), session.initial_state(batch)
    tokens = np.arange(batch) + 5
    first = session.sample(tokens, state, samplers, 1)
    drawn = np.hstack([first, session.sample(first[:, 0], state, samplers, 20)])
    for i in range(21):
        logits = session.step(tokens, other)
        tokens = np.array([host.sample(row) for host, row in zip(hosts, logits, strict=True)])
        np.testing.assert_array_equal(drawn[:, i], tokens)
    for one, host in zip(samplers, hosts, strict=True):
        assert_samplers_agree(one, host)
    assert_same(session.export_state(state), session.export_state(other))


@pytest.mark.parametrize("batch", [4, 11])
def test_streams_stop_each_for_itself(session: CudaSession, batch: int) -> None:
    """Their states have consumed all but the stop token; the others go on."""
    start = np.arange(batch) + 5
    free = session.sample(start, session.initial_state(batch), [sampler(seed=s) for s in range(batch)], 30)
    stops = {int(free[0, 3]), int(free[2, 11]), int(free[3, 0])}
    state, samplers = session.initial_state(batch), [sampler(seed=s) for s in range(batch)]
    drawn = session.sample(start, state, samplers, 30, stops)
    found, expected = session.export_state(state), states_after_each(session, start, free)
    for row in range(batch):
        ends = [i for i, token in enumerate(free[row].tolist()) if token in stops]
        length = ends[0] + 1 if ends else 30
        np.testing.assert_array_equal(drawn[row], [*free[row, :length], *[-1] * (30 - length)])
        for name, array in expected[length - 1].items():
            np.testing.assert_array_equal(found[name][row], array[row], err_msg=f"{name} of stream {row}")
    after = session.step(start, state)  # nothing is halted any more
    assert not np.array_equal(session.export_state(state)["wkv.0"][3], found["wkv.0"][3])
    assert np.isfinite(after).all()


def states_after_each(session: CudaSession, start: np.ndarray, drawn: np.ndarray) -> list[dict[str, np.ndarray]]:
    """The states of all streams after the first token, after the one drawn by it, and so on."""
    state, found = session.initial_state(len(start)), []
    for tokens in (start, *drawn.T[:-1]):
        session.step(tokens, state)
        found.append(session.export_state(state))
    return found


def test_greedy_names_what_is_no_number(session: CudaSession) -> None:
    """And feeds no token that is none: other streams and states go on."""
    broken = session.initial_state(2)
    session._driver.upload(np.full(64, np.nan, np.float32), broken.address("wkv.0", broken.side, row=1))
    with pytest.raises(SessionError, match="but the model gave NaN"):
        session.greedy([5, 6], broken, 9)
    assert session.greedy([5], session.initial_state(), 3).min() >= 0


def test_many_stop_tokens(session: CudaSession) -> None:
    drawn = session.sample([5], session.initial_state(), [sampler()], 9, range(256))
    assert (drawn[0, 0] >= 0, drawn[0, 1:].tolist()) == (True, [-1] * 8)


@pytest.mark.parametrize("samplers", [[], ["twice", "twice"], ["one"] * 3])
def test_each_stream_needs_a_sampler(session: CudaSession, samplers: list[str]) -> None:
    made = {name: sampler() for name in samplers}
    with pytest.raises(InputError, match=f"each of 2 streams needs a sampler of its own; found {len(samplers)}"):
        session.sample([1, 2], session.initial_state(2), [made[name] for name in samplers], 3)


# Steps ahead of the host


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_are_those_of_the_host(session: CudaSession, name: str) -> None:
    mine, host = sampler(name), sampler(name)
    steps = generate_step(session, mine, session.initial_state(), [5, 6, 7])
    tokens = [step.token for step in itertools.islice(steps, 80)]
    assert tokens == on_the_host(session, host, [5, 6, 7], 80)
    assert_samplers_agree(mine, host)


@pytest.mark.parametrize(
    ("how", "count"),
    [
        *itertools.product(["export", "copy"], [1, 2, 3, 4, 5, 8, 9, 12, 17]),
        *itertools.product(["step", "prefill", "greedy", "sample"], [3, 12]),
    ],
)  # flights have 1, 2, 4, 8, 8, … tokens
def test_the_state_is_that_of_the_tokens_handed_out(session: CudaSession, how: str, count: int) -> None:
    """Whoever uses the state after ``count`` steps, and however: it has consumed all but the last token."""
    state = session.initial_state()
    steps = generate_step(session, sampler(), state, [5, 6, 7])
    tokens = [step.token for step in itertools.islice(steps, count)]
    expected, _ = advanced(session, [5, 6, 7], tokens[:-1])
    if how == "step":
        np.testing.assert_array_equal(session.step([9], state), session.step([9], expected))
    if how == "prefill":
        np.testing.assert_array_equal(session.prefill([[9, 8]], state), session.prefill([[9, 8]], expected))
    if how == "greedy":
        np.testing.assert_array_equal(session.greedy([9], state, 4), session.greedy([9], expected, 4))
    if how == "sample":
        drawn = session.sample([9], state, [sampler()], 4)
        np.testing.assert_array_equal(drawn, session.sample([9], expected, [sampler()], 4))
    found = session.copy_state(state) if how == "copy" else state
    assert_same(session.export_state(found), session.export_state(expected))


def test_copies_in_between_change_nothing(session: CudaSession) -> None:
    """Copies, exports and logits at every step: the tokens stay the same, and so does each of those."""
    expected = on_the_host(session, sampler(), [5], 26)
    state, steps = session.initial_state(), []
    copies = []
    for i, step in enumerate(itertools.islice(generate_step(session, sampler(), state, [5]), 26)):
        steps.append(step.token)
        if i % 3 == 0:
            copies.append((len(steps) - 1, session.copy_state(state)))
        if i % 7 == 5:
            assert_same(session.export_state(state), state_after(session, [5], steps[:-1]))
        if i % 5 in (1, 2):
            np.testing.assert_array_equal(step.logits, advanced(session, [5], steps[:-1])[1])
    assert steps == expected
    for count, copied in copies:
        assert_same(session.export_state(copied), state_after(session, [5], steps[:count]))


def test_logits_of_a_step_are_gone_with_the_next(session: CudaSession) -> None:
    steps = generate_step(session, sampler(), session.initial_state(), [5])
    first, second, third = next(steps), next(steps), next(steps)
    assert np.isfinite(first.logits).all()
    with pytest.raises(SessionError, match="ask for them before the next step"):
        _ = second.logits
    assert third.logits.shape == (256,)


@pytest.mark.parametrize("change", ["observe", "accept", "reset"])
def test_the_sampler_may_be_changed_in_between(session: CudaSession, change: str) -> None:
    def drawn(mine: Sampler, steps: Callable[[], Any]) -> list[int]:
        tokens = []
        for i in range(40):
            tokens.append(steps())
            if i == 20:
                {"observe": mine.observe, "accept": lambda t: mine.accept(t[0]), "reset": lambda _: mine.reset()}[
                    change
                ]([3, 4])
        return tokens

    mine, host = sampler("top-p and penalties"), sampler("top-p and penalties")
    loop = generate_step(session, mine, session.initial_state(), [5])
    other, fed = session.initial_state(), [5]

    def by_hand() -> int:
        fed[0] = host.sample(session.step(fed, other)[0])
        return fed[0]

    assert drawn(mine, lambda: next(loop).token) == drawn(host, by_hand)


def test_resumed_exactly(session: CudaSession) -> None:
    state, mine = session.initial_state(), sampler("top-p and penalties")
    steps = generate_step(session, mine, state, [9])
    first = [step.token for step in itertools.islice(steps, 13)]
    saved, twin = session.import_state(session.export_state(session.copy_state(state))), mine.copy()
    rest = [step.token for step in itertools.islice(steps, 20)]
    resumed = generate_step(session, twin, saved, first[-1:])
    assert [step.token for step in itertools.islice(resumed, 20)] == rest


def test_two_loops_over_one_state(session: CudaSession) -> None:
    """Each goes on from where the other has left the state."""
    state, twin = session.initial_state(), session.initial_state()
    tokens, expected = [[], []], [[], []]
    loops = [generate_step(session, sampler(seed=s), state, [s + 1]) for s in range(2)]
    hosts, last = [sampler(seed=s) for s in range(2)], [1, 2]
    for i in range(24):
        which = i // 3 % 2
        tokens[which].append(next(loops[which]).token)
        last[which] = hosts[which].sample(session.step([last[which]], twin)[0])
        expected[which].append(last[which])
    assert tokens == expected


def test_going_on_behind_a_stop_token(session: CudaSession) -> None:
    expected = on_the_host(session, sampler(), [5], 30)
    state = session.initial_state()
    steps = generate_step(session, sampler(), state, [5], stop_tokens={expected[9]}, max_tokens=12)
    tokens = [step.token for step in itertools.islice(steps, 10)]
    assert_same(session.export_state(session.copy_state(state)), state_after(session, [5], tokens[:-1]))
    assert tokens + [step.token for step in itertools.islice(steps, 20)] == expected


# Text


@pytest.mark.parametrize("length", [1, 2, 3, 9, 40])
def test_text_of_a_length_runs_no_step_in_vain(session: CudaSession, length: int) -> None:
    expected = on_the_host(session, sampler(), [5], length)
    state = session.initial_state()
    logits = session.step([5], state)[0]
    counted = Counted(session)
    generation = generate_text(
        session, ByteTokenizer(), [5], sampler=sampler(), state=state, max_tokens=length, stop_tokens=(), logits=logits
    )
    list(generation)
    assert generation.tokens == expected
    found = session.export_state(state)
    assert counted.steps == length - 1  # none in vain, none again
    assert_same(found, state_after(session, [5], expected[:-1]))


class Counted:
    """Counts the steps that a session enqueues."""

    def __init__(self, session: CudaSession) -> None:
        self.steps = 0
        advance = type(session)._advance

        def counting(state: CudaState, give: Any) -> None:
            self.steps += 1
            advance(session, state, give)

        session._advance = counting


@pytest.fixture(autouse=True)
def uncounted(session: CudaSession) -> Iterator[None]:
    yield
    session.__dict__.pop("_advance", None)


def test_text_that_ends_at_a_stop_token(session: CudaSession) -> None:
    expected = on_the_host(session, sampler(), [5], 30)
    at = next(i for i in range(10, 30) if expected[i] not in expected[:i])
    state = session.initial_state()
    generation = generate_text(
        session, ByteTokenizer(), [5], sampler=sampler(), state=state, max_tokens=99, stop_tokens={expected[at]}
    )
    list(generation)
    assert (generation.tokens, generation.reason) == (expected[:at], "stop_token")
    counted = Counted(session)
    found = session.export_state(state)
    assert counted.steps == 0  # the device had halted: there is no way back to go
    assert_same(found, state_after(session, [5], expected[:at]))


@pytest.mark.parametrize("count", [1, 2, 5, 11])
def test_text_that_the_caller_ends(session: CudaSession, count: int) -> None:
    state = session.initial_state()
    generation = generate_text(session, ByteTokenizer(), [5], sampler=sampler(), state=state, max_tokens=99)
    with generation:
        for _ in range(count):
            next(generation)
    assert_same(session.export_state(state), state_after(session, [5], generation.tokens[:-1]))


def test_the_gpu_has_work_while_the_host_has_tokens(session: CudaSession) -> None:
    """From the third token on, the next flight is under way when the first token of one is handed out."""
    counted, state = Counted(session), session.initial_state()
    steps = generate_step(session, sampler(), state, [5])
    ahead = [counted.steps - (i + 1) for i, _ in enumerate(itertools.islice(steps, 40))]
    assert ahead[:4] == [0, 0, 5, 4]
    assert min(ahead[4:]) >= 3
    assert max(ahead) < 16


@pytest.mark.parametrize("at", range(1, 30, 4))
def test_an_interrupted_step(session: CudaSession, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Ctrl-C while steps are enqueued: the state is that of the tokens handed out."""
    advance, calls = session._advance, itertools.count()

    def interrupted(state: CudaState, give: Any) -> None:
        advance(state, give)
        if next(calls) == at:
            raise KeyboardInterrupt

    state, tokens = session.initial_state(), []
    with monkeypatch.context() as patch:
        patch.setattr(session, "_advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokens.extend(handed_out(generate_step(session, sampler(), state, [5]), tokens))
    assert_same(session.export_state(state), state_after(session, [5], tokens[:-1]))


def handed_out(steps: Iterator[Any], tokens: list[int]) -> list[int]:
    """Nothing: notes every token until the steps end."""
    for step in steps:
        tokens.append(step.token)
    return []


# A trained model


@pytest.mark.gpu
def test_a_thousand_greedy_tokens_are_those_of_the_cpu(tmp_path: Path, gpu: str) -> None:
    """The demo model's text in float32: by the kernels, and by ONNX Runtime on the CPU."""
    export_demo(tmp_path / "demo")
    texts, mine = [], SamplerConfig(temperature=0)
    for backend in ("cuda", "onnxruntime"):
        session = open_session(tmp_path / "demo", backend=backend)
        generation = generate_text(
            session, ByteTokenizer(), "ROMEO:", sampler=Sampler(mine), max_tokens=1000, stop_tokens=()
        )
        list(generation)
        texts.append(generation.tokens)
        session.close()
    assert texts[0] == texts[1]
