"""The kernels as TensorRT's plugins, in a double of `tensorrt.plugin` that checks what TensorRT documents."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import onnx
import pytest
import trtp_double
from makers import MAKERS
from trtp_double import Module, build

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.errors import ExportError
from rwkv_edge.evaluation.synthetic import save_pth
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.plugins.fused_nodes import FUSED_VERSIONS, fused_layers
from rwkv_edge.plugins.spec import KINDS, VERSIONS, KernelSpec, kernel_spec
from rwkv_edge.plugins.tensorrt import register_plugins

SIZES = {"B": 3, "T": 7, "H": 5, "N": 64, "A": 320}
TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


@pytest.fixture
def trtp(monkeypatch: pytest.MonkeyPatch, nvrtc_architectures: tuple[int, ...]) -> Module:
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


def compiled(spec: KernelSpec, nvrtc_architectures: tuple[int, ...], trtp: Module) -> trtp_double.Built:
    if 86 not in nvrtc_architectures:
        pytest.skip("this NVRTC does not know compute_86")
    return build(trtp, f"rwkv::wkv{spec.version}_{spec.kind}", node_inputs(spec))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_launch_is_that_of_the_spec(
    version: str, kind: str, dtype: str, trtp: Module, nvrtc_architectures: tuple[int, ...]
) -> None:
    """Grid, block, shared memory and scalars as expressions of a dynamic batch, for the kernel of that type."""
    spec = kernel_spec(version, kind, dtype, SIZES["N"])
    built = compiled(spec, nvrtc_architectures, trtp)
    assert built.name == spec.name
    assert f".entry {spec.name}(" in built.ptx
    assert ".target sm_86" in built.ptx
    for batch in (1, 3, 64):
        tokens = SIZES["T"] if kind == "sequence" else 1
        dimensions = (batch, tokens, *((SIZES["A"], 1) if version == "4" else (SIZES["H"], SIZES["N"])))
        numbers = built.numbers(B=batch)
        assert numbers["grid"] == spec.grid(*dimensions)
        assert numbers["block"] == spec.block(*dimensions)
        assert numbers["shared"] == (spec.shared_bytes(*dimensions),)
        assert numbers["scalars"] == spec.scalar_values(*dimensions)
        for index, output in enumerate(spec.outputs):
            assert numbers[str(index)] == tuple({**SIZES, "B": batch}[axis] for axis in output.axes)
    assert [dtype.name for dtype, _ in built.outputs] == [TYPES[output.dtype] for output in spec.outputs]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_ptx_takes_what_tensorrt_passes(
    version: str, kind: str, trtp: Module, nvrtc_architectures: tuple[int, ...]
) -> None:
    """Pointers of inputs, int32 scalars, pointers of outputs: the parameters of the entry point, in that order."""
    spec = kernel_spec(version, kind, "float32", SIZES["N"])
    built = compiled(spec, nvrtc_architectures, trtp)
    entry = built.ptx[built.ptx.index(".entry") :]
    kinds = re.findall(r"\.param \.(\w+)", entry[: entry.index(")")])
    assert kinds == ["u64"] * len(spec.inputs) + ["u32"] * len(built.scalars) + ["u64"] * len(spec.outputs)


def shape_of(value: onnx.ValueInfoProto) -> tuple[str, list[int | str]]:
    """Type and shape, a dynamic batch as 'B'."""
    tensor = value.type.tensor_type
    kinds = {1: "FLOAT", 10: "HALF", 16: "BF16"}
    return kinds.get(tensor.elem_type, "?"), [dim.dim_value or "B" for dim in tensor.shape.dim]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("version", ["4", "5.0", "5.2", "6", "7", "7a"])
def test_nodes_of_the_graphs_are_what_the_kernels_take(
    version: str, precision: str, trtp: Module, tmp_path: Path, nvrtc_architectures: tuple[int, ...]
) -> None:
    """Names, namespace, and number, order, types and shapes of inputs and outputs, in steps and in chunks."""
    if 86 not in nvrtc_architectures:
        pytest.skip("this NVRTC does not know compute_86")
    checkpoint = save_pth(MAKERS[version](), tmp_path / "model.pth")
    options = ExportOptions(tokenizer="none", wkv="function", precision=precision, batch=None, chunks=(5,))
    manifest = export_checkpoint(open_checkpoint(checkpoint), tmp_path / "artifact", options)
    assert [graph.wkv for graph in manifest.graphs] == ["function"] * 2
    for graph in manifest.graphs:
        path = tmp_path / "artifact" / graph.file
        model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
        known = {v.name: shape_of(v) for v in (*model.graph.value_info, *model.graph.input)}
        known |= {x.name: ("FLOAT" if x.data_type == 1 else "?", [*x.dims]) for x in model.graph.initializer}
        (function,) = [f for f in model.functions if f.domain == "rwkv"]
        kind = "step" if graph.kind == "step" else "sequence"
        assert function.name == f"wkv{version[0]}_{kind}"
        calls = [node for node in model.graph.node if node.op_type == function.name]
        assert len(calls) == manifest.spec.n_layer
        spec = kernel_spec(version[0], kind, "float32", manifest.spec.head_size)
        sizes = {"B": "B", "T": 5, "H": manifest.spec.n_head, "N": manifest.spec.head_size, "A": manifest.spec.n_att}
        for node in calls:
            assert {a.name: a.s for a in node.attribute} == {"plugin_namespace": b"rwkv"}
            inputs = [known[name] for name in node.input]
            assert inputs == [("FLOAT", [sizes[axis] for axis in argument.axes]) for argument in spec.inputs]
            built = build(trtp, f"rwkv::{node.op_type}", inputs)
            assert built.name == spec.name
            assert len(node.output) == len(built.outputs)
        formal = [name if name != "S" else "state" for name in function.input]
        assert formal == [argument.name for argument in spec.inputs]


def test_registering_twice_is_registering_once(trtp: Module) -> None:
    register_plugins(SimpleNamespace(__name__="fake_trt", __version__="10.13"), 86)
    expected = {f"rwkv::wkv{version}_{kind}" for version in VERSIONS for kind in KINDS}
    expected |= {f"rwkv::{name}" for version in FUSED_VERSIONS for name in fused_layers(version).nodes}
    assert set(trtp.definitions) == expected


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
