"""Engines from one command: every version and precision through NVIDIA's own parser and builder (TensorRT for RTX, for
GPUs that are not here), recorded, refused where they cannot work, and never half written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from makers import MAKERS
from onnx import TensorProto, helper
from tiny import content, refusal, write_artifact

from rwkv_edge.artifact import Artifact, sha256_of
from rwkv_edge.cli import run
from rwkv_edge.engines import EngineEntry, check_engine
from rwkv_edge.errors import ArtifactError, ExportError, InputError, SessionError
from rwkv_edge.evaluation.synthetic import save_pth
from rwkv_edge.exporters.tensorrt import BuildOptions, build_engines
from rwkv_edge.exporters.trt_adapter import EngineSettings, build_engine, load_backend
from rwkv_edge.plugins.fused_nodes import FUSED_VERSIONS

RTX = ("--backend", "tensorrt-rtx")
SM86 = (*RTX, "--target", "sm86")
RTX86 = BuildOptions(backend="tensorrt-rtx", targets=("sm86",))


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts that are not to be written to: 'onnx' and its 'bf16', 'function', 'fused' and 'dynamic' forms."""
    folder = tmp_path_factory.mktemp("made")
    write_artifact(folder / "onnx", 0, "--chunk", "16")
    write_artifact(folder / "bf16", 0, "--precision", "bf16")
    write_artifact(folder / "function", 0, "--wkv", "function")
    write_artifact(folder / "fused", 0, "--wkv", "fused")
    write_artifact(folder / "dynamic", 0, "--batch", "dynamic")
    return folder


@pytest.fixture(scope="module")
def built(made: Path, rtx: Any) -> Path:
    """An artifact with engines for sm86; not to be written to."""
    shutil.copytree(made / "onnx", made / "built")
    assert run(["build", str(made / "built"), *SM86]) == 0
    return made / "built"


@pytest.fixture
def artifact(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "artifact"))


def check_all(folder: Path) -> None:
    """Every file is the one in the manifest, engines too."""
    artifact = Artifact.open(folder)
    artifact.check_content(*artifact.manifest.files)


# Building


VERSIONS = ("4", "5.2", "6", "7a", "7")
PLAIN = [(version, how) for version in VERSIONS for how in ("fp32 inline", "fp16 function", "bf16 inline")]
PLAIN += [("7", "fp32 function"), ("7", "fp16 inline"), ("7", "bf16 function")]


@pytest.mark.parametrize(("version", "how"), PLAIN)
def test_every_version_builds(version: str, how: str, rtx: Any, tmp_path: Path) -> None:
    precision, wkv = how.split()
    targets = ("sm86", "sm89") if version == "7" else ("sm86",)
    checkpoint = save_pth(MAKERS[version](), tmp_path / "model.pth")
    folder = tmp_path / wkv
    options = ["--precision", precision, "--wkv", wkv, "--chunk", "16", "--tokenizer", "none"]
    assert run(["export", str(checkpoint), "-o", str(folder), *options]) == 0
    assert run(["build", str(folder), *RTX, *for_targets(targets)]) == 0
    check_all(folder)
    engines = Artifact.open(folder).manifest.engines
    assert [(e.kind, e.tokens, e.wkv) for e in engines] == [("step", 1, wkv), ("prefill", 16, wkv)]
    assert [e.targets for e in engines] == [targets] * len(engines)


def for_targets(targets: Sequence[str]) -> list[str]:
    return [word for target in targets for word in ("--target", target)]


FUSED = [("7", precision) for precision in ("fp32", "fp16", "bf16")]
FUSED += [(version, "fp16") for version in FUSED_VERSIONS if version != "7"]


@pytest.mark.parametrize(("version", "precision"), FUSED)
def test_bodies_of_fused_nodes_build(version: str, precision: str, rtx: Any, tmp_path: Path) -> None:
    checkpoint = save_pth(MAKERS[version](), tmp_path / "model.pth")
    folder = tmp_path / "fused"
    options = ["--precision", precision, "--wkv", "fused", "--chunk", "16", "--tokenizer", "none"]
    assert run(["export", str(checkpoint), "-o", str(folder), *options]) == 0
    targets = ("sm86", "sm89") if (version, precision) == ("7", "fp16") else ("sm86",)
    assert run(["build", str(folder), *RTX, *for_targets(targets)]) == 0
    check_all(folder)
    engines = Artifact.open(folder).manifest.engines
    found = [(e.kind, e.tokens, e.wkv, e.targets) for e in engines]
    assert found == [("step", 1, "fused", targets), ("prefill", 16, "inline", targets)]


def test_what_the_manifest_says(built: Path, rtx: Any, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    step = manifest["engines"][0]
    assert 0 < step.pop("seconds") < 100
    assert step == {
        "file": "step.engine", "graph": "step.onnx", "kind": "step", "tokens": 1, "batch": 1, "backend": "tensorrt-rtx",
        "version": rtx.__version__, "targets": ["sm86"], "wkv": "inline", "model_hash": manifest["model_hash"],
        "refit": False, "version_compatible": False, "sample_k": 0,
    }  # fmt: skip
    for name in ("step.engine", "prefill-16.engine"):
        assert manifest["files"][name]["sha256"] == sha256_of(built / name)
        assert manifest["files"][name]["nbytes"] == (built / name).stat().st_size
    capsys.readouterr()
    assert run(["info", str(built), "--no-probe"]) == 0
    assert f"engine       step.engine: tensorrt-rtx {rtx.__version__} for sm86, wkv inline, " in capsys.readouterr().out
    assert run(["info", str(built), "--no-probe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engines"][1]["file"] == "prefill-16.engine"


def test_a_build_replaces_the_one_before(artifact: Path, rtx: Any, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["build", str(artifact), "--target", "sm120", "--backend", "tensorrt-rtx", "--opt-level", "1"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(
        f"{artifact}: step.engine, prefill-16.engine for sm120, tensorrt-rtx {rtx.__version__}, "
    )
    assert said.err == ""  # no progress bar: this is no terminal
    assert {engine.targets for engine in Artifact.open(artifact).manifest.engines} == {("sm120",)}
    check_all(artifact)


def test_an_export_replaces_engines(artifact: Path, made: Path) -> None:
    (artifact / ".build-1234").mkdir()  # of a build that was killed
    (artifact / ".build-1234" / "step.engine").write_bytes(b"half")
    assert run(["export", str(made / "onnx.pth"), "-o", str(artifact), "--chunk", "0"]) == 0
    assert not Artifact.open(artifact).manifest.engines
    assert not list(artifact.glob("*.engine"))


def test_calls_of_functions_say_where_a_plugin_would_be(made: Path) -> None:
    nodes = onnx.load(made / "function" / "step.onnx", load_external_data=False).graph.node
    calls = [node for node in nodes if node.domain == "rwkv"]
    assert [[(a.name, a.s) for a in node.attribute] for node in calls] == [[("plugin_namespace", b"rwkv")]] * 2


def test_a_dynamic_batch_has_a_largest(made: Path, rtx: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "dynamic", tmp_path / "dynamic")
    manifest = build_engines(folder, replace(RTX86, max_batch=4))
    assert [engine.batch for engine in manifest.engines] == [4]


def test_export_and_build_in_one(made: Path, rtx: Any, tmp_path: Path) -> None:
    for form in ("both", "engine"):
        assert (
            run(["export", str(made / "onnx.pth"), "-o", str(tmp_path / form), "--format", form, "--chunk", "0", *SM86])
            == 0
        )
        check_all(tmp_path / form)
    names = {"step.engine", "manifest.json"}
    assert content(tmp_path / "engine").keys() == names
    assert content(tmp_path / "both").keys() == names | content(made / "function").keys()
    assert run(["info", str(tmp_path / "engine"), "--no-probe"]) == 0


def test_building_needs_neither_torch_nor_onnx(made: Path, rtx: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "function", tmp_path / "artifact")
    code = """
import sys
from rwkv_edge.cli import run
code = run(sys.argv[1:])
assert not {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime"} & set(sys.modules)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, "build", folder, *SM86], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


# Refusals


REFUSALS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "bf16 on sm75": ("bf16", ("--target", "sm75"), "computes in BF16, which GPUs have from sm80 on, but"),
    "unknown target": ("onnx", ("--target", "sm99"), "builds for sm75, sm80, sm86, sm89, sm120, sm121, not for sm99"),
    "no target": ("onnx", ("--target", "rtx3090"), "a target is the compute capability of a GPU, such as sm86"),
    "function from inline": ("onnx", ("--target", "sm86", "--wkv", "function"), "exported with --wkv function"),
    "inline from function": ("function", ("--target", "sm86", "--wkv", "inline"), "exported with --wkv inline"),
    "plugin": ("function", ("--target", "sm86", "--wkv", "plugin"), "TensorRT for RTX runs no plugins from Python"),
    "inline from fused": ("fused", ("--target", "sm86", "--wkv", "inline"), "inline, but this one has fused"),
    "fused from function": ("function", ("--target", "sm86", "--wkv", "fused"), "checkpoint with --wkv fused"),
    "plugin of fused": ("fused", ("--target", "sm86", "--wkv", "plugin"), "from Python; build with --wkv fused"),
    "timing cache": ("onnx", ("--target", "sm86", "--timing-cache", "x"), "has no timing cache"),
    "version compatible": ("onnx", ("--target", "sm86", "--version-compatible"), "no version-compatible engines"),
    "opt level": ("onnx", ("--opt-level", "6"), "6 is not in the range"),
    "no artifact": ("onnx.pth", ("--target", "sm86"), "an artifact is the folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(name: str, made: Path, rtx: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder, options, words = REFUSALS[name]
    before = content(made)
    assert words in refusal(capsys, "build", made / folder, "--backend", "tensorrt-rtx", *options)
    assert content(made) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--target", "sm86"), "--target is for engines; add --format both"),
        (("--wkv", "plugin"), "a plugin is part of an engine; add --format both"),
        (("--format", "both", "--wkv", "plugin", *SM86), "runs no plugins from Python"),
        (("--format", "engine", "--precision", "bf16", "--backend", "tensorrt-rtx", "--target", "sm75"), "BF16"),
    ],
)
def test_an_export_refuses_before_it_begins(
    options: tuple[str, ...], words: str, made: Path, rtx: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, "export", made / "onnx.pth", "-o", tmp_path / "x", *options)
    assert not list(tmp_path.iterdir())


def test_a_node_that_tensorrt_does_not_know_is_named(rtx: Any, tmp_path: Path) -> None:
    nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="strange_one")]
    ports = (
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("s", TensorProto.FLOAT, [])],
    )
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", *ports), ir_version=10), tmp_path / "step.onnx")
    with pytest.raises(ExportError, match=r"cannot read step\.onnx: node 'strange_one' \(DynamicQuantizeLinear\): "):
        build_engine(load_backend("tensorrt-rtx"), tmp_path / "step.onnx", EngineSettings(("sm86",)))


def test_int4_weights_are_seen_in_the_network(rtx: Any, tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.INT4, [64, 64], np.zeros(2048, np.uint8).tobytes(), raw=True)
    scale = helper.make_tensor("s", TensorProto.FLOAT, [2, 64], np.ones(128, np.float32).tobytes(), raw=True)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    ports = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64])] for name in "xy"]
    graph = helper.make_graph(nodes, "g", *ports, initializer=[weight, scale])
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opset), tmp_path / "step.onnx")
    with pytest.raises(InputError, match="computes in INT4, which GPUs have from sm80 on, but the target is sm75"):
        build_engine(load_backend("tensorrt-rtx"), tmp_path / "step.onnx", EngineSettings(("sm75",)))
    assert build_engine(load_backend("tensorrt-rtx"), tmp_path / "step.onnx", EngineSettings(("sm80",))).memory.nbytes


# Before an engine is loaded


ENTRY = EngineEntry(
    "step.engine", "step.onnx", "step", 1, 1, "tensorrt", "10.13.3.9", ("sm87",), "plugin", "a" * 64, 1.5
)


def test_an_engine_that_fits_is_not_refused() -> None:
    check_engine(ENTRY, "a" * 64, "tensorrt", "10.13.3.9", (8, 7))
    check_engine(replace(ENTRY, version_compatible=True), "a" * 64, "tensorrt", "10.16.0.1", (8, 7))
    check_engine(replace(ENTRY, targets=("sm86", "sm120")), "a" * 64, "tensorrt", "10.13.3.9", (12, 0))


@pytest.mark.parametrize(
    ("entry", "machine", "words"),
    [
        (ENTRY, ("b" * 64, "tensorrt", "10.13.3.9", (8, 7)), "weights (sha256 aaaaaaaaaaaa…, expected bbbbbbbbbbbb…)"),
        (ENTRY, ("a" * 64, "tensorrt-rtx", "1.7.1", (8, 7)), "by TensorRT, which TensorRT for RTX cannot run"),
        (ENTRY, ("a" * 64, "tensorrt", "10.13.3.10", (8, 7)), "by TensorRT 10.13.3.9, but 10.13.3.10 is installed"),
        (ENTRY, ("a" * 64, "tensorrt", "10.13.3.9", (11, 0)), "for sm87, but this GPU is sm110; run 'rwkv-edge build'"),
        (ENTRY, ("a" * 64, "tensorrt", "10.13.3.9", None), "no NVIDIA GPU was found"),
        (replace(ENTRY, version_compatible=True), ("a" * 64, "tensorrt", "11.0.0.1", (8, 7)), "11.0.0.1 is"),
        (replace(ENTRY, version_compatible=True), ("a" * 64, "tensorrt", "10.12.9.9", (8, 7)), "10.12.9.9 is"),
    ],
)  # fmt: skip
def test_an_engine_of_another_machine_is_refused(entry: EngineEntry, machine: Any, words: str) -> None:
    with pytest.raises(SessionError, match=re.escape(words)):
        check_engine(entry, *machine)


def test_the_manifest_of_another_model(artifact: Path, made: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["model_hash"] = "0" * 64
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    found = Artifact.open(artifact).manifest
    for engine in found.engines:
        with pytest.raises(SessionError, match="was built from other weights"):
            check_engine(engine, found.model_hash, engine.backend, engine.version, (8, 6))


@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_damaged_engine_harms_nothing_else(damage: str, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = artifact / "step.engine"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + (bytes([data[-1] ^ 1]) if damage == "changed" else b""))
    if damage == "missing":
        path.unlink()
    with pytest.raises(ArtifactError, match=r"step\.engine .*; run 'rwkv-edge build' again"):
        Artifact.open(artifact).check_content("step.engine")
    assert run(["generate", str(artifact), "a", "-n", "2"]) == 0
    build_engines(artifact, RTX86)
    check_all(artifact)


ENTRIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "outside": (lambda e: e.update(file="../step.engine"), "leaves the folder"),
    "unlisted": (lambda e: e.update(file="other.engine"), "does not list 'other.engine'"),
    "backend": (lambda e: e.update(backend="cuda"), "backend of an engine is 'cuda'"),
    "version": (lambda e: e.update(version=10), "version of an engine is 10"),
    "targets": (lambda e: e.update(targets="sm86"), "targets is 'sm86', not a list"),
    "target": (lambda e: e.update(targets=["86"]), "targets of an engine is ['86']"),
    "wkv": (lambda e: e.update(wkv=None), "wkv of an engine is None"),
    "batch": (lambda e: e.update(batch=0), "batch of an engine is 0"),
    "seconds": (lambda e: e.update(seconds=float("nan")), "seconds of an engine is nan"),
    "hash": (lambda e: e.update(model_hash="12"), "model_hash of an engine is '12'"),
    "refit": (lambda e: e.update(refit=1), "refit of an engine is 1"),
    "field": (lambda e: e.update(extra=1), "an engine should have the fields"),
    "no field": (lambda e: e.pop("kind"), "an engine should have the fields"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_cannot_be_meant(name: str, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = ENTRIES[name]
    manifest = json.loads((artifact / "manifest.json").read_text())
    change(manifest["engines"][0])
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    assert words in refusal(capsys, "info", artifact, "--no-probe")
