"""Model repositories: the config is the server's, and what the server does with it is what sessions do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from makers import MAKERS
from tiny import SHAPE, STEP_ONLY, content, refusal, write_artifact, write_checkpoint

from rwkv_edge.artifact import Artifact, file_entry, write_manifest
from rwkv_edge.cli import run
from rwkv_edge.engines import EngineEntry
from rwkv_edge.errors import InputError
from rwkv_edge.evaluation.synthetic import save_pth
from rwkv_edge.exporters.triton import TritonOptions, write_repository
from rwkv_edge.runtime.initial import initial_arrays
from rwkv_edge.runtime.session import open_session

pytest.importorskip("tritonclient.grpc", reason="the package tritonclient[grpc] is not installed")
from google.protobuf import text_format
from triton_double import Refusal, Request, TritonModel
from tritonclient.grpc import model_config_pb2


def exported(folder: Path, *options: str) -> Path:
    folder.mkdir(exist_ok=True)
    return write_artifact(folder / "artifact", 0, "--batch", "dynamic", *options)


def repository(artifact: Path, folder: Path, *options: str) -> TritonModel:
    assert run(["triton", str(artifact), "-o", str(folder), "--name", "rwkv", "--device", "cpu", *options]) == 0
    return TritonModel(folder / "rwkv")


def expected(artifact: Path, tokens: list[int]) -> np.ndarray:
    """Logits [T, V] of a session after every token."""
    session = open_session(artifact, threads=1)
    state = session.initial_state(1)
    return np.stack([session.step([token], state)[0] for token in tokens])


def assert_serves(model: TritonModel, artifact: Path, tolerance: float) -> None:
    """Three sequences that begin, go on and end at different times, in steps of whoever waits."""
    texts = {7: list(range(1, 9)), 8: [200, 3, 90, 4], 9: [5, 5, 5, 5, 5, 6]}
    waiting = []
    for turn in range(12):  # 8 comes two turns later, 9 four
        for sequence, tokens in texts.items():
            at = turn - 2 * (sequence - 7)
            if 0 <= at < len(tokens):
                waiting.append(Request(sequence, tokens[at], at == 0, at == len(tokens) - 1))
    found: dict[int, list[Any]] = {sequence: [] for sequence in texts}
    for request, logits in model.answers(waiting):
        found[request.sequence].append(logits)
    for sequence, tokens in texts.items():
        np.testing.assert_allclose(np.stack(found[sequence]), expected(artifact, tokens), atol=tolerance, rtol=0)


@pytest.mark.parametrize("version", ["4", "6", "7"])
def test_sequences_are_what_sessions_are(version: str, tmp_path: Path) -> None:
    """RWKV-4's maxima begin far below zero: from a file."""
    save_pth(MAKERS[version](), tmp_path / "model.pth")
    artifact = tmp_path / "artifact"
    export = ["export", str(tmp_path / "model.pth"), "-o", str(artifact), "--batch", "dynamic", *STEP_ONLY]
    assert run(export) == 0
    model = repository(artifact, tmp_path / "models", "--max-batch", "2")
    assert_serves(model, artifact, 1e-4)
    assert max(map(len, model.steps)) == 2
    files = tmp_path / "models" / "rwkv" / "initial_state"
    names = sorted(path.name for path in files.iterdir()) if files.exists() else []
    assert names == (["wkv_max.0", "wkv_max.1"] if version == "4" else [])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_tuned_state_is_where_every_sequence_begins(precision: str, tmp_path: Path) -> None:
    heads = SHAPE.n_embd // SHAPE.head_size
    size = (heads, SHAPE.head_size, SHAPE.head_size)  # random: the group norm takes equal values out
    tuned = {
        f"blocks.{i}.att.time_state": torch.randn(size, generator=torch.Generator().manual_seed(i)) for i in range(2)
    }
    torch.save(tuned, tmp_path / "tuned.pth")
    artifact = exported(tmp_path, "--state", str(tmp_path / "tuned.pth"), "--precision", precision)
    model = repository(artifact, tmp_path / "models")
    assert_serves(model, artifact, 1e-4 if precision == "fp32" else 0.05)
    plain = exported(tmp_path / "plain", "--precision", precision)
    assert np.abs(expected(artifact, [1]) - expected(plain, [1])).max() > 0.01


def test_one_stream_without_batching(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    model = repository(artifact, tmp_path / "models")
    assert model.config.max_batch_size == 0
    assert_serves(model, artifact, 1e-5)
    assert {len(step) for step in model.steps} == {1}


def test_what_the_config_says(tmp_path: Path) -> None:
    artifact = exported(tmp_path)
    options = ("--max-batch", "5", "--max-sequences", "9", "--idle", "2.5")
    model = repository(artifact, tmp_path / "models", *options)
    config, batching = model.config, model.config.sequence_batching
    assert (config.backend, config.max_batch_size) == ("onnxruntime", 5)
    assert batching.WhichOneof("strategy_choice") == "oldest"
    assert batching.oldest.max_candidate_sequences == 9
    assert batching.max_sequence_idle_microseconds == 2_500_000
    assert len(batching.state) == len(Artifact.open(artifact).manifest.spec.state)
    assert not any(state.use_same_buffer_for_input_output for state in batching.state)
    assert config.parameters["rwkv_edge_model_hash"].string_value == Artifact.open(artifact).manifest.model_hash
    assert (tmp_path / "models/rwkv/1/model.onnx/weights.bin").samefile(artifact / "weights.bin")


def test_a_sequence_that_is_forgotten_must_begin_again(tmp_path: Path) -> None:
    model = repository(exported(tmp_path), tmp_path / "models", "--idle", "10")
    asked = [Request(1, 5, start=True), Request(1, 6, at=9.0), Request(1, 7, at=20.0), Request(2, 7)]
    answers = [answer for _, answer in model.answers(asked)]
    assert [isinstance(answer, Refusal) for answer in answers].count(True) == 2


def test_weights_are_copied_where_they_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    artifact = exported(tmp_path)
    monkeypatch.setattr(os, "link", refused)
    model = repository(artifact, tmp_path / "models")
    assert not (tmp_path / "models/rwkv/1/model.onnx/weights.bin").samefile(artifact / "weights.bin")
    assert_serves(model, artifact, 1e-4)


# The client


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The server's interface of sequences over the double, at an address; and its artifact."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    artifact = exported(tmp_path)
    model = repository(artifact, tmp_path / "models")

    class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
        def ModelConfig(self, request: Any, context: Any) -> Any:
            return service_pb2.ModelConfigResponse(config=model.config)

        def ModelStreamInfer(self, requests: Any, context: Any) -> Any:
            for request in requests:
                assert list(request.inputs[0].shape) == [1, 1]
                token = int(np.frombuffer(request.raw_input_contents[0], np.int64)[0])
                flags = request.parameters
                asked = Request(
                    flags["sequence_id"].int64_param, token,
                    flags["sequence_start"].bool_param, flags["sequence_end"].bool_param,
                )  # fmt: skip
                ((_, logits),) = model.answers([asked])
                if isinstance(logits, Refusal):
                    yield service_pb2.ModelStreamInferResponse(error_message=logits.reason)
                    continue
                answer = service_pb2.ModelInferResponse(model_name="rwkv", raw_output_contents=[logits.tobytes()])
                answer.outputs.add(name="logits", datatype="FP32", shape=[1, len(logits)])
                yield service_pb2.ModelStreamInferResponse(infer_response=answer)

    found = grpc.server(futures.ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(), found)
    port = found.add_insecure_port("127.0.0.1:0")
    found.start()
    yield f"127.0.0.1:{port}", artifact
    found.stop(None)
    assert not model._states  # the client ended its sequences


def test_the_client_streams_a_sequence(server: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    url, artifact = server
    example = Path(__file__).parents[2] / "examples" / "triton_client.py"
    command = [sys.executable, str(example), url, "rwkv", str(artifact), "The sea is", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    capsys.readouterr()
    assert run(["generate", str(artifact), "The sea is", "-n", "20", "--temperature", "0", "--no-echo"]) == 0
    assert capsys.readouterr().out.startswith(done.stdout[:-1])


# What is refused


def test_what_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = exported(tmp_path)
    models = tmp_path / "models"
    repository(artifact, models)
    before = content(models)
    common = ("triton", artifact, "-o", models)
    assert "rwkv exists already; remove it, or choose another name with --name" in refusal(
        capsys, *common, "--name", "rwkv"
    )
    assert "holds no engine of a step for TensorRT; run 'rwkv-edge build" in refusal(
        capsys, *common, "--backend", "tensorrt"
    )
    assert "runs on a GPU" in refusal(capsys, *common, "--backend", "tensorrt", "--device", "cpu")
    assert "a model's name has letters" in refusal(capsys, *common, "--name", "../x")
    assert "the idle limit must be" in refusal(capsys, *common, "--idle", "nan")
    wide = write_artifact(tmp_path / "wide", 0, "--batch", "3")
    assert "wide has batch 3, but the server adds the batch itself" in refusal(capsys, "triton", wide, "-o", models)
    (tmp_path / "file").touch()
    assert "file is a file; a model repository is a folder" in refusal(
        capsys, "triton", artifact, "-o", tmp_path / "file"
    )
    assert content(models) == before
    (artifact / "weights.bin").write_bytes(bytes((artifact / "weights.bin").stat().st_size))
    assert "is not the file that was exported" in refusal(capsys, *common, "--name", "other")


def test_options_that_cannot_be_meant() -> None:
    for wrong in ({"backend": "x"}, {"device": "tpu"}, {"max_batch": 0}, {"max_sequences": 0}, {"name": "a b"}):
        with pytest.raises(InputError):
            TritonOptions(**wrong)  # type: ignore[arg-type]


def test_bfloat16_keeps_its_type(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.pth")
    export = ["export", str(path), "-o", str(tmp_path / "bf16"), "--precision", "bf16", "--batch", "dynamic"]
    assert run([*export, *STEP_ONLY]) == 0
    artifact = Artifact.open(tmp_path / "bf16")
    folder = write_repository(artifact, tmp_path / "models", initial_arrays(artifact))
    text = (folder / "config.pbtxt").read_text()
    assert 'name: "bf16"' in text
    assert text.count("TYPE_BF16") == 2 * 4  # two shifts a layer, and their initial states
    assert "KIND_GPU" in text


# Engines


def with_engine(artifact: Path, **changes: Any) -> Path:
    """The artifact with a file in place of an engine: who copies it does not run it."""
    opened = Artifact.open(artifact)
    (artifact / "step.engine").write_bytes(b"an engine")
    entry = EngineEntry(
        file="step.engine", graph="step.onnx", kind="step", tokens=1, batch=4, backend="tensorrt", version="10.13.3.9",
        targets=("sm86",), wkv="inline", model_hash=opened.manifest.model_hash, seconds=1.0,
    )  # fmt: skip
    files = {**opened.manifest.files, "step.engine": file_entry(artifact / "step.engine")}
    write_manifest(artifact, replace(opened.manifest, engines=(replace(entry, **changes),), files=files))
    return artifact


def test_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = with_engine(exported(tmp_path))
    common = ("triton", artifact, "-o", tmp_path / "models", "--backend", "tensorrt")
    assert "step.engine takes 4 streams, not 8; give --max-batch 4" in refusal(capsys, *common)
    assert run([*map(str, common), "--max-batch", "4"]) == 0
    folder = tmp_path / "models" / "artifact"
    assert (folder / "1" / "model.plan").read_bytes() == b"an engine"
    config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert (config.backend, config.default_model_filename, config.max_batch_size) == ("tensorrt", "model.plan", 4)
    assert sorted(path.name for path in (folder / "1").iterdir()) == ["model.plan"]


def test_engines_that_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = exported(tmp_path)
    common = ("triton", artifact, "-o", tmp_path / "models", "--backend", "tensorrt")
    with_engine(artifact, wkv="plugin")
    assert "needs a plugin that Triton does not load; build it with --wkv inline" in refusal(capsys, *common)
    with_engine(artifact, backend="tensorrt-rtx")
    assert "holds no engine of a step for TensorRT" in refusal(capsys, *common)
    with_engine(artifact, batch=8)
    (artifact / "step.engine").write_bytes(b"cut")
    assert "is not the file that was built" in refusal(capsys, *common)
    assert not (tmp_path / "models").exists()
