"""What differs between versions of TensorRT, with a double of its module: the real one can be installed on none of the
machines that run this (test_trt_names compares the double with its types)."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from trt_double import TensorRTDouble

from rwkv_edge.engines import ENGINE_BACKENDS
from rwkv_edge.errors import ExportError, InputError, MissingDependencyError
from rwkv_edge.exporters import trt_adapter
from rwkv_edge.exporters.trt_adapter import BuiltEngine, EngineSettings, LoadedBackend, build_engine, load_backend
from rwkv_edge.exporters.trt_progress import Phases, held_interrupts
from rwkv_edge.exporters.trt_targets import (
    PARSER_DISPATCH,
    check_precision,
    chosen_targets,
    chosen_wkv,
    device_capability,
    parser_dispatch,
)

VERSIONS = ["10.3.0.30", "10.13.3.9", "10.16.1.2", "11.4.0.1"]
GRAPH = Path("step.onnx")


def build(trt: TensorRTDouble, graph: Path = GRAPH, cache: bytes | None = None, **settings: Any) -> BuiltEngine:
    loaded = LoadedBackend(ENGINE_BACKENDS["tensorrt"], trt)
    return build_engine(loaded, graph, EngineSettings(**{"targets": ("sm87",), **settings}), cache)


# The builder


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_builds_strongly_typed_without_tf32(version: str) -> None:
    trt = TensorRTDouble(version)
    built = build(trt)
    assert bytes(built.memory) == b"engine"
    assert built.cache is None
    assert trt.told.network_flags == 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert trt.told.config.flags == set()
    assert trt.told.config.profiles == []
    assert trt.told.config.pools == {}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_option_reaches_the_builder(version: str) -> None:
    trt = TensorRTDouble(version)
    build(trt, workspace=64 << 20, opt_level=5, refit=True, version_compatible=True)
    config = trt.told.config
    assert config.flags == {"REFIT", "VERSION_COMPATIBLE"}
    assert config.pools == {"WORKSPACE": 64 << 20}
    assert config.builder_optimization_level == 5


def test_a_version_whose_networks_are_all_strongly_typed_needs_no_flag() -> None:
    trt = TensorRTDouble("11.9.0.1", missing=["STRONGLY_TYPED"])
    build(trt)
    assert trt.told.network_flags == 0


def test_a_version_without_a_progress_monitor_builds() -> None:
    trt = TensorRTDouble("10.3.0.30", missing=["IProgressMonitor"])
    assert bytes(build(trt).memory) == b"engine"
    assert trt.told.config.progress_monitor is None


def test_a_dynamic_batch_has_a_profile() -> None:
    trt = TensorRTDouble()
    build(trt, Path("dynamic.onnx"), batch=8)
    shapes = {"token": ((1,), (1,), (8,)), "wkv.0": ((1, 2, 64, 64), (1, 2, 64, 64), (8, 2, 64, 64))}
    assert trt.told.config.profiles == [shapes]
    with pytest.raises(ExportError, match="batches from 1 to 4096; choose another --max-batch"):
        build(trt, Path("dynamic.onnx"), batch=4096)


FAILURES = {
    "start": r"TensorRT cannot start: Error Code 6: CUDA initialization failure: 35; check the GPU's driver",
    "parse": r"TensorRT 10\.13\.3\.9 cannot read step\.onnx: node 'node_7' \(Strange\) in function inner in outer: "
    r"Assertion failed: nobody knows this operator$",
    "parse without errors": r"cannot read step\.onnx: it does not say why",
    "build": r"TensorRT 10\.13\.3\.9 cannot build step\.onnx for sm87: Error Code 2: out of memory$",
}


@pytest.mark.parametrize("where", FAILURES)
def test_failures_are_sentences(where: str) -> None:
    with pytest.raises(ExportError, match=FAILURES[where]) as caught:
        build(TensorRTDouble(fails=where))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", VERSIONS)
def test_candidates_are_outputs_more(version: str) -> None:
    trt = TensorRTDouble(version)
    build(trt)
    assert [tensor.name for tensor in trt.told.network.outputs] == ["logits"]
    build(trt, sample_k=64)
    found = [(tensor.name, tensor.dtype.name) for tensor in trt.told.network.outputs]
    few = [("candidates.logits", "FLOAT"), ("candidates.tokens", "INT32"), ("candidates.norm", "FLOAT")]
    assert found == [("logits", "FLOAT"), *few]
    with pytest.raises(ExportError, match=r"does not take the layers .* smaller --sample-k"):
        build(trt, sample_k=4000)


# Timing cache


def test_a_timing_cache_is_read_and_returned() -> None:
    first = build(TensorRTDouble(), cache=b"").cache
    assert first == b"timed;"
    assert build(TensorRTDouble(), cache=first).cache == b"timed;timed;"


@pytest.mark.parametrize("content", [b"damaged", b"of another GPU"])
def test_a_timing_cache_that_does_not_fit_is_refused(content: bytes) -> None:
    with pytest.raises(InputError, match="the timing cache is damaged, or of another GPU or TensorRT"):
        build(TensorRTDouble(), cache=content)


# Precision


@pytest.mark.parametrize(
    ("dtype", "target", "least"),
    [("BF16", "sm75", "sm80"), ("INT4", "sm75", "sm80"), ("FP8", "sm86", "sm89"), ("FP8", "sm87", "sm89")],
)
def test_what_a_gpu_cannot_compute_with_is_refused_before_the_build(dtype: str, target: str, least: str) -> None:
    trt = TensorRTDouble(layers=[("CONSTANT", "FLOAT"), ("DEQUANTIZE", dtype)])
    with pytest.raises(
        InputError, match=f"step.onnx computes in {dtype}, which GPUs have from {least} on, .* {target}"
    ):
        build(trt, targets=("sm120", target))
    assert trt.told.builds == 0
    build(trt, targets=(least, "sm120"))


def test_other_types_are_for_every_gpu() -> None:
    check_precision(["FLOAT", "HALF", "INT8", "INT64"], ["sm75"], "step.onnx")


# Plugins and the parser's dispatch


def test_the_dispatch_by_version() -> None:
    orders = {v: parser_dispatch(v).order for v in ("10.3.0.30", "10.6.0", "10.7.0", "10.14.1", "10.15.0", "11.4.0")}
    function_first, plugin_first = ("builtin", "function", "plugin"), ("builtin", "plugin", "function")
    named = ("plugin of the node's plugin_namespace", *function_first)
    assert list(orders.values()) == [function_first] * 2 + [plugin_first] * 2 + [named] * 2
    assert [entry.since for entry in PARSER_DISPATCH] == sorted((e.since for e in PARSER_DISPATCH), reverse=True)
    with pytest.raises(InputError, match=r"TensorRT 8\.6\.1 is installed"):
        parser_dispatch("8.6.1")


@pytest.mark.parametrize("version", ["10.9.0.34", "10.14.1.48", "10.15.1.29", "11.4.0.1"])
def test_the_code_of_plugins_goes_into_the_engine(version: str) -> None:
    trt = TensorRTDouble(version, layers=[("PLUGIN_V3", "FLOAT")] * 2)
    build(trt, plugins=2)
    assert trt.told.network_flags == 1 << 1 | 1 << 3
    build(trt)
    assert trt.told.network_flags == 1 << 1


@pytest.mark.parametrize(("taken", "words"), [(0, "no"), (2, "2")])
def test_a_plugin_that_the_parser_did_not_take_is_noticed(taken: int, words: str) -> None:
    looked = rf"took {words} plugins for 3 functions of step\.onnx \(its parser looks for builtin, plugin, function\)"
    with pytest.raises(ExportError, match=looked):
        build(TensorRTDouble(layers=[("PLUGIN_V3", "FLOAT")] * taken), plugins=3)


def test_the_form_of_the_recurrence_must_be_in_the_graph() -> None:
    assert chosen_wkv(None, "inline", "tensorrt", "10.3.0") == "inline"
    assert chosen_wkv(None, "function", "tensorrt-rtx", "1.7.1") == "function"
    assert chosen_wkv("plugin", "function", "tensorrt", "10.9.0") == "plugin"
    assert chosen_wkv("plugin", "fused", "tensorrt", "10.9.0") == "plugin"
    assert chosen_wkv(None, "fused", "tensorrt-rtx", "1.7.1") == "fused"
    refusals = [
        (("function", "inline", "tensorrt", "10.9.0"), "exported with --wkv function, but this one has inline"),
        (("inline", "function", "tensorrt", "10.9.0"), "exported with --wkv inline, but this one has function"),
        (("plugin", "inline", "tensorrt", "10.9.0"), "export the checkpoint with --wkv function"),
        (("plugin", "inline", "tensorrt", "10.9.0"), "with --wkv function or fused, but this one has inline"),
        (("function", "fused", "tensorrt", "10.9.0"), "exported with --wkv function, but this one has fused"),
        (("plugin", "fused", "tensorrt", "10.8.0"), "build with --wkv fused"),
        (("plugin", "function", "tensorrt", "10.8.0"), "needs TensorRT 10.9 or later, but 10.8.0 is installed"),
        (("plugin", "function", "tensorrt-rtx", "1.7.1"), "TensorRT for RTX runs no plugins from Python"),
    ]
    for arguments, words in refusals:
        with pytest.raises(InputError, match=words):
            chosen_wkv(*arguments)


# Targets


def test_targets() -> None:
    known = ("sm75", "sm86", "sm120")
    assert chosen_targets([], "tensorrt", None, (8, 7)) == ("sm87",)
    assert chosen_targets(["sm87"], "tensorrt", None, (8, 7)) == ("sm87",)
    assert chosen_targets([], "tensorrt-rtx", known, (12, 0)) == ("sm120",)
    assert chosen_targets(["sm86", "sm75", "sm86"], "tensorrt-rtx", known, None) == ("sm86", "sm75")
    refusals: list[tuple[tuple[Any, ...], str]] = [
        ((["86"], "tensorrt", None, (8, 6)), "a target is the compute capability of a GPU, such as sm86, not '86'"),
        ((["sm86"], "tensorrt", None, (8, 7)), "TensorRT builds for the GPU of this machine, sm87, not for sm86"),
        ((["sm86"], "tensorrt", None, None), "no NVIDIA GPU was found here.*build on the machine that will run it"),
        (([], "tensorrt-rtx", known, None), "no NVIDIA GPU was found here.*name one with --target sm86"),
        (([], "tensorrt-rtx", known, (9, 0)), "builds for sm75, sm86, sm120, not for sm90"),
        ((["sm87"], "tensorrt-rtx", known, None), "builds for sm75, sm86, sm120, not for sm87"),
    ]
    for arguments, words in refusals:
        with pytest.raises(InputError, match=words):
            chosen_targets(*arguments)


class Driver:
    """CUDA's driver with one GPU; ``failing`` names the functions that return an error."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing

    def cuInit(self, flags: int) -> int:
        return 100 * ("cuInit" in self.failing)  # CUDA_ERROR_NO_DEVICE

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        return 101 * ("cuDeviceGet" in self.failing)

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: 8, 76: 7}[attribute]
        return 1 * ("cuDeviceGetAttribute" in self.failing)


def test_the_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = device_capability()
    assert found is None or (5, 0) <= found < (20, 0)  # (9, 0) on an H100
    for failing, expected in (((), (8, 7)), (("cuInit",), None), (("cuDeviceGet",), None)):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, failing=failing: Driver(*failing))
        assert device_capability() == expected
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver("cuDeviceGetAttribute"))
    with pytest.raises(ExportError, match=r"does not tell the GPU's compute capability \(error 1\)"):
        device_capability()


# Choosing the backend


def test_auto_takes_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, Any] = {"tensorrt": TensorRTDouble(), "tensorrt_rtx": TensorRTDouble("1.7.1")}
    monkeypatch.setattr(trt_adapter, "import_module", lambda name: _imported(modules, name))
    assert load_backend("auto").backend.name == "tensorrt"
    assert load_backend("auto").targets is None
    modules["tensorrt"] = object()  # what tensorrt-stubs leave
    assert load_backend("auto").backend.name == "tensorrt-rtx"
    del modules["tensorrt_rtx"]
    with pytest.raises(MissingDependencyError, match=r"pip install 'rwkv-edge\[tensorrt-rtx\]'"):
        load_backend("auto")
    with pytest.raises(MissingDependencyError, match=r"pip install 'rwkv-edge\[tensorrt\]'"):
        load_backend("tensorrt")
    modules["tensorrt"] = ImportError("libnvinfer.so.10:\ncannot open shared object file")
    with pytest.raises(ExportError, match=r"installed but cannot be loaded: libnvinfer\.so\.10: cannot open"):
        load_backend("tensorrt")
    modules["tensorrt"] = TensorRTDouble("10.2.0.19")
    with pytest.raises(InputError, match=r"TensorRT 10\.2\.0\.19 is installed, but engines need 10\.3 or later"):
        load_backend("tensorrt")
    with pytest.raises(InputError, match="backend must be one of auto, tensorrt, tensorrt-rtx, not 'cuda'"):
        load_backend("cuda")


def _imported(modules: dict[str, Any], name: str) -> Any:
    found = modules.get(name, ModuleNotFoundError(name))
    if isinstance(found, Exception):
        raise found
    return found


# Progress and Ctrl-C


def test_progress_grows_to_the_end() -> None:
    seen: list[float] = []
    loaded = LoadedBackend(ENGINE_BACKENDS["tensorrt"], TensorRTDouble())
    build_engine(loaded, GRAPH, EngineSettings(("sm87",)), report=seen.append)
    assert seen == [0.25, 0.5, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_phases_that_say_nonsense_do_no_harm() -> None:
    phases = Phases()
    phases.step("unknown", 3)
    phases.finish("unknown")
    phases.start("empty", None, 0)
    phases.step("empty", 7)
    assert phases.fraction() == 1.0


@pytest.mark.skipif(os.name != "posix", reason="signals differ there")
def test_ctrl_c_stops_the_builder_before_it_is_raised() -> None:
    trt = TensorRTDouble()
    loaded = LoadedBackend(ENGINE_BACKENDS["tensorrt"], trt)
    reports: list[float] = []

    def report(fraction: float) -> None:
        reports.append(fraction)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_engine(loaded, GRAPH, EngineSettings(("sm87",)), report=report)
    assert reports == [0.25]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_a_report_raises_does_not_pass_through_the_library() -> None:
    loaded = LoadedBackend(ENGINE_BACKENDS["tensorrt"], TensorRTDouble())

    def report(fraction: float) -> None:
        raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError, match="nobody reads"):
        build_engine(loaded, GRAPH, EngineSettings(("sm87",)), report=report)


def test_another_thread_and_another_handler_are_left_alone() -> None:
    def hold() -> None:
        with held_interrupts() as interrupted:
            seen.append((interrupted(), signal.getsignal(signal.SIGINT)))

    seen: list[Any] = []
    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        hold()
    finally:
        signal.signal(signal.SIGINT, former)
    assert seen == [(False, former), (False, signal.SIG_IGN)]
