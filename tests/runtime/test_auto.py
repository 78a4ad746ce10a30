"""Which backend ``auto`` takes."""

from __future__ import annotations

from pathlib import Path

import cuda_double
import pytest
from tiny import write_artifact

from rwkv_edge.artifact import Artifact
from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
from rwkv_edge.calibration.schemes import SchemeOptions
from rwkv_edge.errors import MissingDependencyError
from rwkv_edge.plugins.fused_spec import FusedKernel
from rwkv_edge.runtime.auto import kernels_fit
from rwkv_edge.runtime.cuda import CudaSession
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.session import open_session


@pytest.fixture
def gpu_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_edge.runtime.cuda.Driver", cuda_double.Driver)
    monkeypatch.setattr(FusedKernel, "ptx", cuda_double.described)
    monkeypatch.setattr("rwkv_edge.runtime.cuda_driver.device_capability", lambda ordinal=0: (9, 0))
    monkeypatch.setattr("rwkv_edge.plugins.nvrtc.nvrtc_version", lambda: (13, 0))


def test_kernels_where_there_is_a_gpu(tmp_path: Path, gpu_of_numpy: None) -> None:
    folder = write_artifact(tmp_path / "model", 0)
    session, other = open_session(folder), open_session(folder, backend="onnxruntime")
    assert isinstance(session, CudaSession)
    assert isinstance(other, OrtSession)
    found = session.step([1], session.initial_state())
    assert abs(found - other.step([1], other.initial_state())).max() < 1e-4


@pytest.mark.parametrize("options", [{"providers": ["cpu"]}, {"threads": 1}, {"prepack": True}])
def test_what_is_of_onnx_runtime_alone_chooses_it(
    options: dict[str, object], tmp_path: Path, gpu_of_numpy: None
) -> None:
    assert isinstance(open_session(write_artifact(tmp_path / "model", 0), **options), OrtSession)  # type: ignore[arg-type]


def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_edge.runtime.cuda_driver.device_capability", lambda ordinal=0: None)
    assert isinstance(open_session(write_artifact(tmp_path / "model", 0)), OrtSession)


def test_what_does_not_fit(tmp_path: Path, gpu_of_numpy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations in int8, an old GPU, a missing package."""
    folder = write_artifact(tmp_path / "model", 0)
    artifact = Artifact.open(folder)
    assert kernels_fit(artifact)
    quantize_artifact(folder, tmp_path / "cpu", QuantizeOptions(SchemeOptions("w8", target="cpu")))
    assert not kernels_fit(Artifact.open(tmp_path / "cpu"))
    assert isinstance(open_session(tmp_path / "cpu"), OrtSession)
    monkeypatch.setattr("rwkv_edge.runtime.cuda_driver.device_capability", lambda ordinal=0: (7, 0))
    assert not kernels_fit(artifact)

    def missing(ordinal: int = 0) -> None:
        raise MissingDependencyError("cuda-bindings", "cuda", "running kernels on an NVIDIA GPU")

    monkeypatch.setattr("rwkv_edge.runtime.cuda_driver.device_capability", missing)
    assert not kernels_fit(artifact)
