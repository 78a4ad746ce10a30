"""The search for the kernels' choices, with numpy in the GPU's place: times are made up, everything else runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import cuda_double
import pytest
from click.testing import CliRunner
from tiny import write_artifact

from rwkv_edge.artifact import Artifact
from rwkv_edge.cli import cli
from rwkv_edge.errors import InputError
from rwkv_edge.evaluation import tune as tuning
from rwkv_edge.plugins.fused_spec import Choice, FusedKernel, Stored, Tuning
from rwkv_edge.runtime.cuda import CudaSession
from rwkv_edge.runtime.cuda_tuning import LARGE, SMALL, keep_tuning, tuning_file, tuning_for, tuning_from_json

if TYPE_CHECKING:
    from rwkv_edge.runtime.cuda_state import CudaState


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("rwkv_edge.runtime.cuda.Driver", cuda_double.Driver)
    monkeypatch.setattr(FusedKernel, "ptx", cuda_double.described)
    monkeypatch.setenv("RWKV_EDGE_CACHE", str(tmp_path / "cache"))
    return write_artifact(tmp_path / "model", 0)


BEST = replace(SMALL, channel_mix_out=Choice(16, 1, ahead=24), time_mix_in=Choice(64, threads=128), skip=True)
WIDE_FROM = 4


def cost(self: CudaSession, state: CudaState, count: int) -> float:
    """Seconds that are least with `BEST`, and with wide kernels from `WIDE_FROM` streams on."""
    del count
    if state.batch > 1:
        return float(WIDE_FROM - 0.5 if state.batch >= self.tuning.wide_from else state.batch)
    parts = [getattr(self.tuning, name) != getattr(BEST, name) for name in vars(BEST)]
    near = sum(
        getattr(getattr(self.tuning, name), field) != getattr(getattr(BEST, name), field)
        for name in ("channel_mix_out", "time_mix_in")
        for field in ("tile", "split", "ahead", "threads")
    )
    return 1e-3 * (1 + sum(parts) + near)


def test_finds_the_fastest_and_keeps_it(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaSession, "step_seconds", cost)
    result = CliRunner().invoke(cli, ["tune", str(artifact), "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["after"] < found["before"]
    assert found["tried"] > 20
    best = replace(BEST, wide_from=WIDE_FROM)
    assert tuning_from_json(found["tuning"]) == best
    session = CudaSession(Artifact.open(artifact))
    assert session.tuning == best


def test_words(artifact: Path) -> None:
    result = CliRunner().invoke(cli, ["tune", str(artifact), "--seconds", "1"])
    assert result.exit_code == 0, result.output
    assert "us a step; trying channel_mix_out" in result.output
    assert "kept in " in result.output


def test_results_stay_the_same(artifact: Path) -> None:
    """Choices change the order of sums alone; a state goes on over a change of them."""
    session = CudaSession(Artifact.open(artifact))
    state, other = session.initial_state(), session.initial_state()
    expected = [session.step([token], other) for token in (1, 2, 3)]
    found = [session.step([1], state)]
    session.retune(replace(LARGE, channel_mix_out=Choice(16, 1)))
    found += [session.step([token], state) for token in (2, 3)]
    for a, b in zip(found, expected, strict=True):
        assert abs(a - b).max() <= 1e-5 * abs(b).max()


def test_no_gpu_in_time_is_the_start(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaSession, "step_seconds", cost)
    session = CudaSession(Artifact.open(artifact))
    found = tuning.tune(session, seconds=0)
    assert found.tuning == session.tuning == SMALL
    assert found.tried == 1


def test_damaged_files_are_done_without(artifact: Path) -> None:
    session = CudaSession(Artifact.open(artifact))
    dimensions = session._dimensions
    keep_tuning("gpu", dimensions, {}, BEST)
    assert tuning_for("gpu", dimensions, {}) == BEST
    assert tuning_for("another", dimensions, {}) == SMALL
    assert tuning_for("another", dimensions, {"emb": Stored("int8")}) == SMALL
    assert tuning_for("another", dimensions, {"head": Stored("int8")}) == replace(SMALL, eager=False)
    path = tuning_file("gpu", dimensions, {})
    good = json.loads(path.read_text())
    for text in ("", "[]", "{}", json.dumps({**good, "format": 99}), json.dumps({**good, "tuning": {"skip": 1}})):
        path.write_text(text)
        assert tuning_for("gpu", dimensions, {}) == SMALL


@pytest.mark.parametrize(
    "wrong", [{"skip": 1}, {"wide_from": True}, {"head": {"tile": 0, "split": 1, "ahead": 1, "threads": 32}}]
)
def test_fields_are_checked(wrong: dict[str, object]) -> None:
    data = json.loads(json.dumps({name: vars(v) if isinstance(v, Choice) else v for name, v in vars(Tuning()).items()}))
    assert tuning_from_json(data) == Tuning()
    with pytest.raises(InputError, match="must"):
        tuning_from_json({**data, **wrong})
