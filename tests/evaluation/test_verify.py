"""`rwkv-edge verify` of quantized artifacts: judged by what they predict, not by float's tolerance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rwkv_edge.cli import run
from rwkv_edge.evaluation.parity import _report
from rwkv_edge.evaluation.synthetic import Shape7, random_v7, save_pth

SHORT = ("--tokens", "8", "--threads", "1", "--backend", "onnxruntime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, another of the same shape, and the first one's artifact in int8."""
    pytest.importorskip("onnx_graphsurgeon", reason="onnx-graphsurgeon is not installed")
    folder = tmp_path_factory.mktemp("verify")
    for seed, name in enumerate(("one.pth", "other.pth")):
        save_pth(random_v7(Shape7(2, 64), seed), folder / name)
    assert run(["export", str(folder / "one.pth"), "--chunk", "0", "-o", str(folder / "float"), "-q"]) == 0
    assert run(["quantize", str(folder / "float"), "--scheme", "w8", "-o", str(folder / "w8"), "-q"]) == 0
    return folder


def test_a_quantized_artifact_passes_by_its_divergence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["verify", str(folder / "w8"), str(folder / "one.pth"), *SHORT]) == 0
    said = capsys.readouterr().out
    assert "quantized, so judged by its mean KL divergence: at most 0.2 nats per token" in said
    assert run(["verify", str(folder / "w8"), str(folder / "one.pth"), *SHORT, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["measure"] == "kl"
    assert 0 < report["kl_mean"] < report["tolerance"] < 1
    assert report["relative"] > 1e-4  # which float must keep


def test_it_fails_on_another_checkpoint_and_by_a_tolerance_that_was_asked_for(folder: Path) -> None:
    assert run(["verify", str(folder / "w8"), str(folder / "other.pth"), *SHORT]) == 1
    assert run(["verify", str(folder / "w8"), str(folder / "one.pth"), *SHORT, "--tolerance", "1e-4"]) == 1
    assert run(["verify", str(folder / "w8"), str(folder / "one.pth"), *SHORT, "--tolerance", "0.5"]) == 0


def test_a_float_artifact_is_judged_by_differences(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["verify", str(folder / "float"), str(folder / "one.pth"), *SHORT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measure"] == "relative"


@pytest.mark.parametrize("measure", ["relative", "kl"])
def test_what_is_not_finite_never_passes(measure: str) -> None:
    expected = np.zeros((2, 1, 4), np.float32)
    found = expected.copy()
    assert _report(found, expected, ("wkv.0", 0.0), measure, 0.2).passed
    assert not _report(found, expected, ("wkv.0", float("inf")), measure, 0.2).passed
    found[0, 0, 0] = np.nan
    assert not _report(found, expected, ("wkv.0", 0.0), measure, 0.2).passed
