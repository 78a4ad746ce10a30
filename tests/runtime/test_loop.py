"""The step loop over a fake session, whose logits depend on every token that its state has consumed."""

import itertools

import numpy as np
import pytest

from rwkv_edge.errors import InputError, SessionError, TokenizerError
from rwkv_edge.runtime.loop import generate_step, generate_text
from rwkv_edge.runtime.sampling import Sampler, SamplerConfig
from rwkv_edge.spec import ModelSpec
from rwkv_edge.tokenizers import ByteTokenizer
from rwkv_edge.tokenizers.stream import TextStream

VOCABULARY = 256


class FakeState:
    def __init__(self, batch):
        self.batch = batch
        self.consumed = []


class FakeSession:
    """Random logits seeded by the consumed tokens; with a ``script``, the one of its tokens that is due is certain."""

    def __init__(self, script=None, fail_at=None):
        self.spec = ModelSpec("v7", 1, 8, 8, 8, 1, 8, VOCABULARY, "fp32", None, ())
        self.script = script
        self.fail_at = fail_at
        self.calls = []
        self.prompt = 0

    def initial_state(self, batch=1):
        return FakeState(batch)

    def prefill(self, tokens, state):
        assert tokens.dtype == np.int64
        assert tokens.shape[0] == state.batch == 1
        self.calls.append("prefill")
        state.consumed += tokens[0].tolist()
        self.prompt = len(state.consumed)
        return self.logits(state)

    def step(self, tokens, state):
        assert tokens.dtype == np.int64
        assert tokens.shape == (1,)
        if len(self.calls) == self.fail_at:
            raise SessionError("the backend failed")
        self.calls.append("step")
        state.consumed += tokens.tolist()
        return self.logits(state)

    def logits(self, state):
        logits = np.random.default_rng(state.consumed).normal(size=(1, VOCABULARY)).astype(np.float32)
        if self.script is not None:
            logits[0, self.script[len(state.consumed) - self.prompt]] = 1e3
        return logits


def sampler(**config):
    return Sampler(SamplerConfig(**{"seed": 1, **config}))


def generated(text, max_tokens=1000, **arguments):
    """A generation whose model says ``text`` (a str or bytes)."""
    script = text.encode() if isinstance(text, str) else text
    session = FakeSession(script)
    return generate_text(session, ByteTokenizer(), "p", sampler=sampler(), max_tokens=max_tokens, **arguments), session


# Steps


def test_steps_are_what_a_loop_by_hand_gives():
    session, state, mine = FakeSession(), FakeState(1), sampler()
    steps = list(itertools.islice(generate_step(session, mine, state, [5, 6, 7]), 10))
    again, history, expected = sampler(), [5, 6, 7], []
    for _ in range(10):
        row = np.random.default_rng(history).normal(size=(1, VOCABULARY)).astype(np.float32)[0]
        expected.append(again.sample(row))
        assert np.array_equal(steps[len(expected) - 1].logits, row)
        history.append(expected[-1])
    assert [step.token for step in steps] == expected
    assert session.calls == ["prefill", *["step"] * 9]


def test_state_has_consumed_all_but_the_token_of_the_step():
    session, state = FakeSession(), FakeState(1)
    seen = [1, 2]
    for step in itertools.islice(generate_step(session, sampler(), state, np.array(seen)), 5):
        assert state.consumed == seen
        seen.append(step.token)


def test_a_saved_state_is_resumed_exactly():
    session, state, mine = FakeSession(), FakeState(1), sampler()
    steps = generate_step(session, mine, state, [9])
    first = [step.token for step in itertools.islice(steps, 4)]
    saved, twin = FakeState(1), mine.copy()
    saved.consumed = list(state.consumed)
    rest = [step.token for step in itertools.islice(steps, 6)]
    resumed = generate_step(session, twin, saved, first[-1:])
    assert [step.token for step in itertools.islice(resumed, 6)] == rest


def test_nothing_runs_before_the_first_step():
    session, state = FakeSession(), FakeState(1)
    generate_step(session, sampler(), state, [1])
    assert session.calls == state.consumed == []


@pytest.mark.parametrize("tokens", [[], (), np.array([], np.int64)])
def test_a_step_needs_a_token(tokens):
    with pytest.raises(InputError, match="at least one token"):
        generate_step(FakeSession(), sampler(), FakeState(1), tokens)


@pytest.mark.parametrize("token", [-1, VOCABULARY, 10**9])
def test_tokens_outside_the_vocabulary_are_refused_at_the_call(token):
    with pytest.raises(InputError, match=f"{token} is outside"):
        generate_step(FakeSession(), sampler(), FakeState(1), [0, token])


# Text


def test_text_streams_and_ends_at_its_length():
    generation, session = generated("Grüße, 世界 and more", max_tokens=12)
    pieces = list(generation)
    assert pieces == [*"Grüße, ", "世"]
    assert generation.reason == "length"
    assert generation.tokens == list("Grüße, 世".encode())
    assert generation.pending == (generation.tokens[-1],)
    assert generation.prompt_tokens == 1
    assert session.calls == ["prefill", *["step"] * 11]
    assert generation.state.consumed == [ord("p"), *generation.tokens[:-1]]
    assert list(generation) == []


def test_half_a_character_at_the_end_is_a_replacement():
    generation, _ = generated("ab世", max_tokens=4)
    assert "".join(generation) == "ab\ufffd"


def test_invalid_bytes_are_replacements():
    generation, _ = generated(b"a\xffb", max_tokens=3)
    assert "".join(generation) == "a\ufffdb"


def test_stop_token_is_not_part_of_text_tokens_or_state():
    generation, session = generated("ab\0cd", stop_tokens={0})
    assert list(generation) == ["a", "b"]
    assert generation.reason == "stop_token"
    assert generation.tokens == [97, 98]
    assert generation.pending == ()
    assert generation.state.consumed == [*b"pab"]
    assert session.calls == ["prefill", "step", "step"]


def test_stop_token_at_once():
    generation, _ = generated("\0", stop_tokens=[0])
    assert list(generation) == []
    assert (generation.reason, generation.tokens, generation.pending) == ("stop_token", [], ())


def test_stop_tokens_are_the_tokenizers_by_default():
    tokenizer = ByteTokenizer()
    tokenizer.eos_ids = frozenset({ord("c")})
    for stop_tokens, expected in ((None, "ab"), ((), "abcd")):
        session = FakeSession(b"abcd")
        generation = generate_text(session, tokenizer, "p", sampler=sampler(), max_tokens=4, stop_tokens=stop_tokens)
        assert "".join(generation) == expected


def test_stop_text_is_not_part_of_the_text():
    generation, _ = generated("Hi\n there\n\nUser: more", stops=["\n\nUser:", "###"])
    assert list(generation) == ["H", "i", "\n ", "t", "h", "e", "r", "e"]
    assert generation.reason == "stop_text"
    assert generation.tokens == list(b"Hi\n there\n\nUser:")
    assert generation.pending == (ord(":"),)
    assert generation.state.consumed == [*b"pHi\n there\n\nUser"]


def test_a_stop_text_that_never_ends_is_released():
    generation, _ = generated("a##", max_tokens=3, stops=["###"])
    assert list(generation) == ["a", "##"]
    generation, _ = generated("a##\0", stop_tokens=[0], stops=["###"])
    assert "".join(generation) == "a##"


def test_last_token_may_be_a_stop():
    assert "".join(g := generated("a###", max_tokens=4, stops=["###"])[0]) == "a"
    assert g.reason == "stop_text"
    assert "".join(g := generated("a\0", max_tokens=2, stop_tokens=[0])[0]) == "a"
    assert g.reason == "stop_token"


def test_a_state_and_a_prompt_of_tokens_go_on_exactly():
    text = "Grüße, 世界 and more"
    whole = "".join(generated(text, max_tokens=24)[0])
    first, session = generated(text, max_tokens=9)
    beginning = "".join(first)
    session.script = text.encode()[9:] + b"."
    rest = generate_text(session, ByteTokenizer(), first.pending, sampler=sampler(), state=first.state, max_tokens=15)
    assert rest.state is first.state
    assert beginning + "".join(rest) == whole
    assert rest.state.consumed == [*b"p", *text.encode()[:23]]


def test_stopping_early():
    generation, session = generated("abcdef", stops=["###"])
    with generation as entered:
        assert entered is generation
        assert next(generation) == "a"
        assert next(generation) == "b"
    assert list(generation) == []
    generation.close()
    assert generation.reason is None
    assert generation.pending == (ord("b"),)
    assert generation.state.consumed == [*b"pa"]
    assert session.calls == ["prefill", "step"]


def test_nothing_runs_before_the_first_piece():
    generation, session = generated("abc")
    assert session.calls == generation.tokens == []
    assert (generation.reason, generation.pending) == (None, ())
    assert generation.prefill_seconds == generation.decode_seconds == generation.tokens_per_second == 0


def test_an_error_ends_the_generation():
    session = FakeSession(b"abcdef", fail_at=3)
    generation = generate_text(session, ByteTokenizer(), "p", sampler=sampler(), max_tokens=9)
    assert [next(generation) for _ in range(3)] == ["a", "b", "c"]
    with pytest.raises(SessionError, match="failed"):
        next(generation)
    assert list(generation) == []
    assert (generation.reason, generation.tokens) == (None, [*b"abc"])


def test_timings(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    generation, _ = generated("abc\0", stop_tokens=[0])
    for _ in generation:
        next(clock)  # what the consumer does is not counted
    assert generation.prefill_seconds == 1
    assert (generation.decode_steps, generation.decode_seconds, generation.tokens_per_second) == (3, 3, 1)


def test_no_penalty_for_the_prompt_and_history_of_the_sampler():
    """The sampler that is passed in is used as it is, and remembers what was generated."""
    mine = sampler(temperature=0, presence_penalty=2000)
    generation = generate_text(FakeSession([5, 5, 5]), ByteTokenizer(), [5], sampler=mine, max_tokens=2)
    list(generation)
    assert generation.tokens[0] == 5
    assert generation.tokens[1] != 5


def test_bad_input_is_refused_at_the_call():
    def generate(prompt="p", max_tokens=3, **arguments):
        return generate_text(
            FakeSession(), ByteTokenizer(), prompt, sampler=sampler(), max_tokens=max_tokens, **arguments
        )

    for prompt in ("", [], ()):
        with pytest.raises(InputError, match="at least one token"):
            generate(prompt)
    with pytest.raises(InputError, match="300 is outside"):
        generate([300])
    with pytest.raises(TokenizerError, match="surrogate"):
        generate("\ud800")
    with pytest.raises(InputError, match="max_tokens must be at least 1, not 0"):
        generate(max_tokens=0)
    with pytest.raises(InputError, match="non-empty"):
        generate(stops=[""])


# A text that was begun before


def test_a_prompt_that_was_read_already():
    session, state = FakeSession(), FakeState(1)
    state.consumed = [1, 2, 3]
    logits = session.logits(state)[0]
    steps = list(itertools.islice(generate_step(session, sampler(), state, [1, 2, 3], logits), 4))
    again = FakeState(1)
    expected = list(itertools.islice(generate_step(FakeSession(), sampler(), again, [1, 2, 3]), 4))
    assert [step.token for step in steps] == [step.token for step in expected]
    assert session.calls == ["step"] * 3
    assert state.consumed == again.consumed


def written(script, stream):
    """The text of a generation that goes on with ``stream``."""
    model = FakeSession(script), ByteTokenizer()
    return "".join(generate_text(*model, "p", sampler=sampler(), max_tokens=len(script), text=stream))


@pytest.mark.parametrize("length", range(1, 12))
def test_a_text_goes_on_in_the_middle_of_a_character(length):
    text, stream = "é世界🙂!", TextStream(ByteTokenizer())
    content = text.encode()
    assert written(content[:length], stream) + written(content[length:], stream) == text
    assert stream.flush() == ""


def test_half_a_character_stays_in_the_text_that_was_given():
    stream = TextStream(ByteTokenizer())
    assert written("aé".encode()[:2], stream) == "a"
    assert stream.flush() == "\ufffd"
