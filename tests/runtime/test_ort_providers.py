"""Names and options of execution providers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import refusal, write_artifact

from rwkv_edge.errors import InputError, SessionError
from rwkv_edge.runtime import ort_providers
from rwkv_edge.runtime.ort_providers import (
    CPU,
    CUDA,
    TENSORRT,
    TENSORRT_RTX,
    Provider,
    checked_providers,
    session_providers,
)


class Installed:
    """An ONNX Runtime with every NVIDIA provider."""

    @staticmethod
    def get_available_providers() -> list[str]:
        return [TENSORRT, TENSORRT_RTX, CUDA, CPU]


@pytest.fixture
def all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_providers, "onnxruntime_module", lambda: Installed)


@pytest.mark.usefixtures("all_installed")
@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cpu", [CPU]),
        ("cuda", [CUDA]),
        ("CUDA", [CUDA]),
        ("CUDAExecutionProvider", [CUDA]),
        ("tensorrt", [TENSORRT, CUDA]),
        ("TensorrtExecutionProvider", [TENSORRT, CUDA]),
        ("nv-tensorrt-rtx", [TENSORRT_RTX, CUDA]),
        ("NvTensorRTRTXExecutionProvider", [TENSORRT_RTX, CUDA]),
    ],
)
def test_names(text: str, names: list[str]) -> None:
    assert [provider.name for provider in checked_providers([text])] == names


@pytest.mark.usefixtures("all_installed")
def test_nothing_named_is_the_cpu() -> None:
    assert checked_providers(None) == checked_providers([]) == [Provider(CPU)]
    assert [p.name for p in checked_providers(["tensorrt", "cpu", "cuda"])] == [TENSORRT, CPU, CUDA]


@pytest.mark.usefixtures("all_installed")
def test_options() -> None:
    (cuda,) = checked_providers(["cuda:device_id=1, gpu_mem_limit=1000"])
    assert cuda == Provider(CUDA, {"device_id": "1", "gpu_mem_limit": "1000"})
    assert cuda.device_id == 1
    assert checked_providers([str(cuda)]) == [cuda]
    assert [p.device_id for p in checked_providers(["tensorrt:device_id=2"])] == [2, 2]


@pytest.mark.usefixtures("all_installed")
def test_what_a_session_asks_for() -> None:
    (chosen,) = checked_providers(["cuda"])
    ((name, options),) = session_providers([chosen], "fp32", capture=True)
    assert (name, options["use_tf32"], options["enable_cuda_graph"]) == (CUDA, "0", "1")
    assert session_providers([chosen], "fp32", capture=False)[0][1]["enable_cuda_graph"] == "0"
    mine = checked_providers(["cuda:use_tf32=1,enable_cuda_graph=0"])
    assert not mine[0].captures
    assert session_providers(mine, "fp32", mine[0].captures)[0][1]["use_tf32"] == "1"
    both = session_providers(checked_providers(["tensorrt"]), "fp16", capture=False)
    assert both[0] == (TENSORRT, {"trt_fp16_enable": "1"})
    assert both[1][1]["use_tf32"] == "0"
    assert session_providers(checked_providers(["tensorrt"]), "fp32", capture=False)[0] == (TENSORRT, {})
    assert session_providers([Provider(CPU)], "fp16", capture=False) == [(CPU, {})]


@pytest.mark.usefixtures("all_installed")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuda:device_id", "written name=value, not 'device_id'"),
        ("cuda:=1", "written name=value"),
        ("cuda:device_id=x", "must be the number of a GPU, not 'x'"),
        ("cuda:device_id=-1", "must be the number of a GPU"),
        ("tensorrt:trt_cuda_graph_enable=1", "keeps one graph"),
    ],
)
def test_options_that_cannot_be_meant(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked_providers([text])


def test_what_is_not_here() -> None:
    with pytest.raises(SessionError, match=r"provider .abacus. is not available here; available are .*CPUExecution"):
        checked_providers(["abacus"])


def test_the_command_line_says_what_installs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if CUDA in ort_providers.onnxruntime_module().get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    artifact = write_artifact(tmp_path / "artifact")
    said = refusal(capsys, "generate", artifact, "x", "--tokenizer", "bytes", "--provider", "cuda")
    assert "provider 'cuda' is not available here" in said
    assert "pip install 'rwkv-edge[ort-gpu]'" in said


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("/onnxruntime_src/a/b.cc:2465 onnxruntime::P& onnxruntime::Get() CUDA is not here\nmore", "CUDA is not here"),
        ("/a/b.cc:7 void f(int, const X&) const Please install it", "Please install it"),
        ("[ONNXRuntimeError] : 1 : FAIL : no (really) no", "[ONNXRuntimeError] : 1 : FAIL : no (really) no"),
        ("", "RuntimeError"),
    ],
)
def test_errors_without_places_in_a_source(text: str, line: str) -> None:
    assert ort_providers.first_line(RuntimeError(text)) == line
