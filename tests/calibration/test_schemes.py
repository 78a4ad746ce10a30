"""Every scheme of every version: runs in ONNX Runtime, and builds with TensorRT for RTX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rwkv_edge.artifact import Artifact
from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
from rwkv_edge.calibration.schemes import SchemeOptions
from rwkv_edge.errors import InputError
from rwkv_edge.exporters.tensorrt import BuildOptions, build_engines
from rwkv_edge.runtime.ort_graph import saturates
from rwkv_edge.runtime.session import open_session

VERSIONS = ("4", "5.2", "6", "7", "7a")
CHOICES = {
    "w8a8": SchemeOptions("w8a8"),
    "w8": SchemeOptions("w8", embedding="int8"),
    "w4": SchemeOptions("w4", block=64, head="int4"),
    "w8-cpu": SchemeOptions("w8", target="cpu"),
    "w4-cpu": SchemeOptions("w4", target="cpu"),
}
TOLERANCE = {"w8a8": 0.1, "w8": 0.1, "w4": 0.5, "w8-cpu": 0.1, "w4-cpu": 0.5}
TOKENS = [[int(t) for t in np.random.default_rng(1).integers(0, 256, 37)]]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("version", VERSIONS)
def test_runs_near_the_float_model(version: str, choice: str, calibrated: Callable, tmp_path: Path) -> None:
    source = calibrated(version)
    quantize_artifact(source.artifact, tmp_path / "q", QuantizeOptions(CHOICES[choice]), source.calibration)
    found = logits_of(tmp_path / "q")
    expected = logits_of(source.artifact)
    assert np.isfinite(found).all()
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0 < error < TOLERANCE[choice]


def test_only_static_products_ask_for_precision(calibrated: Callable, tmp_path: Path) -> None:
    """All integer weights have static inputs; a graph with one that has none would not run with that option."""
    source = calibrated("7")
    for name in CHOICES:
        quantize_artifact(source.artifact, tmp_path / name, QuantizeOptions(CHOICES[name]), source.calibration)
        assert saturates((tmp_path / name / "step.onnx").read_bytes()) == (name == "w8a8")
    formats = dict(Artifact.open(tmp_path / "w8a8").manifest.quantization["formats"])
    formats["blocks.0.ffn.key"] = "w8"
    options = QuantizeOptions(CHOICES["w8a8"], formats=formats)
    quantize_artifact(source.artifact, tmp_path / "both", options, source.calibration)
    assert not saturates((tmp_path / "both" / "step.onnx").read_bytes())
    assert np.isfinite(logits_of(tmp_path / "both")).all()


BUILT = [(version, "w8a8") for version in VERSIONS]
BUILT += [(version, choice) for version in ("5.2", "7") for choice in ("w8", "w4")]


@pytest.mark.parametrize(("version", "choice"), BUILT)
def test_builds_for_tensorrt_rtx(version: str, choice: str, calibrated: Callable, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    source = calibrated(version, "fp16")
    options = SchemeOptions(choice, block=64, head="int4" if choice == "w4" else "int8")
    quantize_artifact(source.artifact, tmp_path / "q", QuantizeOptions(options), source.calibration)
    manifest = build_engines(tmp_path / "q", BuildOptions("tensorrt-rtx", ("sm86",)))
    assert {engine.kind for engine in manifest.engines} == {"step", "prefill"}


def test_int4_is_refused_before_sm80(calibrated: Callable, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    source = calibrated("7", "fp16")
    quantize_artifact(source.artifact, tmp_path / "q", QuantizeOptions(SchemeOptions("w4")), source.calibration)
    with pytest.raises(InputError, match=r"INT4.*sm80"):
        build_engines(tmp_path / "q", BuildOptions("tensorrt-rtx", ("sm75",)))
    assert Artifact.open(tmp_path / "q").manifest.engines == ()


def logits_of(folder: Path) -> np.ndarray:
    """Of the last token, by chunks and steps."""
    session = open_session(folder, threads=1)
    logits = session.prefill(TOKENS, session.initial_state())
    session.close()
    return logits
