"""Chunks against single steps and the `rwkv` package's sequence mode: every version, every split of a sequence."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import MAKERS
from oracle import Oracle
from parity import exported_session, random_tokens, relative, worst_state

from rwkv_edge.cli import run
from rwkv_edge.errors import InputError
from rwkv_edge.evaluation.synthetic import Shape7, random_v7, save_pth
from rwkv_edge.exporters.onnx import DEFAULT_CHUNKS
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.ort_state import OrtState

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 100, 128, 257)
DYNAMIC: dict[str, object] = {"batch": None, "chunks": (5, 16, 64, 150), "all_logits": True}


@pytest.fixture(scope="module", params=list(MAKERS))
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(version: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pth(MAKERS[version](), tmp_path_factory.mktemp("model") / "model.pth")


@pytest.fixture(scope="module")
def session(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> OrtSession:
    return exported_session(checkpoint, tmp_path_factory.mktemp("artifact") / "a", **DYNAMIC)


def stepped(session: OrtSession, tokens: np.ndarray, state: OrtState) -> np.ndarray:
    return np.stack([session.step(column, state) for column in tokens.T], axis=1)


def begun(session: OrtSession, batch: int) -> OrtState:
    """A state that is not the initial one."""
    state = session.initial_state(batch)
    stepped(session, np.array([random_tokens(7, 256, 50 + row) for row in range(batch)]), state)
    return state


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_every_length_equals_steps(batch: int, session: OrtSession) -> None:
    start = begun(session, batch)
    tokens = np.array([random_tokens(max(LENGTHS), 256, row) for row in range(batch)])
    serial = session.copy_state(start)
    expected = stepped(session, tokens, serial)
    for length in LENGTHS:
        state = session.copy_state(start)
        found = session.prefill(tokens[:, :length], state)
        assert relative(found, expected[:, length - 1]) < 1e-4, length
    assert worst_state(session.export_state(state), session.export_state(serial))[0] < 1e-4
    scored = session.score(tokens, session.copy_state(start))
    assert relative(scored, expected) < 1e-4


def test_every_split_gives_the_same(session: OrtSession) -> None:
    start = begun(session, 2)
    tokens = np.array([random_tokens(90, 256, row) for row in range(2)])
    serial = session.copy_state(start)
    expected = stepped(session, tokens, serial)[:, -1]
    random = np.random.default_rng(1)
    for _ in range(8):
        cuts = [0, *sorted(random.choice(np.arange(1, 90), size=4, replace=False)), 90]
        state = session.copy_state(start)
        for begin, end in pairwise(cuts):
            found = session.prefill(tokens[:, begin:end], state)
        assert relative(found, expected) < 1e-4, cuts
        assert worst_state(session.export_state(state), session.export_state(serial))[0] < 1e-4, cuts


def test_equals_the_sequence_mode_of_the_rwkv_package(version: str, checkpoint: Path, session: OrtSession) -> None:
    oracle = Oracle(checkpoint, version)
    tokens = random_tokens(157, 256, 9)
    _, begun_there = oracle.sequence(tokens[:20])
    expected, expected_state = oracle.sequence(tokens[20:], begun_there)
    state = session.initial_state(1)
    session.prefill([tokens[:20]], state)
    found = session.prefill([tokens[20:]], state)[0]
    assert relative(found, expected) < 1e-4
    assert worst_state(session.export_state(state), oracle.named_state(expected_state))[0] < 1e-4


def test_one_token_repeated(session: OrtSession) -> None:
    """Identical keys make I − A of RWKV-7 as ill conditioned as it gets."""
    tokens = np.full((1, 512), 77)
    serial, state = session.initial_state(1), session.initial_state(1)
    expected = stepped(session, tokens, serial)[:, -1]
    found = session.prefill(tokens, state)
    assert relative(found, expected) < 1e-4
    assert worst_state(session.export_state(state), session.export_state(serial))[0] < 1e-4


def extreme(version: str, slow: bool) -> dict[str, torch.Tensor]:
    """The fastest and the slowest decays: RWKV-7's 0.545 and almost 1, others' e^−e⁴ = 2e-24 and almost 1."""
    weights = MAKERS[version]()
    for name, tensor in weights.items():
        if name.endswith("att.time_decay"):
            tensor.fill_(-12.0 if slow else 4.0)
        elif name.endswith("att.w0"):
            tensor.fill_(-16.0 if slow else 16.0)
    return weights


@pytest.mark.parametrize("slow", [False, True])
def test_extreme_decays(version: str, slow: bool, tmp_path: Path) -> None:
    path = save_pth(extreme(version, slow), tmp_path / "model.pth")
    session = exported_session(path, tmp_path / "artifact", chunks=DEFAULT_CHUNKS)
    tokens = np.array([[7] * 40 + random_tokens(60, 256) + [9] * 92])
    serial, state = session.initial_state(), session.initial_state()
    expected = stepped(session, tokens, serial)[:, -1]
    found = session.prefill(tokens, state)
    assert relative(found, expected) < 1e-4
    assert worst_state(session.export_state(state), session.export_state(serial))[0] < 1e-4


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precisions(precision: str, checkpoint: Path, session: OrtSession, tmp_path: Path) -> None:
    options: dict[str, object] = {"precision": precision, "rescale": 0, "batch": None, "chunks": (5, 64)}
    half = exported_session(checkpoint, tmp_path / "artifact", **options)
    tokens = np.array([random_tokens(150, 256, row) for row in range(2)])
    expected = session.prefill(tokens, session.initial_state(2))
    found = half.prefill(tokens, half.initial_state(2))
    assert relative(found, expected) < 2e-2


def test_fixed_batch(checkpoint: Path, session: OrtSession, tmp_path: Path) -> None:
    fixed = exported_session(checkpoint, tmp_path / "artifact", batch=3, chunks=DEFAULT_CHUNKS)
    tokens = np.array([random_tokens(81, 256, row) for row in range(3)])
    found = fixed.prefill(tokens, fixed.initial_state(3))
    assert relative(found, session.prefill(tokens, session.initial_state(3))) < 1e-5


def test_graphs_share_one_mapping_of_the_weights(tmp_path: Path) -> None:
    path = save_pth(random_v7(Shape7(2, 512, vocab_size=8192)), tmp_path / "model.pth")
    session = exported_session(path, tmp_path / "artifact", chunks=DEFAULT_CHUNKS)
    state = session.initial_state()
    for token in range(20):
        session.step([token], state)
    before = resident_kilobytes()
    session.prefill([list(range(100))], state)
    for token in range(20):
        session.step([token], state)
    weights = (tmp_path / "artifact" / "weights.bin").stat().st_size / 1024
    assert resident_kilobytes() - before < 0.5 * weights


def resident_kilobytes() -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        pytest.skip("no /proc")
    return float(next(line for line in lines if line.startswith("VmRSS")).split()[1])


@pytest.mark.parametrize("chunk", ["1", "1025", "-3", "x"])
def test_chunks_that_cannot_be(
    chunk: str, shared_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = shared_models / "tiny-rwkv-7v0-834K.pth"
    code = run(["export", str(checkpoint), "-o", str(tmp_path / "a"), "--chunk", chunk])
    assert code == 2
    assert "chunk" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_prefill_refuses_what_is_not_a_batch_of_tokens(session: OrtSession) -> None:
    state = session.initial_state(2)
    for bad in ([[1, 2]], [[1], [2, 3]], [[], []], [[1.5], [2.5]], [[256], [0]]):
        with pytest.raises(InputError):
            session.prefill(bad, state)
