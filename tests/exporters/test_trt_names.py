"""What the adapter uses of TensorRT's module is there: in the types of TensorRT 10.13, in TensorRT for RTX, and in the
double that stands for the first in tests."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import trt_double
import trt_runtime_double
from trt_double import TensorRTDouble

from rwkv_edge.exporters import trt_types
from rwkv_edge.runtime import trt_module

CLASSES = {
    "HostMemory": "IHostMemory",
    "Tensor": "ITensor",
    "Layer": "ILayer",
    "NetworkDefinition": "INetworkDefinition",
    "OptimizationProfile": "IOptimizationProfile",
    "TimingCache": "ITimingCache",
    "BuilderConfig": "IBuilderConfig",
    "ParserError": "ParserError",
    "OnnxParser": "OnnxParser",
    "Builder": "Builder",
}
"""Type of the adapter → class of TensorRT."""

RUNTIME_CLASSES = {"ExecutionContext": "IExecutionContext", "CudaEngine": "ICudaEngine", "Runtime": "Runtime"}
"""Type of the runtime → class of TensorRT."""

MEMBERS = [
    ("BuilderFlag", ["TF32", "REFIT", "VERSION_COMPATIBLE"]),
    ("MemoryPoolType", ["WORKSPACE"]),
    ("NetworkDefinitionCreationFlag", ["STRONGLY_TYPED"]),
    ("DataType", trt_double.DATA_TYPES),
    ("LayerType", ["PLUGIN_V3"]),
    *trt_double.OPERATIONS.items(),
    ("IProgressMonitor", ["phase_start", "phase_finish", "step_complete"]),
    ("ILogger", ["Severity", "log"]),
]

RUNTIME_MEMBERS = [
    ("ExecutionContextAllocationStrategy", ["USER_MANAGED"]),
    ("TensorIOMode", ["INPUT", "OUTPUT"]),
    ("DataType", ["FLOAT", "HALF", "BF16", "INT64"]),
]

Signatures = dict[str, list[str] | None]
"""Member → names of its parameters without self, None for what is no method."""


def signatures(tree: ast.ClassDef) -> Signatures:
    found: Signatures = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            is_property = any(ast.unparse(d) == "property" for d in node.decorator_list)
            found[node.name] = None if is_property else [a.arg for a in node.args.args if a.arg != "self"]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = None
        elif isinstance(node, ast.ClassDef):
            found[node.name] = None
    return found


def needed() -> dict[str, Signatures]:
    """Members of the types that the adapter uses, by TensorRT's name of the class."""
    tree = ast.parse(Path(str(trt_types.__file__)).read_text(encoding="utf-8"))
    classes = {node.name: signatures(node) for node in tree.body if isinstance(node, ast.ClassDef)}
    assert set(classes) == {*CLASSES, "Member", "RtxBuilderConfig"}
    return {CLASSES[name]: members for name, members in classes.items() if name in CLASSES}


def needed_to_run() -> dict[str, Signatures]:
    """Members of the types that the runtime uses, by TensorRT's name of the class."""
    tree = ast.parse(Path(str(trt_module.__file__)).read_text(encoding="utf-8"))
    classes = {node.name: signatures(node) for node in tree.body if isinstance(node, ast.ClassDef)}
    assert set(classes) == {*RUNTIME_CLASSES, "Member", "EngineLoader"}
    return {RUNTIME_CLASSES[name]: members for name, members in classes.items() if name in RUNTIME_CLASSES}


@pytest.fixture(scope="module")
def stubs() -> dict[str, Signatures]:
    """The classes of `tensorrt-stubs`; five of its lines are no Python and none of ours."""
    spec = find_spec("tensorrt_bindings")
    places = list(spec.submodule_search_locations or []) if spec else []
    path = Path(places[0]) / "tensorrt.pyi" if places else None
    if path is None or not path.is_file():
        pytest.skip("tensorrt-stubs are not installed")
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"\bin: list\[", "in_: list[", text)
    text = text.replace("power: Weights = None, channel_axis: int)", "power: Weights = None, channel_axis: int = 0)")
    return {node.name: signatures(node) for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}


def test_what_the_adapter_uses_is_in_tensorrt_10_13(stubs: dict[str, Signatures]) -> None:
    for name, members in needed().items():
        for member, parameters in members.items():
            if member != "__buffer__":
                assert stubs[name].get(member, "absent") == parameters, f"{name}.{member}"
    for name, names in MEMBERS:
        assert set(names) <= set(stubs[name]), name
    assert "PREFER_AOT_PYTHON_PLUGINS" in stubs["NetworkDefinitionCreationFlag"]
    assert "num_compute_capabilities" not in stubs["IBuilderConfig"]
    assert "ComputeCapability" not in stubs


def test_what_the_adapter_uses_is_in_tensorrt_rtx() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    for name, members in needed().items():
        for member in members:
            assert member == "__buffer__" or hasattr(getattr(rtx, name), member), f"{name}.{member}"
    for name, names in MEMBERS:
        assert set(names) <= set(dir(getattr(rtx, name))), name
    assert hasattr(rtx.IBuilderConfig, "num_compute_capabilities")
    assert hasattr(rtx.IBuilderConfig, "set_compute_capability")
    assert not hasattr(rtx.BuilderFlag, "FP16")


def test_the_double_has_the_names_of_tensorrt(stubs: dict[str, Signatures]) -> None:
    double = TensorRTDouble()
    for name, members in needed().items():
        class_ = getattr(double, name, None) or getattr(trt_double, name)
        for member in members:
            assert member == "__buffer__" or hasattr(class_, member), f"{name}.{member}"
    for name in ("DataType", "BuilderFlag", "MemoryPoolType", "NetworkDefinitionCreationFlag"):
        assert set(getattr(double, name).__members__) <= set(stubs[name]), name


def test_what_the_runtime_uses_is_in_tensorrt_10_13(stubs: dict[str, Signatures]) -> None:
    first = {"deserialize_cuda_engine", "create_execution_context", "set_input_shape"}  # overloaded: the first is ours
    for name, members in needed_to_run().items():
        for member, parameters in members.items():
            assert member in stubs[name], f"{name}.{member}"
            assert member in first or stubs[name][member] == parameters, f"{name}.{member}"
    for name, names in RUNTIME_MEMBERS:
        assert set(names) <= set(stubs[name]), name


def test_what_the_runtime_uses_is_in_tensorrt_rtx() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    for name, members in needed_to_run().items():
        for member, parameters in members.items():
            found = getattr(getattr(rtx, name), member)
            for parameter in parameters or ():
                assert f"{parameter}: " in found.__doc__, f"{name}.{member}"
    for name, names in RUNTIME_MEMBERS:
        assert set(names) <= set(dir(getattr(rtx, name))), name


def test_the_double_that_runs_has_no_other_names(stubs: dict[str, Signatures]) -> None:
    double = trt_runtime_double.RuntimeDouble()
    for name, members in needed_to_run().items():
        class_ = getattr(double, name, None) or getattr(trt_runtime_double, name)
        found = {member for member in vars(class_) if not member.startswith("_")}
        assert found == set(members) - {"__buffer__"}, name
        assert found <= set(stubs[name]), name
