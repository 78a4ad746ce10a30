"""Tuned states: found in a file of their own or in a checkpoint, in the file's orientation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layout_writers import Weights, save_bin, save_st, web_rwkv

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.checkpoints.states import load_tuned_state
from rwkv_edge.cli import run
from rwkv_edge.errors import CheckpointError
from rwkv_edge.evaluation.synthetic import Shape7, random_v7
from rwkv_edge.models.versions import model_from_checkpoint

V7 = random_v7(Shape7(3, 64, 48, head_size=16, ranks=(8, 8, 4, 12)), dtype=torch.float16)
STATE = {f"blocks.{i}.att.time_state": torch.randn(4, 16, 16) for i in range(3)}
SHIFTS = {f"blocks.{i}.{half}.ts_state": torch.randn(64) for i in range(3) for half in ("att", "ffn")}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_bin(V7, tmp_path / "model.pth")


def _state(path: Path, tensors: Weights) -> Path:
    return save_bin(tensors, path / "state.pth")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_in_a_file(dtype: torch.dtype, model: Path, tmp_path: Path) -> None:
    spec = model_from_checkpoint(open_checkpoint(model)).spec
    found = load_tuned_state(_state(tmp_path, {n: t.to(dtype) for n, t in STATE.items()}), spec)
    assert list(found.wkv) == [0, 1, 2]
    assert found.names == tuple(STATE)
    assert not found.att_shift
    for i, tensor in found.wkv.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, STATE[f"blocks.{i}.att.time_state"].to(dtype))


def test_a_state_inside_a_checkpoint(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = {**V7, **{n: t.half() for n, t in STATE.items()}}
    spec = model_from_checkpoint(open_checkpoint(model)).spec
    paths = [save_bin(both, tmp_path / "both.pth"), save_st(web_rwkv(both), tmp_path / "both.st")]
    paths.append(save_st(web_rwkv(both), tmp_path / "both.safetensors"))
    for path in paths:
        for source in (path, open_checkpoint(path)):
            found = load_tuned_state(source, spec)
            assert torch.equal(found.wkv[1], STATE["blocks.1.att.time_state"].half())
    assert run(["info", "--no-probe", str(paths[0])]) == 0
    assert "with a tuned state" in capsys.readouterr().out


def test_the_form_of_web_rwkv_is_told_by_the_suffix(model: Path, tmp_path: Path) -> None:
    spec = model_from_checkpoint(open_checkpoint(model)).spec
    stored = web_rwkv(STATE)
    assert not torch.equal(stored["blocks.1.att.time_state"], STATE["blocks.1.att.time_state"].half())
    found = load_tuned_state(save_st(stored, tmp_path / "state.st"), spec)
    assert torch.equal(found.wkv[1], STATE["blocks.1.att.time_state"].half())
    kept = load_tuned_state(save_st(STATE, tmp_path / "state.safetensors"), spec)
    assert torch.equal(kept.wkv[1], STATE["blocks.1.att.time_state"])


def test_token_shifts_of_fullstate_tuning(model: Path, tmp_path: Path) -> None:
    spec = model_from_checkpoint(open_checkpoint(model)).spec
    found = load_tuned_state(_state(tmp_path, {**STATE, **SHIFTS}), spec)
    assert torch.equal(found.att_shift[2], SHIFTS["blocks.2.att.ts_state"])
    assert torch.equal(found.ffn_shift[0], SHIFTS["blocks.0.ffn.ts_state"])
    assert set(found.names) == set(STATE) | set(SHIFTS)


def _without(name: str, tensors: Weights) -> Weights:
    return {other: tensor for other, tensor in tensors.items() if other != name}


ILL: dict[str, tuple[Weights, str]] = {
    "layer left out": (_without("blocks.1.att.time_state", STATE), "state of 2 layers, but none of layer 1"),
    "shift left out": (_without("blocks.0.ffn.ts_state", {**STATE, **SHIFTS}), "but none of layer 0"),
    "layer too many": ({**STATE, "blocks.3.att.time_state": torch.zeros(4, 16, 16)}, "which has 3 layers"),
    "heads": ({**STATE, "blocks.2.att.time_state": torch.zeros(2, 16, 16)}, r"\[2, 16, 16\] does not fit"),
    "flat": ({**STATE, "blocks.2.att.time_state": torch.zeros(1024)}, r"\[1024\] does not fit"),
    "shift": ({**STATE, **SHIFTS, "blocks.2.att.ts_state": torch.zeros(65)}, r"\[65\] does not fit"),
    "no state": (V7, "holds no tuned state"),
    "shifts alone": (SHIFTS, "holds no tuned state"),
    "twice": ({**STATE, "model.blocks.0.att.time_state": torch.zeros(4, 16, 16)}, "are for one place"),
}


@pytest.mark.parametrize("name", ILL)
def test_a_state_that_does_not_fit(name: str, model: Path, tmp_path: Path) -> None:
    tensors, words = ILL[name]
    spec = model_from_checkpoint(open_checkpoint(model)).spec
    with pytest.raises(CheckpointError, match=words):
        load_tuned_state(_state(tmp_path, tensors), spec)


def test_a_state_of_another_model(model: Path, tmp_path: Path) -> None:
    spec = replace(model_from_checkpoint(open_checkpoint(model)).spec, head_size=8, n_head=8)
    with pytest.raises(CheckpointError, match=r"states of shape \[8, 8, 8\]"):
        load_tuned_state(_state(tmp_path, STATE), spec)


def test_info_describes_a_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _state(tmp_path, {**STATE, **SHIFTS})
    assert run(["info", str(path)]) == 0
    text = capsys.readouterr().out
    for part in ("tuned state, with token shifts", "3: 0 to 2", "[4, 16, 16]", "float32"):
        assert part in text
    assert run(["info", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == [0, 1, 2]
