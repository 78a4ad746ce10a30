"""Streams that come and go in one batch: the bits of each must be those that it has alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.errors import InputError, SessionError, StateError
from rwkv_edge.evaluation.synthetic import Shape, Shape7, random_v4, random_v5, random_v6, random_v7, save_pth
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.ort_state import OrtState
from rwkv_edge.runtime.pool import StatePool, Stream
from rwkv_edge.runtime.session import open_session

CAPACITY = 17  # one stream and 16 neighbours
LENGTH = 12

MODELS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "4, odd 97": lambda: random_v4(Shape(2, 97, n_att=131)),
    "5.2, 128": lambda: random_v5(Shape(2, 128)),
    "6, 64": lambda: random_v6(Shape(2, 64, head_size=32)),
    "7, 256": lambda: random_v7(Shape7(2, 256)),
    "7, odd 75": lambda: random_v7(Shape7(2, 75, vocab_size=259, head_size=25, ffn_mult=3, ranks=(7, 9, 5, 11))),
}


def session_of(
    weights: dict[str, torch.Tensor], folder: Path, threads: int = 1, prepack: bool = False, **options: object
) -> OrtSession:
    choices = ExportOptions(**{"tokenizer": "none", "batch": None, "chunks": (), **options})  # type: ignore[arg-type]
    export_checkpoint(open_checkpoint(save_pth(weights, folder / "model.pth")), folder / "artifact", choices)
    session = open_session(folder / "artifact", threads=threads, prepack=prepack)
    assert isinstance(session, OrtSession)
    return session


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> OrtSession:
    """RWKV-7 of 2 layers × 64, with prefill graphs."""
    return session_of(random_v7(Shape7(2, 64)), tmp_path_factory.mktemp("small"), chunks=(16,))


class Texts:
    """What every stream is fed, and the logits that it has when it is fed alone."""

    def __init__(self, session: OrtSession, seed: int = 0) -> None:
        vocab_size = session.spec.vocab_size
        self.tokens = np.random.default_rng(seed).integers(0, vocab_size, (CAPACITY, LENGTH))
        self.alone = np.empty((CAPACITY, LENGTH, vocab_size), np.float32)
        pool = StatePool(session, CAPACITY)
        for number, text in enumerate(self.tokens):
            stream = pool.open()
            for t, token in enumerate(text):
                self.alone[number, t] = pool.step({stream: int(token)})[stream]
            pool.close(stream)


class Reader:
    """A stream that reads one of the texts and checks every result."""

    def __init__(self, stream: Stream, texts: Texts, number: int, at: int = 0) -> None:
        self.stream, self.texts, self.number, self.at = stream, texts, number, at

    @property
    def token(self) -> int:
        return int(self.texts.tokens[self.number, self.at])

    def check(self, logits: np.ndarray) -> None:
        assert np.array_equal(logits, self.texts.alone[self.number, self.at])
        self.at += 1


def step_together(pool: StatePool, readers: list[Reader]) -> None:
    found = pool.step({reader.stream: reader.token for reader in readers})
    for reader in readers:
        reader.check(found[reader.stream])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_bits_do_not_depend_on_neighbours(name: str, precision: str, tmp_path: Path) -> None:
    session = session_of(MODELS[name](), tmp_path, precision=precision)
    texts = Texts(session)
    for neighbours in range(1, CAPACITY):
        pool = StatePool(session, CAPACITY)
        readers = [Reader(pool.open(), texts, number) for number in range(neighbours + 1)]
        for _ in range(3):
            step_together(pool, readers)
    come_and_go(session, texts, turns=60)


def come_and_go(session: OrtSession, texts: Texts, turns: int) -> None:
    """Streams join, leave, fork, and travel as arrays, at random; whoever likes steps."""
    rng = np.random.default_rng(1)
    pool, readers = StatePool(session, CAPACITY), list[Reader]()
    sizes = set()
    for _ in range(turns):
        for _ in range(rng.integers(0, 5)):
            if len(pool) < CAPACITY:
                readers.append(newcomer(pool, texts, readers, rng))
        step = [reader for reader in readers if rng.random() < 0.7]
        step = [step[i] for i in rng.permutation(len(step))]
        step_together(pool, step)
        sizes.add(len(step))
        leaving = [r for r in readers if r.at == LENGTH or rng.random() < 0.1]
        for reader in leaving:
            pool.close(reader.stream)
        readers = [reader for reader in readers if reader not in leaving]
    assert max(sizes) > 10
    assert len(sizes) > 8


def newcomer(pool: StatePool, texts: Texts, readers: list[Reader], rng: np.random.Generator) -> Reader:
    if readers and rng.random() < 0.5:
        model = readers[rng.integers(len(readers))]
        stream = pool.fork(model.stream) if rng.random() < 0.5 else pool.open(pool.export(model.stream))
        return Reader(stream, texts, model.number, model.at)
    return Reader(pool.open(), texts, int(rng.integers(CAPACITY)))


@pytest.mark.parametrize("prepack", [False, True])
def test_bits_do_not_depend_on_neighbours_with_several_threads(prepack: bool, tmp_path: Path) -> None:
    # 320 × 64 sums are split by the number of threads, which ONNX Runtime chooses by the number of rows
    session = session_of(random_v7(Shape7(1, 320, ranks=(64, 64, 32, 64))), tmp_path, threads=4, prepack=prepack)
    come_and_go(session, Texts(session), turns=40)


def test_prepacked_weights_give_the_same_logits(tmp_path: Path) -> None:
    weights, token = random_v7(Shape7(2, 64)), [3, 5]
    plain = session_of(weights, tmp_path)
    packed = open_session(tmp_path / "artifact", threads=1, prepack=True)
    expected, found = (session.step(token, session.initial_state(2)) for session in (plain, packed))
    assert np.allclose(found, expected, atol=1e-5)
    assert packed.numerics == f"{plain.numerics}, prepacked"


def test_a_lone_stream_is_padded_and_a_crowd_is_not(small: OrtSession) -> None:
    pool = StatePool(small, 5)
    assert 1 <= pool.rows(1) <= 5
    assert pool.rows(5) == 5
    assert StatePool(small, 1).rows(1) == 1
    assert [StatePool(small, 5, exact=False).rows(n) for n in range(1, 6)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("least", [1, 2, 4, 6])
def test_any_padding(least: int, small: OrtSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends whose bits settle only at so many rows: padding rows never overwrite an idle stream."""
    monkeypatch.setattr(StatePool, "_probe", lambda self, rows: "same" if rows >= least else "other")
    pool = StatePool(small, 6)
    assert [pool.rows(n) for n in range(1, 7)] == [max(n, least) for n in range(1, 7)]
    rng = np.random.default_rng(0)
    streams = [pool.open() for _ in range(6)]
    tokens: list[list[int]] = [[] for _ in streams]
    for _ in range(40):
        chosen = [i for i in range(6) if rng.random() < 0.4]
        fed = {i: int(rng.integers(256)) for i in chosen}
        pool.step({streams[i]: token for i, token in fed.items()})
        for i, token in fed.items():
            tokens[i].append(token)
    for stream, text in zip(streams, tokens, strict=True):
        state = small.initial_state()
        for token in text:
            small.step([token], state)
        expected = small.export_state(state)
        assert all(np.allclose(array, expected[n], atol=1e-4) for n, array in pool.export(stream).items())


def test_one_by_one_where_rows_differ(small: OrtSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StatePool, "_probe", lambda self, rows: "")
    pool = StatePool(small, 4)
    assert pool.rows(2) == 0
    streams, states = [pool.open() for _ in range(3)], [small.initial_state() for _ in range(3)]
    for tokens in ([1, 2, 3], [4, 5, 6], [7, 8, 9]):
        found = pool.step(dict(zip(streams, tokens, strict=True)))
        for stream, token, state in zip(streams, tokens, states, strict=True):
            assert np.array_equal(found[stream], small.step([token], state)[0])


def test_streams_that_keep_stepping_are_not_copied(small: OrtSession, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = StatePool(small, 8)
    streams = [pool.open() for _ in range(6)]
    members, idle = streams[2:5], [s for s in streams if s not in streams[2:5]]
    pool.step(dict.fromkeys(members, 1))
    copies = []
    monkeypatch.setattr(OrtState, "set_row", lambda *arguments: copies.append(arguments))
    before = {s: [side[s._row].copy() for sides in pool._state.sets for side in sides.values()] for s in idle}
    for token in range(5):
        pool.step(dict.fromkeys(reversed(members), token))
    assert not copies
    for stream, arrays in before.items():
        after = [side[stream._row] for sides in pool._state.sets for side in sides.values()]
        assert all(np.array_equal(a, b) for a, b in zip(arrays, after, strict=True))


def test_steps_are_those_of_a_session(small: OrtSession) -> None:
    pool, tokens = StatePool(small, 3), np.random.default_rng(2).integers(0, 256, (3, 10))
    streams = [pool.open() for _ in range(3)]
    state = small.initial_state(3)
    for column in tokens.T:
        found = pool.step(dict(zip(streams, column.tolist(), strict=True)))
        expected = small.step(column, state)
        assert np.array_equal(np.stack([found[stream] for stream in streams]), expected)


def test_prefill_is_that_of_a_session_of_batch_1(small: OrtSession) -> None:
    pool, prompt = StatePool(small, 4), np.random.default_rng(3).integers(0, 256, 37)
    others = [pool.open() for _ in range(3)]
    pool.step(dict.fromkeys(others, 9))
    before = [pool.export(stream) for stream in others]
    stream = pool.open()
    state = small.initial_state()
    for part in (prompt[:20], prompt[20:]):
        assert np.array_equal(pool.prefill(stream, part), small.prefill(part[None], state)[0])
    expected = small.export_state(state)
    assert all(np.array_equal(array, expected[name]) for name, array in pool.export(stream).items())
    for other, arrays in zip(others, before, strict=True):
        assert all(np.array_equal(array, arrays[name]) for name, array in pool.export(other).items())
    pool.step({stream: 1, others[0]: 2})


def test_places_are_handed_out_again(small: OrtSession) -> None:
    pool = StatePool(small, 2)
    for _ in range(3):
        streams = [pool.open(), pool.open()]
        assert len(pool) == 2
        pool.step(dict.fromkeys(streams, 7))
        for stream in streams:
            assert stream.is_open
            pool.close(stream)
            assert not stream.is_open
    assert len(pool) == 0
    fresh, initial = pool.export(pool.open()), small.export_state(small.initial_state())
    assert all(np.array_equal(array, initial[name]) for name, array in fresh.items())


def test_a_tuned_initial_state_begins_every_stream(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tuned = {f"blocks.{i}.att.time_state": torch.randn(1, 64, 64) for i in range(2)}
    torch.save(tuned, tmp_path / "state.pth")
    session = session_of(random_v7(Shape7(2, 64)), tmp_path, state=tmp_path / "state.pth")
    pool, initial = StatePool(session, 2), session.export_state(session.initial_state())
    assert np.abs(initial["wkv.1"]).max() > 1
    for _ in range(2):
        stream = pool.open()
        assert all(np.array_equal(array, initial[name]) for name, array in pool.export(stream).items())
        pool.step({stream: 5})
        pool.close(stream)


# Refusals


def test_a_full_pool(small: OrtSession) -> None:
    pool = StatePool(small, 2)
    stream = pool.open()
    pool.open()
    with pytest.raises(InputError, match="the pool is full: 2 streams are open"):
        pool.open()
    with pytest.raises(InputError, match="full"):
        pool.fork(stream)
    pool.close(stream)
    pool.open()


def uses(pool: StatePool, stream: Stream) -> Iterator[Callable[[], object]]:
    yield lambda: pool.step({stream: 1})
    yield lambda: pool.prefill(stream, [1])
    yield lambda: pool.export(stream)
    yield lambda: pool.fork(stream)
    yield lambda: pool.close(stream)


def test_a_closed_stream(small: OrtSession) -> None:
    pool = StatePool(small, 2)
    stream = pool.open()
    pool.close(stream)
    for use in uses(pool, stream):
        with pytest.raises(InputError, match="the stream is closed"):
            use()


def test_a_stream_of_another_pool(small: OrtSession) -> None:
    stream = StatePool(small, 2).open()
    for use in uses(StatePool(small, 2), stream):
        with pytest.raises(InputError, match="belongs to another pool"):
            use()


def test_no_stream_at_all(small: OrtSession) -> None:
    for use in uses(StatePool(small, 2), 3):  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"what StatePool\.open returns, not int"):
            use()


def test_a_bad_token_moves_nobody(small: OrtSession) -> None:
    pool = StatePool(small, 2)
    a, b = pool.open(), pool.open()
    before = pool.export(a)
    for token in (-1, 256, 1.5, "x"):
        with pytest.raises(InputError):
            pool.step({a: 1, b: token})  # type: ignore[dict-item]
        with pytest.raises(InputError):
            pool.prefill(b, [1, token])  # type: ignore[list-item]
    with pytest.raises(InputError):
        pool.prefill(b, [])
    assert all(np.array_equal(array, before[name]) for name, array in pool.export(a).items())
    assert pool.step({}) == {}


def test_a_backend_that_fails_moves_nobody(small: OrtSession, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = StatePool(small, 3)
    a, b = pool.open(), pool.open()
    pool.step({a: 1})
    pool.step({a: 2, b: 3})
    before = [pool.export(stream) for stream in (a, b)]

    def fail(*arguments: object) -> None:
        raise SessionError("the backend failed")

    with monkeypatch.context() as patch:
        patch.setattr(OrtState, "run", fail)
        with pytest.raises(SessionError):
            pool.step({b: 4})
    for stream, arrays in zip((a, b), before, strict=True):
        assert all(np.array_equal(array, arrays[name]) for name, array in pool.export(stream).items())


def test_states_that_are_not_one_stream(small: OrtSession) -> None:
    pool = StatePool(small, 2)
    with pytest.raises(StateError, match="not of 2"):
        pool.open(small.export_state(small.initial_state(2)))
    with pytest.raises(StateError, match="lacks"):
        pool.open({})
    assert len(pool) == 0


def test_what_no_pool_can_be_made_of(small: OrtSession, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="capacity"):
        StatePool(small, 0)
    with pytest.raises(SessionError, match="ONNX Runtime"):
        StatePool(object(), 2)  # type: ignore[arg-type]
    fixed = session_of(random_v7(Shape7(1, 64)), tmp_path, batch=2)
    with pytest.raises(InputError, match="--batch dynamic"):
        StatePool(fixed, 2)
