"""Engines that find the largest logits themselves: the layers, built by TensorRT for RTX, recorded, and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import refusal, write_checkpoint

from rwkv_edge.artifact import Artifact
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.cli import run
from rwkv_edge.errors import ExportError
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.exporters.tensorrt import BuildOptions, build_engines
from rwkv_edge.exporters.trt_candidates import add_candidates

K = 16


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("made") / "model.pth")


def exported(checkpoint: Path, folder: Path, **options: Any) -> Path:
    export_checkpoint(open_checkpoint(checkpoint), folder, ExportOptions(tokenizer="none", **options))
    return folder


# The layers, as what they compute


class Computed:
    """ITensor and ILayer at once: values instead of a promise of them."""

    def __init__(self, *values: np.ndarray, name: str = "") -> None:
        self.values, self.name = values, name

    @property
    def num_outputs(self) -> int:
        return len(self.values)

    def get_output(self, index: int) -> Computed:
        return Computed(self.values[index])


class Operations:
    MAX, SUM, SUB, EXP, LOG = "max", "sum", "sub", "exp", "log"


class Network:
    """INetworkDefinition that computes in numpy; ``refuses`` names a method that answers None."""

    TopKOperation = ReduceOperation = UnaryOperation = ElementWiseOperation = Operations

    def __init__(self, logits: np.ndarray, refuses: str = "") -> None:
        self._outputs, self._refuses = (
            [Computed(logits[:, :1], name="wkv.0.out"), Computed(logits, name="logits")],
            refuses,
        )

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_output(self, index: int) -> Computed:
        return self._outputs[index]

    def mark_output(self, tensor: Computed) -> None:
        self._outputs.append(tensor)

    def add_topk(self, tensor: Computed, op: str, k: int, axes: int) -> Computed | None:
        assert (op, axes) == ("max", 0b10)
        order = np.argsort(-tensor.values[0], axis=1)[:, :k]
        return None if self._refuses == "add_topk" else Computed(np.take_along_axis(tensor.values[0], order, 1), order)

    def add_reduce(self, tensor: Computed, op: str, axes: int, keep_dims: bool) -> Computed:
        assert (axes, keep_dims) == (0b10, True)
        return Computed(getattr(tensor.values[0], op)(axis=1, keepdims=True))

    def add_unary(self, tensor: Computed, op: str) -> Computed:
        return Computed(getattr(np, op)(tensor.values[0]))

    def add_elementwise(self, one: Computed, other: Computed, op: str) -> Computed:
        return Computed({"sub": np.subtract, "sum": np.add}[op](one.values[0], other.values[0]))


def test_what_the_layers_mean() -> None:
    logits = np.random.default_rng(0).normal(0, 40, (3, 300)).astype(np.float32)
    network = Network(logits)
    add_candidates(network, network, K)  # type: ignore[arg-type]
    found = {network.get_output(i).name: network.get_output(i).values[0] for i in range(network.num_outputs)}
    assert list(found) == ["wkv.0.out", "logits", "candidates.logits", "candidates.tokens", "candidates.norm"]
    np.testing.assert_array_equal(found["candidates.logits"], -np.sort(-logits, axis=1)[:, :K])
    np.testing.assert_array_equal(np.take_along_axis(logits, found["candidates.tokens"], 1), found["candidates.logits"])
    norm = np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found["candidates.norm"], norm, rtol=1e-6)


def test_a_layer_that_is_not_taken_is_noticed() -> None:
    network = Network(np.zeros((1, 300), np.float32), refuses="add_topk")
    with pytest.raises(ExportError, match="build with a smaller --sample-k"):
        add_candidates(network, network, K)  # type: ignore[arg-type]


# Engines


@pytest.mark.parametrize(("precision", "batch"), [("fp32", 1), ("fp16", None), ("bf16", 1)])
def test_engines_with_candidates_build(
    precision: str, batch: int | None, rtx: Any, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(checkpoint, tmp_path / "artifact", precision=precision, batch=batch, chunks=(8,) if batch else ())
    plain = build_engines(folder, BuildOptions("tensorrt-rtx", ("sm86",)))
    sizes = {engine.file: plain.files[engine.file].nbytes for engine in plain.engines}
    assert run(["build", str(folder), "--backend", "tensorrt-rtx", "--target", "sm86", "--sample-k", str(K)]) == 0
    assert f"wkv inline, {K} candidates, " in capsys.readouterr().out
    manifest = Artifact.open(folder).manifest
    prefill = [("prefill", 0)] if batch else []
    assert [(engine.kind, engine.sample_k) for engine in manifest.engines] == [("step", K), *prefill]
    assert manifest.files["step.engine"].nbytes > sizes["step.engine"]  # the layers are in it
    data = (folder / "step.engine").read_bytes()
    for name in (b"candidates.logits", b"candidates.tokens", b"candidates.norm"):
        assert name in data


@pytest.mark.parametrize(
    ("count", "words"),
    [("257", "--sample-k 257 is more than the vocabulary of 256"), ("3841", "3841 is not in the range 0<=x<=3840")],
)
def test_a_count_that_cannot_be_meant(
    count: str, words: str, rtx: Any, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(checkpoint, tmp_path / "artifact", chunks=())
    options = ("--backend", "tensorrt-rtx", "--target", "sm86", "--sample-k", count)
    assert words in refusal(capsys, "build", folder, *options)


# The manifest


def test_manifests_without_candidates_are_read(rtx: Any, checkpoint: Path, tmp_path: Path) -> None:
    folder = exported(checkpoint, tmp_path / "artifact", chunks=())
    build_engines(folder, BuildOptions("tensorrt-rtx", ("sm86",), sample_k=K))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["engines"][0]["sample_k"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert Artifact.open(folder).manifest.engines[0].sample_k == 0


@pytest.mark.parametrize(
    "change",
    [
        {"sample_k": -1},
        {"sample_k": True},
        {"sample_k": False},
        {"sample_k": 3841},
        {"sample_k": "8"},
        {"kind": "score"},
    ],
)
def test_a_manifest_that_cannot_be_meant(
    change: dict[str, Any], rtx: Any, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(checkpoint, tmp_path / "artifact", chunks=())
    build_engines(folder, BuildOptions("tensorrt-rtx", ("sm86",), sample_k=K))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engines"][0] |= change
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert re.search("sample_k of an engine is", refusal(capsys, "info", folder, "--no-probe"))
