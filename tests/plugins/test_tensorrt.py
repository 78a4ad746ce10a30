"""The kernels as TensorRT's plugins, in a double of `tensorrt.plugin` that checks what TensorRT documents."""

from __future__ import annotations

import re
import sys
from types import ModuleType, SimpleNamespace

import onnx
import pytest
import trtp_double
from trtp_double import Module, build

from rwkv_edge.errors import ExportError
from rwkv_edge.plugins.spec import VERSIONS, KernelSpec, kernel_spec
from rwkv_edge.plugins.tensorrt import register_plugins

SIZES = {"B": 3, "H": 5, "N": 64, "A": 320}
TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


@pytest.fixture
def trtp(monkeypatch: pytest.MonkeyPatch) -> Module:
    """`tensorrt.plugin` with the kernels registered."""
    module = Module()
    monkeypatch.setitem(sys.modules, "fake_trt.plugin", module)
    register_plugins(SimpleNamespace(__name__="fake_trt", __version__="10.13"), 86)
    return module


def node_inputs(spec: KernelSpec, dynamic: str = "B") -> list[tuple[str, list[int | str]]]:
    return [
        (TYPES[argument.dtype], [axis if axis in dynamic else SIZES[axis] for axis in argument.axes])
        for argument in spec.inputs
    ]


def compiled(version: str, dtype: str, nvrtc_architectures: tuple[int, ...], trtp: Module) -> trtp_double.Built:
    if 86 not in nvrtc_architectures:
        pytest.skip("this NVRTC does not know compute_86")
    return build(trtp, f"rwkv::wkv{version}_step", node_inputs(kernel_spec(version, "step", dtype, SIZES["N"])))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("version", VERSIONS)
def test_launch_is_that_of_the_spec(
    version: str, dtype: str, trtp: Module, nvrtc_architectures: tuple[int, ...]
) -> None:
    """Grid, block, shared memory and scalars as expressions of a dynamic batch, for the kernel of that type."""
    spec = kernel_spec(version, "step", dtype, SIZES["N"])
    built = compiled(version, dtype, nvrtc_architectures, trtp)
    assert built.name == spec.name
    assert f".entry {spec.name}(" in built.ptx
    assert ".target sm_86" in built.ptx
    for batch in (1, 3, 64):
        dimensions = (batch, 1, *((SIZES["A"], 1) if version == "4" else (SIZES["H"], SIZES["N"])))
        numbers = built.numbers(B=batch)
        assert numbers["grid"] == spec.grid(*dimensions)
        assert numbers["block"] == spec.block(*dimensions)
        assert numbers["shared"] == (spec.shared_bytes(*dimensions),)
        assert numbers["scalars"] == spec.scalar_values(*dimensions)
        for index, output in enumerate(spec.outputs):
            assert numbers[str(index)] == tuple({**SIZES, "B": batch}[axis] for axis in output.axes)
    assert [dtype.name for dtype, _ in built.outputs] == [TYPES[output.dtype] for output in spec.outputs]


@pytest.mark.parametrize("version", VERSIONS)
def test_ptx_takes_what_tensorrt_passes(version: str, trtp: Module, nvrtc_architectures: tuple[int, ...]) -> None:
    """Pointers of inputs, int32 scalars, pointers of outputs: the parameters of the entry point, in that order."""
    spec = kernel_spec(version, "step", "float32", SIZES["N"])
    built = compiled(version, "float32", nvrtc_architectures, trtp)
    entry = built.ptx[built.ptx.index(".entry") :]
    kinds = re.findall(r"\.param \.(\w+)", entry[: entry.index(")")])
    assert kinds == ["u64"] * len(spec.inputs) + ["u32"] * len(built.scalars) + ["u64"] * len(spec.outputs)


def test_names_are_those_of_the_graphs(trtp: Module, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The exporter's nodes have the plugins' names, namespace, and number and order of inputs and outputs."""
    from tiny import write_artifact

    folder = write_artifact(tmp_path_factory.mktemp("plugin") / "model", 0, "--wkv", "function", "--batch", "dynamic")
    model = onnx.load(folder / "step.onnx", load_external_data=False)
    (function,) = [f for f in model.functions if f.domain == "rwkv"]
    definition = trtp.definitions[f"rwkv::{function.name}"]
    calls = [node for node in model.graph.node if node.op_type == function.name]
    assert calls
    for node in calls:
        assert len(node.input) == len(definition.inputs)
        assert len(node.output) == definition.outputs
        assert {a.name: a.s for a in node.attribute}["plugin_namespace"] == b"rwkv"
    formal = [name if name != "S" else "state" for name in function.input]
    assert formal == definition.inputs


def test_registering_twice_is_registering_once(trtp: Module) -> None:
    register_plugins(SimpleNamespace(__name__="fake_trt", __version__="10.13"), 86)
    assert sorted(trtp.definitions) == [f"rwkv::wkv{version}_step" for version in VERSIONS]


def test_a_state_of_half_precision_has_no_kernel(trtp: Module) -> None:
    spec = kernel_spec("7", "step", "float16", 64)
    inputs = node_inputs(spec)
    inputs[0] = ("HALF", inputs[0][1])
    with pytest.raises(ValueError, match="no combination of types"):
        build(trtp, "rwkv::wkv7_step", inputs)


def test_activations_of_two_types_have_no_kernel(trtp: Module) -> None:
    inputs = node_inputs(kernel_spec("7", "step", "float16", 64))
    inputs[1] = ("BF16", inputs[1][1])
    with pytest.raises(ValueError, match="no combination of types"):
        build(trtp, "rwkv::wkv7_step", inputs)


@pytest.mark.parametrize("module", [None, ModuleType("old_trt.plugin")])
def test_an_older_tensorrt_is_refused(module: ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if module is not None:
        module.register = module.autotune = lambda name: None  # type: ignore[attr-defined]  # but no aot_impl
        monkeypatch.setitem(sys.modules, "old_trt.plugin", module)
    with pytest.raises(ExportError, match=r"^old_trt 10\.6 has no plugins that are compiled ahead of time .* 10\.9"):
        register_plugins(SimpleNamespace(__name__="old_trt", __version__="10.6"), 86)
