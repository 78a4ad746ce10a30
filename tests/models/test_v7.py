"""RWKV-7 against the `rwkv` package and against recorded logits of rwkv.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import Oracle
from parity import exported_session, random_tokens, relative, worst_state

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.synthetic import OFFICIAL_7, Shape7, random_v7, save_pth
from rwkv_edge.models.torch_ops import TorchModel
from rwkv_edge.models.versions import model_from_checkpoint

CASES = {
    "plain": (Shape7(3, 128), torch.float32),
    "one layer": (Shape7(1, 128), torch.float32),
    "head size 32": (Shape7(2, 96, head_size=32), torch.float32),
    "head size 8": (Shape7(2, 32, head_size=8), torch.float32),
    "odd ranks": (Shape7(2, 128, ranks=(7, 24, 5, 40)), torch.float32),
    "odd ffn": (Shape7(2, 128, ffn_mult=2.5), torch.float32),
    "bf16 file": (Shape7(2, 128), torch.bfloat16),
    "no v0 in layer 0": (Shape7(2, 128, value_residual_in_first_layer=False), torch.float32),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_rwkv_package(case: str, tmp_path: Path) -> None:
    shape, dtype = CASES[case]
    path = save_pth(random_v7(shape, seed=3, dtype=dtype), tmp_path / "model.pth")
    tokens = random_tokens(64, shape.vocab_size)
    oracle = Oracle(path, "7")
    expected, expected_state = oracle.steps(tokens)
    session = exported_session(path, tmp_path / "artifact")
    state = session.initial_state()
    found = np.stack([session.step([token], state)[0] for token in tokens])
    assert relative(found, expected) < 1e-4
    assert worst_state(session.export_state(state), oracle.named_state(expected_state))[0] < 1e-4


@pytest.mark.slow
def test_equals_the_rwkv_package_at_the_smallest_released_size(tmp_path: Path) -> None:
    shape = OFFICIAL_7["0.1B"]
    path = save_pth(random_v7(shape, dtype=torch.bfloat16), tmp_path / "model.pth")
    tokens = random_tokens(64, shape.vocab_size)
    oracle = Oracle(path, "7")
    expected, expected_state = oracle.steps(tokens)
    session = exported_session(path, tmp_path / "artifact")
    state = session.initial_state()
    found = np.stack([session.step([token], state)[0] for token in tokens])
    assert relative(found, expected) < 1e-4
    assert worst_state(session.export_state(state), oracle.named_state(expected_state))[0] < 1e-4


@pytest.mark.parametrize("wkv", ["inline", "function"])
def test_recorded_logits_of_rwkv_cpp(wkv: str, shared_models: Path, tmp_path: Path) -> None:
    session = exported_session(shared_models / "tiny-rwkv-7v0-834K.pth", tmp_path / "artifact", wkv=wkv)
    found = session.prefill([list(b'"in')], session.initial_state())[0]
    expected = np.load(shared_models / "tiny-rwkv-7v0-834K.logits.npy")
    assert np.abs(found - expected).max() < 1e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pth(random_v7(Shape7(2, 128), seed=5), tmp_path_factory.mktemp("model") / "model.pth")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_function_form_gives_the_same_logits(precision: str, checkpoint: Path, tmp_path: Path) -> None:
    tokens = random_tokens(16, 256)
    logits = []
    for wkv in ("inline", "function"):
        session = exported_session(checkpoint, tmp_path / wkv, precision=precision, wkv=wkv)
        state = session.initial_state()
        logits.append(np.stack([session.step([token], state)[0] for token in tokens]))
    assert relative(logits[1], logits[0]) < 1e-6


@pytest.mark.parametrize("batch", [3, None])
def test_streams_of_a_batch_are_independent(batch: int | None, checkpoint: Path, tmp_path: Path) -> None:
    session = exported_session(checkpoint, tmp_path / "batch", batch=batch)
    single = exported_session(checkpoint, tmp_path / "single")
    tokens = np.array([random_tokens(20, 256, seed) for seed in range(3)])
    state = session.initial_state(3)
    found = [session.step(column, state) for column in tokens.T]
    for row in range(3):
        alone = single.initial_state()
        expected = [single.step([token], alone)[0] for token in tokens[row]]
        assert relative(np.stack([logits[row] for logits in found]), np.stack(expected)) < 1e-5


def test_torch_sequence_equals_torch_steps_from_a_state(checkpoint: Path) -> None:
    model = TorchModel(model_from_checkpoint(open_checkpoint(checkpoint)), torch.float64)
    tokens = np.array([random_tokens(33, 256, seed) for seed in range(2)])
    _, begun = model.forward(tokens[:, :9], model.initial_state(2))
    at_once, state_at_once = model.forward(tokens[:, 9:], begun)
    state = begun
    for t in range(9, 33):
        logits, state = model.forward(tokens[:, t : t + 1], state)
    assert torch.allclose(at_once, logits, atol=1e-12)
    assert all(torch.allclose(state[name], tensor, atol=1e-12) for name, tensor in state_at_once.items())


def test_graph_has_at_most_a_thousand_nodes_at_twelve_layers(tmp_path: Path) -> None:
    path = save_pth(random_v7(Shape7(12, 64)), tmp_path / "model.pth")
    session = exported_session(path, tmp_path / "artifact")
    assert session.spec.n_layer == 12
    from rwkv_edge.artifact import Artifact

    assert Artifact.open(tmp_path / "artifact").manifest.graphs[0].nodes <= 1000
