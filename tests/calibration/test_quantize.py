"""Quantized artifacts: what is written, what says so, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny import content, refusal, write_artifact, write_checkpoint

from rwkv_edge.artifact import Artifact
from rwkv_edge.calibration import quantize as module
from rwkv_edge.calibration.gptq import gptq, inverse_factor
from rwkv_edge.calibration.loss import LossChange, LossMeter
from rwkv_edge.calibration.mixed import mixed_formats
from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
from rwkv_edge.calibration.rounding import rounded
from rwkv_edge.calibration.schemes import SchemeOptions, planned_formats
from rwkv_edge.calibration.sensitivity import sensitivity
from rwkv_edge.cli import run
from rwkv_edge.errors import ArtifactError, CalibrationError, InputError
from rwkv_edge.models.versions import architecture_named
from rwkv_edge.runtime.onnxruntime import OrtSession


def test_says_so_everywhere(calibrated: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = calibrated("7")
    quantize_artifact(source.artifact, tmp_path / "q", QuantizeOptions(SchemeOptions("w8a8")), source.calibration)
    facts = Artifact.open(tmp_path / "q").manifest.quantization
    assert facts is not None
    assert facts["scheme"] == "w8a8"
    assert facts["texts"][0]["name"] == "numbers"
    assert facts["formats"]["blocks.0.att.output"] == facts["formats"]["blocks.1.att.w1"] == "float"
    assert facts["formats"]["blocks.1.att.output"] == facts["formats"]["head"] == "w8a8"
    graph = onnx.load(tmp_path / "q" / "step.onnx", load_external_data=False)
    assert "w8a8" in {p.key: p.value for p in graph.metadata_props}["rwkv_edge.quantization"]
    capsys.readouterr()
    assert run(["info", str(tmp_path / "q"), "--no-probe"]) == 0
    assert "quantized    w8a8, standard Q/DQ" in capsys.readouterr().out
    assert run(["generate", str(tmp_path / "q"), "a", "-n", "2"]) == 0
    assert "quantized, w8a8" in capsys.readouterr().err
    Artifact.open(tmp_path / "q").check_content()


def test_earlier_manifests_open(calibrated: Callable, tmp_path: Path) -> None:
    folder = shutil.copytree(calibrated("7").artifact, tmp_path / "old")
    data = json.loads((folder / "manifest.json").read_bytes())
    del data["quantization"]
    (folder / "manifest.json").write_text(json.dumps(data))
    assert Artifact.open(folder).manifest.quantization is None


def test_twice_the_same(calibrated: Callable, tmp_path: Path) -> None:
    source = calibrated("7")
    for name in "ab":
        quantize_artifact(source.artifact, tmp_path / name, QuantizeOptions(SchemeOptions("w4")), source.calibration)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_activation_scales_are_part_of_the_hash(calibrated: Callable, tmp_path: Path) -> None:
    """States of two artifacts that only differ in ranges must not be exchanged."""
    source = calibrated("7")
    shutil.copytree(source.calibration.parent, tmp_path / "c", ignore=shutil.ignore_patterns("float", "*.pth"))
    data = json.loads((tmp_path / "c" / "calibration.json").read_bytes())
    data["method"] = "minmax"
    (tmp_path / "c" / "calibration.json").write_text(json.dumps(data))
    options = QuantizeOptions(SchemeOptions("w8a8"), 0.0)
    first = quantize_artifact(source.artifact, tmp_path / "a", options, source.calibration)
    second = quantize_artifact(source.artifact, tmp_path / "b", options, tmp_path / "c" / "calibration.json")
    assert first.model_hash != second.model_hash


def test_session_packs_weights_of_quantized_artifacts(calibrated: Callable, tmp_path: Path) -> None:
    source = calibrated("7")
    quantize_artifact(source.artifact, tmp_path / "q", QuantizeOptions(SchemeOptions("w8")), source.calibration)
    session = OrtSession(Artifact.open(tmp_path / "q"), threads=1)
    assert session.numerics.endswith("prepacked")
    session.close()


def test_export_int8_does_all_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "model.pth")
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}. " for i in range(200)))
    target = tmp_path / "q"
    arguments = ["export", checkpoint, "-o", target, "--chunk", "16", "--int8", tmp_path / "text.txt"]
    assert run([str(a) for a in arguments]) == 0
    assert "w8a8" in capsys.readouterr().out
    assert Artifact.open(target).manifest.quantization["scheme"] == "w8a8"
    assert {path.name for path in tmp_path.iterdir()} == {"model.pth", "text.txt", "q"}
    (tmp_path / "text.txt").write_text("short")
    assert "too short" in refusal(capsys, *arguments[:3], tmp_path / "r", *arguments[4:])
    assert "bf16" in refusal(capsys, *arguments[:3], tmp_path / "r", *arguments[4:], "--precision", "bf16")
    assert {path.name for path in tmp_path.iterdir()} == {"model.pth", "text.txt", "q"}


COST = {"w4": 0.01, "w8": 0.0001}
"""Nats that every linear of these groups adds; those of the last layer's feed-forward part add ten times as much."""

EXPECTED = {0.5: {"w4": 11, "w8": 3, "float": 1}, 0.0015: {"w8": 11, "float": 4}}
"""Budget → formats of RWKV-4's 15 linears, of which the version keeps one in float."""


class PlantedMeter(LossMeter):
    """Losses that are known: they add up."""

    def change(self, formats: Mapping[str, str]) -> LossChange:
        costs = (COST[form] * (10 if "1.ffn" in name else 1) for name, form in formats.items() if form != "float")
        return LossChange(sum(costs), 0.0)


@pytest.mark.parametrize("budget", [0.5, 0.1, 0.05, 0.03, 0.0015, 0.0005])
def test_mixed_is_the_smallest_within_its_budget(
    budget: float, calibrated: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rwkv_edge.calibration.sensitivity.LossMeter", PlantedMeter)
    source = calibrated("4")
    plan = mixed_formats(source.artifact, source.calibration, budget, tokens=64, threads=1)
    assert 0 < plan.change.nats <= np.log1p(budget)
    assert PlantedMeter.change(None, plan.formats).nats == pytest.approx(plan.change.nats)  # type: ignore[arg-type]
    counts = Counter(plan.formats.values())
    if budget in EXPECTED:
        assert counts == EXPECTED[budget]
    options = QuantizeOptions(SchemeOptions("mixed"), formats=plan.formats, notes=plan.notes())
    manifest = quantize_artifact(source.artifact, tmp_path / "q", options, source.calibration)
    assert manifest.quantization is not None
    assert manifest.quantization["formats"] == plan.formats
    assert manifest.quantization["budget"] == budget


def test_mixed_that_cannot_be(calibrated: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_edge.calibration.sensitivity.LossMeter", PlantedMeter)
    source = calibrated("7")
    with pytest.raises(CalibrationError, match="less than what int8 costs"):
        mixed_formats(source.artifact, source.calibration, 1e-9, tokens=64, threads=1)
    with pytest.raises(InputError, match="budget"):
        mixed_formats(source.artifact, source.calibration, 2.0)


def test_sensitivity_names_every_group(calibrated: Callable) -> None:
    source = calibrated("6")
    found = sensitivity(source.artifact, source.calibration, tokens=64, threads=1)
    assert {g.group for g in found.groups} == {"blocks.0.att", "blocks.0.ffn", "blocks.1.att", "blocks.1.ffn", "head"}
    by_form = {form: sum(abs(g.nats) for g in found.groups if g.form == form) for form in ("w4", "w8")}
    assert by_form["w4"] > by_form["w8"] > 0
    assert all(g.nbytes < g.float_nbytes for g in found.groups)
    assert "blocks.1.ffn" in found.to_text()


@pytest.mark.parametrize("version", ["4", "5.0", "5.1", "5.2", "6", "7", "7a"])
def test_versions_keep_what_feeds_the_state(version: str) -> None:
    architecture = architecture_named(version)
    names = ["blocks.0.att.output", "blocks.1.att.output", "blocks.1.ffn.key", "head", "blocks.1.att.g1"]
    kept = {"6": ["blocks.1.att.decay.w1", "blocks.1.att.mix.w1"], "7": ["blocks.1.att.w1", "blocks.1.att.a2"]}
    names += kept.get(version[0], [])
    formats = planned_formats(dict.fromkeys(names, (64, 64)), architecture, SchemeOptions("w4"))
    assert formats["blocks.0.att.output"] == "float"
    assert all(formats[name] == "float" for name in kept.get(version[0], []))
    assert formats["blocks.1.ffn.key"] == "w4"
    assert formats["blocks.1.att.g1"] == ("w8" if version[0] == "7" else "w4")
    narrow = planned_formats({"blocks.1.ffn.key": (48, 64)}, architecture, SchemeOptions("w4"))
    assert narrow == {"blocks.1.ffn.key": "w8"}, "48 inputs are no multiple of a block"


# The arithmetic of rounding


def test_scales_of_least_error_beat_those_of_the_peak() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_t(4, size=(64, 32)).astype(np.float32)
    for bits, limit in ((4, 7), (8, 127)):
        best = rounded(weight, bits, 32, None).restored()
        scale = np.abs(weight.reshape(2, 32, 32)).max(1, keepdims=True) / limit
        plain = (np.rint(weight.reshape(2, 32, 32) / scale) * scale).reshape(64, 32)
        assert ((best - weight) ** 2).sum() < ((plain - weight) ** 2).sum()


def test_importance_moves_error_to_what_does_not_matter() -> None:
    random = np.random.default_rng(1)
    weight = random.normal(size=(32, 16)).astype(np.float32)
    importance = np.where(np.arange(32) < 4, 1000.0, 1.0)
    plain, weighed = rounded(weight, 4, None, None).restored(), rounded(weight, 4, None, importance).restored()
    error = [(((w - weight) ** 2) * importance[:, None]).sum() for w in (plain, weighed)]
    assert error[1] < error[0]


def test_gptq_beats_rounding_on_correlated_inputs() -> None:
    random = np.random.default_rng(2)
    inputs = random.normal(size=(512, 8)) @ random.normal(size=(8, 64)) + 0.1 * random.normal(size=(512, 64))
    hessian = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    weight = random.normal(size=(64, 24)).astype(np.float32)
    for block in (32, None):
        errors = [
            np.linalg.norm(inputs @ (found.restored() - weight))
            for found in (gptq(weight, hessian, 4, block), rounded(weight, 4, block, np.diagonal(hessian)))
        ]
        assert errors[0] < 0.7 * errors[1]


def test_gptq_of_independent_inputs_is_rounding() -> None:
    weight = np.random.default_rng(3).normal(size=(32, 8)).astype(np.float32)
    found, plain = gptq(weight, np.eye(32, dtype=np.float32), 4, 32), rounded(weight, 4, 32, None)
    assert np.array_equal(found.values, plain.values)
    assert np.array_equal(found.scales, plain.scales)


def test_factor_is_that_of_the_inverse() -> None:
    random = np.random.default_rng(4)
    inputs = random.normal(size=(100, 16))
    hessian = inputs.T @ inputs
    upper = inverse_factor(hessian).astype(np.float64)
    damped = hessian + 0.01 * np.diagonal(hessian).mean() * np.eye(16)
    assert np.allclose(upper.T @ upper @ damped, np.eye(16), atol=1e-4)
    assert np.array_equal(upper, np.triu(upper))


# What is refused


def test_calibration_of_another_model(calibrated: Callable, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="another model"):
        quantize_artifact(
            write_artifact(tmp_path / "other", 7), tmp_path / "q", calibration=calibrated("7").calibration
        )
    assert not (tmp_path / "q").exists()


def test_quantized_already(calibrated: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = calibrated("7")
    quantize_artifact(source.artifact, tmp_path / "q", None, source.calibration)
    (tmp_path / "t.txt").write_text("a text " * 1000)
    for command in (
        ["quantize", tmp_path / "q", "-o", tmp_path / "r"],
        ["calibrate", tmp_path / "q", "--text", tmp_path / "t.txt", "-o", tmp_path / "c.json"],
        ["sensitivity", tmp_path / "q", "--calibration", source.calibration],
    ):
        assert "quantized already (w8)" in refusal(capsys, *command)
    assert not (tmp_path / "r").exists()


def test_what_cannot_be_meant(calibrated: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = calibrated("7"), tmp_path / "q"
    assert "needs a calibration" in refusal(capsys, "quantize", source.artifact, "--scheme", "w8a8", "-o", out)
    assert "needs a calibration" in refusal(capsys, "quantize", source.artifact, "--scheme", "mixed", "-o", out)
    given = ("quantize", source.artifact, "--calibration", source.calibration, "-o", out)
    assert "no use for the ranges" in refusal(capsys, *given, "--scheme", "w8a8", "--target", "cpu")
    assert "no percentage" in refusal(capsys, *given, "--scheme", "mixed", "--budget", "lots")
    assert "cannot be read" in refusal(capsys, "quantize", source.artifact, "--calibration", tmp_path / "none")
    assert "not an artifact" in refusal(capsys, "quantize", tmp_path) or not out.exists()


def test_engines_need_the_standard_form(calibrated: Callable, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    from rwkv_edge.exporters.tensorrt import BuildOptions, build_engines

    source = calibrated("7")
    for scheme, expected in ((SchemeOptions(target="cpu"), "for CPUs"), (SchemeOptions(embedding="int8"), "embedding")):
        quantize_artifact(source.artifact, tmp_path / "q", QuantizeOptions(scheme), source.calibration)
        with pytest.raises(InputError, match=expected):
            build_engines(tmp_path / "q", BuildOptions("tensorrt-rtx", ("sm86",)))


def test_full_disk_and_ctrl_c(calibrated: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends it, the artifact that stood there is as it was, and nothing else is left."""
    source = calibrated("7")
    quantize_artifact(source.artifact, tmp_path / "q", None, source.calibration)
    before = content(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    for place, name, fails, expected in (
        (module.Sink, "_write_some", full, ArtifactError),
        (module, "rounded_weight", stopped, KeyboardInterrupt),
    ):
        monkeypatch.setattr(place, name, fails)
        with pytest.raises(expected):
            quantize_artifact(source.artifact, tmp_path / "q", QuantizeOptions(SchemeOptions("w4")), source.calibration)
        monkeypatch.undo()
        assert content(tmp_path) == before
