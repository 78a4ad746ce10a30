"""State tuning: the artifact begins with the tuned state, which equals feeding that state by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from makers import MAKERS
from oracle import Oracle
from parity import exported_session, random_tokens, relative

from rwkv_edge.cli import run
from rwkv_edge.evaluation.synthetic import save_pth


def tuned(layers: int = 2, heads: int = 2, size: int = 64) -> dict[str, torch.Tensor]:
    """What state tuning writes: [head, value, key] of every layer."""
    generator = torch.Generator().manual_seed(4)
    shape = (heads, size, size)
    return {f"blocks.{i}.att.time_state": torch.randn(shape, generator=generator) for i in range(layers)}


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_equals_feeding_the_state_by_hand(version: str, tmp_path: Path) -> None:
    path = save_pth(MAKERS[version](), tmp_path / "model.pth")
    states = tuned()
    common: dict[str, object] = {"batch": None, "chunks": (16,)}
    session = exported_session(path, tmp_path / "tuned", state=save_pth(states, tmp_path / "state.pth"), **common)
    plain = exported_session(path, tmp_path / "plain", **common)
    by_hand = plain.export_state(plain.initial_state(2))
    for i in range(2):
        matrix = states[f"blocks.{i}.att.time_state"].numpy()
        by_hand[f"wkv.{i}"][:] = matrix if version == "7" else matrix.transpose(0, 2, 1)
    tokens = np.array([random_tokens(40, 256, seed) for seed in range(2)])
    found = session.prefill(tokens, session.initial_state(2))
    assert np.array_equal(found, plain.prefill(tokens, plain.import_state(by_hand)))
    assert relative(found, plain.prefill(tokens, plain.initial_state(2))) > 1e-2


@pytest.mark.parametrize("version", ["5.2", "6"])
def test_a_state_inside_the_checkpoint_equals_the_rwkv_package(version: str, tmp_path: Path) -> None:
    path = save_pth({**MAKERS[version](), **tuned()}, tmp_path / "model.pth")
    tokens = random_tokens(30, 256)
    expected, _ = Oracle(path, version).steps(tokens)
    session = exported_session(path, tmp_path / "artifact")
    state = session.initial_state()
    found = np.stack([session.step([token], state)[0] for token in tokens])
    assert relative(found, expected) < 1e-4


def test_verify_begins_with_the_tuned_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_pth(MAKERS["7"](), tmp_path / "model.pth")
    save_pth(tuned(), tmp_path / "state.pth")
    target = str(tmp_path / "artifact")
    assert run(["export", str(path), "-o", target, "--state", str(tmp_path / "state.pth"), "--chunk", "0"]) == 0
    assert run(["verify", target, str(path), "--tokens", "8"]) == 0
    assert "passed" in capsys.readouterr().out


@pytest.mark.parametrize(("version", "states"), [("7", tuned(layers=1)), ("7", tuned(size=32)), ("4", tuned())])
def test_a_state_that_does_not_fit(
    version: str, states: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_pth(MAKERS[version](), tmp_path / "model.pth")
    save_pth(states, tmp_path / "state.pth")
    code = run(["export", str(path), "-o", str(tmp_path / "a"), "--state", str(tmp_path / "state.pth")])
    assert code == 1
    assert "state" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
