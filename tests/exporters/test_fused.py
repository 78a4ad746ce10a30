"""A step of fused nodes: the same artifact as in plain operators, but for the form of the step's graph."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from makers import MAKERS
from tiny import refusal, write_artifact, write_checkpoint

from rwkv_edge.artifact import Artifact
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.cli import run
from rwkv_edge.evaluation.synthetic import Shape7, random_v7, save_pth
from rwkv_edge.evaluation.verify import verify_artifact
from rwkv_edge.exporters import fused
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.plugins.fused_nodes import FUSED_VERSIONS, fused_layers
from rwkv_edge.runtime.session import Session, open_session

SHAPES = {
    "three layers": Shape7(3, 192, 320, 32, 4, (16, 8, 8, 48)),
    "one layer": Shape7(1, 128, 256, 64, 4, (32, 32, 16, 32)),
    "widths that no kernel takes": Shape7(2, 60, 250, 20, 3, (12, 9, 7, 10)),
}
RELATIVE = {"fp32": 2e-6, "fp16": 5e-3}
"""Of the largest value. In 16 bits the residual stream is rounded in plain operators and is not between fused nodes."""


def exported(checkpoint: Path, folder: Path, **options: Any) -> Session[Any]:
    export_checkpoint(open_checkpoint(checkpoint), folder, ExportOptions(tokenizer="none", **options))
    return open_session(folder, "onnxruntime", threads=1)


def assert_close(found: np.ndarray, expected: np.ndarray, relative: float) -> None:
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= relative * max(np.abs(expected).max(), 1e-3)


CASES = [(shape, "fp32", None) for shape in SHAPES] + [("three layers", "fp16", 2)]


@pytest.mark.parametrize(("shape", "precision", "batch"), CASES)
def test_the_same_steps(shape: str, precision: str, batch: int | None, tmp_path: Path) -> None:
    """From a state that is not zero, with repeated tokens, after chunks and before."""
    checkpoint = save_pth(random_v7(SHAPES[shape]), tmp_path / "model.pth")
    common = {"chunks": (5,) if precision == "fp16" else (), "precision": precision, "batch": batch}
    sessions = [exported(checkpoint, tmp_path / wkv, wkv=wkv, **common) for wkv in ("fused", "inline")]
    assert_same_steps(sessions, RELATIVE[precision])


def assert_same_steps(sessions: Sequence[Session[Any]], relative: float) -> None:
    """Two streams, prompts and single steps, and the state after them."""
    draw = np.random.default_rng(0)
    spec = sessions[0].spec
    arrays = {t.name: draw.normal(0, 0.5, (2, *t.shape)).astype(np.float32) for t in spec.state}
    arrays = {name: np.abs(x) + 0.1 if name.startswith("wkv_den") else x for name, x in arrays.items()}
    states = [session.import_state(arrays) for session in sessions]
    tokens = draw.integers(0, spec.vocab_size, (2, 19))
    tokens[:, 4] = tokens[:, 3]
    for part in (tokens[:, :1], tokens[:, 1:8], tokens[:, 8:]):
        found, expected = (s.prefill(part, state) for s, state in zip(sessions, states, strict=True))
        assert_close(found, expected, relative)
    for token in tokens.T:
        found, expected = (s.step(token, state) for s, state in zip(sessions, states, strict=True))
        assert_close(found, expected, relative)
    after = sessions[1].export_state(states[1])
    for name, array in sessions[0].export_state(states[0]).items():
        assert_close(array, after[name], relative)


@pytest.mark.parametrize("precision", RELATIVE)
@pytest.mark.parametrize("version", FUSED_VERSIONS)
def test_every_version(version: str, precision: str, tmp_path: Path) -> None:
    """Two layers, whose stream is halved after each in float32, and in float16 as the version has it."""
    checkpoint = save_pth(MAKERS[version](), tmp_path / "model.pth")
    common = {"chunks": (), "batch": 2, "precision": precision, "rescale": 1 if precision == "fp32" else None}
    sessions = [exported(checkpoint, tmp_path / wkv, wkv=wkv, **common) for wkv in ("fused", "inline")]
    assert_same_steps(sessions, RELATIVE[precision])
    assert verify_artifact(tmp_path / "fused", checkpoint).passed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts in each form; not to be written to."""
    folder = tmp_path_factory.mktemp("made")
    for wkv in ("fused", "inline"):
        write_artifact(folder / wkv, 0, "--wkv", wkv, "--chunk", "16")
    return folder


def test_five_nodes_a_layer_in_the_domain(made: Path) -> None:
    """Between the cast of the token and the head there is nothing else; weights are inputs of the nodes."""
    model = onnx.load(made / "fused" / "step.onnx", load_external_data=False)
    names = Counter(node.op_type for node in model.graph.node if node.domain == "rwkv")
    expected = Counter(node.name for layer in (0, 1) for node in fused_layers("7").of(layer))
    assert names == expected
    others = [node.op_type for node in model.graph.node if node.domain != "rwkv"]
    assert others == ["Cast", "ReduceSum", "Sum", "LayerNormalization", "MatMul"]
    assert {(f.domain, f.name) for f in model.functions} == {("rwkv", name) for name in expected}
    for function in model.functions:
        node = fused_layers("7").nodes[function.name]
        assert list(function.input) == [argument.name for argument in node.inputs]
        assert {inner.domain for inner in function.node} == {""}


def test_v_first_is_an_edge_to_all_later_layers(tmp_path: Path) -> None:
    checkpoint = save_pth(random_v7(SHAPES["three layers"]), tmp_path / "model.pth")
    exported(checkpoint, tmp_path / "fused", wkv="fused", chunks=())
    nodes = onnx.load(tmp_path / "fused" / "step.onnx", load_external_data=False).graph.node
    layers = fused_layers("7")
    given = [argument.name for argument in layers.of(0)[0].outputs].index("v_first")
    (first,) = [node.output[given] for node in nodes if node.op_type == "v7_time_mix_in_first"]
    taken = [argument.name for argument in layers.of(1)[1].inputs].index("v_first")
    assert [node.input[taken] for node in nodes if node.op_type == "v7_wkv"] == [first] * 2


def test_weights_are_shared(made: Path) -> None:
    """One weights.bin, the same as of plain operators; what a graph holds itself is small."""
    step, inline = (Artifact.open(made / wkv).manifest for wkv in ("fused", "inline"))
    assert step.model_hash == inline.model_hash
    assert step.files["weights.json"] == inline.files["weights.json"]
    graph = onnx.load(made / "fused" / "step.onnx", load_external_data=False).graph
    outside = [x.name for x in graph.initializer if x.data_location == onnx.TensorProto.EXTERNAL]
    weights = {entry["name"] for entry in json.loads((made / "fused" / "weights.json").read_text())}
    assert set(outside) == weights
    assert len(outside) == len(weights)
    assert sum(len(x.raw_data) for x in graph.initializer) < 100
    assert {x.name: x.dims for x in graph.initializer if x.name in weights}.keys() == weights


def test_what_the_manifest_and_info_say(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The step is of fused nodes, the chunks are in plain operators; nothing else differs from those."""
    step, inline = (Artifact.open(made / wkv).manifest for wkv in ("fused", "inline"))
    assert [(graph.file, graph.wkv) for graph in step.graphs] == [
        ("step.onnx", "fused"),
        ("prefill-16.onnx", "inline"),
    ]
    assert step.spec == inline.spec
    assert step.files["prefill-16.onnx"] == inline.files["prefill-16.onnx"]
    capsys.readouterr()
    assert run(["info", str(made / "fused"), "--no-probe"]) == 0
    assert f"step.onnx: {step.graphs[0].nodes} nodes, wkv fused, " in capsys.readouterr().out


def test_bf16_has_a_twin_in_plain_operators(tmp_path: Path) -> None:
    write_artifact(tmp_path / "model", 0, "--wkv", "fused", "--precision", "bf16")
    graphs = Artifact.open(tmp_path / "model").manifest.graphs
    found = [(graph.file, graph.target, graph.wkv) for graph in graphs]
    assert found == [("step.onnx", "gpu", "fused"), ("step.cpu.onnx", "cpu", "inline")]
    assert run(["generate", str(tmp_path / "model"), "a", "-n", "3", "--temperature", "0"]) == 0


# Refusals


def test_versions_without_fused_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fused, "FUSED_VERSIONS", ("4", "6"))
    found = refusal(capsys, "export", write_checkpoint(tmp_path / "a.pth"), "-o", tmp_path / "a", "--wkv", "fused")
    assert found == (
        "fused nodes exist for RWKV-4, RWKV-6, but this is RWKV-7; export it with --wkv function or inline"
    )
    assert not (tmp_path / "a").exists()


def test_quantization(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence from every command, before anything is written."""
    (tmp_path / "text").write_text("To be, or not to be. " * 50)
    sentence = (
        "has its matrices inside fused nodes, whose kernels take float; export it again with --wkv inline or function"
    )
    for command in (
        ("quantize", made / "fused", "-o", tmp_path / "w8", "--scheme", "w8"),
        ("calibrate", made / "fused", "--text", tmp_path / "text", "-o", tmp_path / "calibration.json"),
    ):
        assert sentence in refusal(capsys, *command)
    export = ("export", made / "fused.pth", "-o", tmp_path / "x", "--wkv", "fused", "--int8", tmp_path / "text")
    assert "--int8 quantizes no fused nodes" in refusal(capsys, *export)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]
