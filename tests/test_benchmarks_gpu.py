"""The scripts that measure GPUs, at tiny sizes: with numpy in the kernels' place, whose times mean nothing."""

from __future__ import annotations

import importlib
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_double
import cuda_versions_double
import numpy as np
import pytest
import torch

from rwkv_edge.artifact import Artifact
from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.synthetic import Shape7, random_v7, save_pth
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.plugins.fused_spec import FusedKernel
from rwkv_edge.runtime.cuda import CudaSession

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = (
    "albatross", "common", "kernels_gpu", "parity_gpu", "step_gpu", "step_gpu_engines", "step_gpu_models",
    "versions_gpu", "wide_gpu",
)  # fmt: skip
SMALL = {"CALLS": 2, "FED_BACK": 2, "STREAM_STEPS": 1, "PROMPT": 20, "PROMPTS": 1, "STREAMS": 9}

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules, on the numpy GPU and with little to do."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr("rwkv_edge.runtime.cuda.Driver", cuda_double.Driver)
    monkeypatch.setattr(FusedKernel, "ptx", cuda_double.described)
    found = {name: importlib.import_module(name) for name in SCRIPTS}
    for module in found.values():
        for name, value in SMALL.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    threads = torch.get_num_threads()
    yield found
    torch.set_num_threads(threads)
    for name in SCRIPTS:
        del sys.modules[name]


@pytest.fixture
def run(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a script with arguments; returns its figures."""

    def call(name: str, *arguments: str) -> dict[str, Any]:
        work, target = tmp_path / "work", tmp_path / f"{name}.json"
        given = [name, "--runs", "1", "--work", str(work), "--json", str(target), *arguments]
        monkeypatch.setattr(sys, "argv", given)
        scripts[name].main()
        figures: dict[str, Any] = json.loads(target.read_text())["figures"]
        return figures

    return call


STEP = ("--provider", "cpu", "--workers", "0", "--sizes", "tiny")


def test_repeated_artifacts_are_those_of_the_whole_model(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    models, layers = scripts["step_gpu_models"], 4
    models.prepared(["tiny"], layers, ("fp16", "W8", "W4"), tmp_path, workers=0)
    whole = tmp_path / "whole"
    options = ExportOptions(precision="fp16", chunks=(), batch=None, tokenizer="none")
    export_checkpoint(open_checkpoint(models.checkpoint_place("tiny", layers, tmp_path)), whole, options)
    expected = {"fp16": whole}
    for form, scheme in models.SCHEMES.items():
        expected[form] = tmp_path / f"whole-{form}"
        quantize_artifact(whole, expected[form], QuantizeOptions(scheme))
    for form, folder in expected.items():
        found = models.place_of("tiny", layers, form, tmp_path)
        for name in ("weights.bin", "weights.json"):
            assert (found / name).read_bytes() == (folder / name).read_bytes(), (form, name)
        manifest, right = Artifact.open(found).manifest, Artifact.open(folder).manifest
        assert (manifest.spec, manifest.model_hash) == (right.spec, right.model_hash)
        assert (manifest.quantization or {}).get("formats") == (right.quantization or {}).get("formats")
        Artifact.open(found).check_content()


def test_step_gpu(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("step_gpu", *STEP, "--onnxruntime", "tiny", "--tune", "W8", "--tune-seconds", "0.1")["tiny"]
    names = ["fused kernels", "fused kernels W8", "fused kernels W4", "ONNX Runtime"]
    assert [name for name in found if name.startswith(("fused", "ONNX"))] == names
    for name in names:
        assert found[name]["parity"] == "green"
        assert found[name]["step_s"] > 0
    assert (
        found["fused kernels"]["limit_s"] > found["fused kernels W8"]["limit_s"] > found["fused kernels W4"]["limit_s"]
    )
    assert {"sample_s", "batch_tokens_per_second", "prefill_tokens_per_second"} <= found["fused kernels W4"].keys()
    assert "| tiny | fused kernels W8 |" in capsys.readouterr().out


def test_step_gpu_times_nothing_that_is_wrong(
    run: Run, scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(scripts["step_gpu"].TOLERANCE, "fused kernels", 1e-9)
    with pytest.raises(
        SystemExit, match=r"tiny, fused kernels: the relative difference is wrong: steps .*at most 1e-09"
    ):
        run("step_gpu", *STEP, "--forms", "fp16", "--onnxruntime")
    engine = json.loads((tmp_path / "step_gpu.json").read_text())["figures"]["tiny"]["fused kernels"]
    assert "step_s" not in engine


def test_a_stream_in_the_place_of_another_is_found(scripts: dict[str, ModuleType]) -> None:
    streams = 64
    expected = np.random.default_rng(0).normal(0, 1, (5, streams, 100))
    differences, most = scripts["step_gpu_engines"].stream_differences, scripts["step_gpu"].WORST_TOLERANCE
    assert differences(expected, expected) == (0, 0)
    found = expected.copy()
    found[:2, 3] *= 1.5  # two tokens of five
    assert differences(found, expected) == (0, 0)
    found[2:, [3, 4]] = found[2:, [4, 3]]
    median, worst = differences(found, expected)
    assert median == 0
    assert worst > 2 * most


def test_step_gpu_says_that_there_is_no_provider(
    scripts: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    options = type("Options", (), {"provider": "cuda", "sizes": ["0.1B"], "onnxruntime": ["0.1B"]})
    assert scripts["step_gpu"].onnxruntime_sizes(options) == []
    assert "has no CUDA provider here, so it is left out" in capsys.readouterr().out


def test_notes_tell_targets_and_what_is_behind(scripts: dict[str, ModuleType]) -> None:
    engine = {"step_s": 1e-3, "target_s": 0.5e-3, "meets_target": False, "batch_s": 2.0, "prefill_s": 1.0}
    found = {"fused kernels": engine, "Albatross v3a": {"batch_s": 1.0, "prefill_s": 2.0, "bare_s": 3e-3}}
    note = scripts["step_gpu"].note_of
    assert note(found, "fused kernels") == "target 0.500 ms MISSED, batch BEHIND Albatross"
    assert note(found, "Albatross v3a") == "without embedding and choice 3.000 ms"


def test_versions_gpu(run: Run, scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_double, "KERNELS", {**cuda_double.KERNELS, **cuda_versions_double.KERNELS})
    monkeypatch.setattr(scripts["versions_gpu"], "STEPS", 1)
    found = run("versions_gpu", "--models", "tiny")
    assert list(found) == ["copy_gb_s", "tiny fp16", "tiny W8", "tiny W4"]
    assert found["tiny fp16"]["limit_us"] > found["tiny W8"]["limit_us"] > found["tiny W4"]["limit_us"]
    assert all(found[name]["step_us"] > 0 for name in list(found)[1:])


def test_wide_gpu(run: Run, scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Float and quantized weights: prompts, streams, few of them either way, and kernels whose shares fill a layer."""
    small = {"PROMPTS": (20,), "BATCHES": (8, 9), "FEW": (2,), "PROFILED": {"prompt of 8": (1, 8), "9 streams": (9, 1)}}
    for name, value in small.items():
        monkeypatch.setattr(scripts["wide_gpu"], name, value)
    figures = run("wide_gpu", "--sizes", "tiny", "--forms", "fp16", "W8", "W4", "--kernels", "--few", "--runs", "1")
    for form in ("fp16", "W8", "W4"):
        found = figures[f"tiny {form}"]
        assert max(found["parity"].values()) <= 5e-3
        assert (set(found["prompt"]), set(found["streams"]), set(found["few"])) == ({"20"}, {"8", "9"}, {"2"})
        for kernels in found["kernels"].values():
            assert sum(kernel["share"] for kernel in kernels.values()) == pytest.approx(1)


def test_kernels_gpu(run: Run, scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Parts of a step move together what the limit of the whole counts."""
    monkeypatch.setattr(scripts["kernels_gpu"], "SECONDS", 1e-3)
    found = run("kernels_gpu", "--no-gpu", "--workers", "0", "--sizes", "tiny")
    models = scripts["step_gpu_models"]
    for form in ("fp16", "W8", "W4"):
        kinds = {name: f for name, f in found[f"tiny {form}"].items() if isinstance(f, dict)}
        assert list(kinds) == [*scripts["kernels_gpu"].LAYER, "head", "argmax"]
        assert [f["launches"] for f in kinds.values()] == [3] * 5 + [1] * 2
        moved = models.moved_bytes(models.place_of("tiny", None, form, tmp_path / "work"))
        assert sum(f["bytes"] for f in kinds.values()) == moved


def test_kernels_gpu_spreads_over_copies(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    """Copies compute what the model computes, in memory of their own."""
    models, kernels = scripts["step_gpu_models"], scripts["kernels_gpu"]
    models.prepared(["tiny"], None, ("fp16",), tmp_path, workers=0)
    folder = models.place_of("tiny", None, "fp16", tmp_path)
    session = CudaSession(Artifact.open(folder), check_content=False)
    step = kernels.Step(session, folder)
    places = dict(step.kinds())["time_mix_out"]
    launches = step.copies(places, cache=step.moved_bytes(places) // 2)
    assert len(launches) == 2 * len(places)
    pointers = [{launch.pointers[1] for launch in group} for group in (launches[:3], launches[3:])]
    assert not pointers[0] & pointers[1]
    for one, other in zip(launches[:3], launches[3:], strict=True):
        size = 64 * 64 * 2
        np.testing.assert_array_equal(
            session._driver.memory(one.pointers[1], size), session._driver.memory(other.pointers[1], size)
        )
    session.close()


def test_parity_gpu(run: Run, scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parity = scripts["parity_gpu"]
    checkpoint = save_pth(random_v7(Shape7(2, 64, 256, ranks=(8, 8, 8, 16))), tmp_path / "model.pth")
    schemes = {name: parity.SCHEMES[name] for name in ("", "W8", "W4, blocks of 32, int4 head")}
    for name, value in {
        "TOKENS": 20,
        "GREEDY": 6,
        "DEMO_CHECKPOINT": checkpoint,
        "SCHEMES": schemes,
        "Driver": cuda_double.Driver,
    }.items():
        monkeypatch.setattr(parity, name, value)
    found = run("parity_gpu", "--workers", "0")["model"]
    assert {form: f["parity"] for form, f in found.items()} == dict.fromkeys(found, "green")
    assert [*found] == [f"{p} {name}".strip() for p in ("fp32", "fp16") for name in schemes]
    assert (found["fp32"]["same_tokens"], found["fp32"]["same_text"]) == (6, True)
    monkeypatch.setitem(parity.RELATIVE, "fp16", 1e-9)
    with pytest.raises(SystemExit, match="model, fp16: the relative difference is"):
        run("parity_gpu", "--workers", "0")


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Path]:
    """A wheel with the names of rwkv-quant-nv: its module loads three extensions."""
    text = (
        "from torch.utils.cpp_extension import load\n"
        "WKV_MODE = 'fp16'\n"
        "def load_extensions(mode):\n"
        "    for name in ('one', 'two', mode):\n"
        "        load(name=name)\n"
    )
    path = tmp_path / "rwkv_quant_nv-9.9.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("rwkv7_fast_v3a.py", text)
        wheel.writestr("cuda/__init__.py", "")
        wheel.writestr("rwkv_quant_nv-9.9.9.dist-info/METADATA", "")
    yield path
    sys.modules.pop("rwkv7_fast_v3a", None)


def test_albatross_is_read_from_its_wheel(scripts: dict[str, ModuleType], package: Path, tmp_path: Path) -> None:
    albatross = scripts["albatross"]
    folder = albatross.unpacked(package, tmp_path)
    assert albatross.version_of(folder) == "9.9.9"
    assert albatross.unpacked(folder, tmp_path) == folder
    module = albatross.imported(folder)
    assert str(folder) not in sys.path
    importlib.import_module("cuda.bindings.driver")  # not hidden by the package's own `cuda`
    assert module.WKV_MODE == "fp16"


@pytest.mark.parametrize("number", range(3))
def test_albatross_builds_one_extension(
    scripts: dict[str, ModuleType], package: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr("torch.utils.cpp_extension.load", lambda name: loaded.append(name))
    scripts["albatross"].build_one(scripts["albatross"].unpacked(package, tmp_path), number)
    assert loaded == [("one", "two", "fp16")[number]]


def test_what_is_no_package_is_refused(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="must hold one package rwkv_quant_nv; found none"):
        scripts["albatross"].version_of(tmp_path)
