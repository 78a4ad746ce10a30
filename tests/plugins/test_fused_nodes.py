"""Fused nodes: the plugins' kernels mean what the functions' bodies say, launched as TensorRT is told to launch them.

Everything runs twice: on a GPU where there is one, and with numpy in the kernels' place.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda_double
import cuda_versions_double
import numpy as np
import onnx
import pytest
import trtp_double
from fused_engine import Bodies, FusedEngine, Value
from makers import MAKERS

from rwkv_edge.artifact import Artifact
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.errors import InputError
from rwkv_edge.evaluation.synthetic import Shape7, random_v7, save_pth
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.plugins import nvrtc
from rwkv_edge.plugins.fused_nodes import FUSED_VERSIONS, fused_layers, sizes_of
from rwkv_edge.plugins.fused_spec import FusedKernel
from rwkv_edge.plugins.tensorrt import register_plugins
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.spec import ModelSpec, matrix_state, stored_from_float32

SHAPES: dict[str, Shape7] = {
    "one head": Shape7(2, 64, 256, 64, 4, (32, 32, 16, 32)),
    "many heads": Shape7(3, 192, 320, 32, 4, (16, 8, 8, 48)),
    "wide heads": Shape7(2, 256, 512, 128, 3.5, (64, 64, 32, 128)),
    "narrow heads": Shape7(2, 72, 264, 8, 3, (8, 8, 8, 16)),
    "one layer": Shape7(1, 128, 256, 64, 4, (32, 32, 16, 32)),
    "1.5B's widths": Shape7(2, 2048, 4096, 64, 4, (96, 96, 64, 256)),
}
TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2}
"""Over the largest value: a body rounds the input and the output of a product to 16 bits, a kernel neither."""
VERSIONS = {f"RWKV-{version}": make for version, make in MAKERS.items() if version != "7"}
HALVED = "RWKV-6"  # after every layer
BATCHES = (1, 3, 8)
STEPS = 6


def is_run(where: str, name: str, precision: str, batch: int) -> bool:
    """Large widths only on a GPU, where a block has no memory for the inputs of 8 streams, and not in bfloat16, which
    numpy multiplies number by number; 16 bits in one small shape; without a GPU all numbers of streams in one."""
    if name in VERSIONS:
        return batch == 3 and (where == "gpu" or precision == "fp32" or name == HALVED)
    if name == "1.5B's widths":
        return where == "gpu" and precision != "bf16" and batch < 8
    if where == "numpy" and batch != 3 and name != "one head":
        return False
    return precision == "fp32" or name == "many heads"


CASES = [
    pytest.param(case, id="-".join(map(str, case)), marks=[pytest.mark.gpu] * (case[0] == "gpu"))
    for case in itertools.product(("numpy", "gpu"), (*SHAPES, *VERSIONS), TOLERANCE, BATCHES)
    if is_run(*case)
]


@dataclass(frozen=True)
class Setting:
    """A graph in both forms of execution."""

    engine: FusedEngine
    bodies: Bodies
    whole: OrtSession
    tolerance: float


@pytest.fixture
def setting(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    where, name, precision, batch = request.param
    if where == "gpu":
        request.getfixturevalue("gpu")
        from rwkv_edge.runtime.cuda_driver import Driver

        driver: Any = Driver(0)
    else:
        request.getfixturevalue("nvrtc_architectures")
        driver = cuda_double.Driver()
        monkeypatch.setattr(FusedKernel, "ptx", cuda_double.described)
        monkeypatch.setattr(cuda_double, "KERNELS", cuda_double.KERNELS | cuda_versions_double.KERNELS)
    module = registered(monkeypatch, driver.capability)
    weights = VERSIONS[name]() if name in VERSIONS else random_v7(SHAPES[name])
    checkpoint = open_checkpoint(save_pth(weights, tmp_path / "model.pth"))
    options = ExportOptions(
        precision=precision, batch=batch, wkv="fused", chunks=(), tokenizer="none", rescale=int(name == HALVED)
    )
    export_checkpoint(checkpoint, tmp_path / "fused", options)
    export_checkpoint(checkpoint, tmp_path / "plain", replace(options, wkv="inline", precision="fp32"))
    engine = FusedEngine(tmp_path / "fused", driver, module)
    whole = OrtSession(Artifact.open(tmp_path / "plain"))
    yield Setting(engine, Bodies(engine.model), whole, TOLERANCE[precision])
    whole.close()
    driver.close()


def registered(monkeypatch: pytest.MonkeyPatch, capability: int) -> trtp_double.Module:
    """The double of `tensorrt.plugin`, with the plugins registered for a GPU."""
    module = trtp_double.Module()
    monkeypatch.setitem(sys.modules, "fake_trt.plugin", module)
    trt = SimpleNamespace(__name__="fake_trt", __version__="10.13", DataType=trtp_double.DataType)
    register_plugins(trt, capability)
    return module


def random_state(spec: ModelSpec, batch: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    arrays = {t.name: draw.normal(0, 0.5, (batch, *t.shape)).astype(np.float32) for t in spec.state}
    return {name: np.abs(x) + 0.1 if name.startswith("wkv_den") else x for name, x in arrays.items()}


def stored(arrays: dict[str, np.ndarray], spec: ModelSpec) -> dict[str, Value]:
    return {t.name: Value(stored_from_float32(arrays[t.name], t.dtype), t.dtype) for t in spec.state}


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    assert np.isfinite(found).all()
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-3))


@pytest.mark.parametrize("setting", CASES, indirect=True)
def test_kernels_are_bodies(setting: Setting) -> None:
    """Every node of several steps, from a state that is not zero, with repeated tokens; and the steps as a whole."""
    engine, whole = setting.engine, setting.whole
    spec = engine.spec
    batch = spec.batch or 1
    arrays = random_state(spec, batch)
    state, expected = stored(arrays, spec), whole.import_state(arrays)
    tokens = np.random.default_rng(2).integers(0, spec.vocab_size, (STEPS, batch))
    tokens[1] = tokens[0]
    for row in tokens:
        for ran in engine.step(row, state):
            for found, body, name in zip(ran.outputs, setting.bodies.run(ran), ran.node.output, strict=True):
                kernel = found.wide
                if ran.node.op_type.endswith("_out"):  # partial sums, of which the body has one
                    kernel, body = kernel.sum(0), body.sum(0)
                assert apart(kernel, body) <= setting.tolerance, f"{ran.node.op_type}: {name}"
        state = engine.after()
        assert apart(engine.logits(), whole.step(row, expected)) <= setting.tolerance
    for name, array in whole.export_state(expected).items():
        assert apart(state[name].wide, array) <= setting.tolerance, name


MODELS = {
    "0.1B": (12, 768, 64, 3072, (64, 64, 128, 32)),
    "1.5B": (24, 2048, 64, 8192, (96, 96, 256, 64)),
    "7B": (32, 4096, 64, 16384, (192, 192, 384, 128)),
    "heads of 128": (2, 256, 128, 1024, (64, 64, 128, 32)),
}


def spec_of(name: str, batch: int, precision: str = "fp16") -> ModelSpec:
    layers, width, head, hidden, ranks = MODELS[name]
    heads = width // head
    return ModelSpec(
        version="7", n_layer=layers, n_embd=width, n_att=width, n_ffn=hidden, n_head=heads, head_size=head,
        vocab_size=65536, precision=precision, batch=batch, state=matrix_state(layers, width, heads, head, precision),
        extra=dict(zip(("rank_w", "rank_a", "rank_g", "rank_v"), ranks, strict=True)),
    )  # fmt: skip


FITTING = [
    ("0.1B", 1, "fp16"),
    ("0.1B", 8, "fp32"),
    ("1.5B", 3, "bf16"),
    ("7B", 1, "fp16"),
    ("heads of 128", 8, "fp32"),
]


@pytest.mark.parametrize(("model", "batch", "precision"), FITTING)
def test_a_block_has_memory_enough_on_every_device(
    model: str, batch: int, precision: str, nvrtc_architectures: tuple[int, ...]
) -> None:
    """TensorRT cannot ask for more: static and dynamic shared memory together, as ptxas inside NVRTC counts them."""
    if 87 not in nvrtc_architectures:
        pytest.skip("this NVRTC does not know sm_87")
    spec = spec_of(model, batch, precision)
    for node in fused_layers("7").nodes.values():
        kernel = node.kernel(sizes_of(node, spec), spec.act_dtype)
        options = [*nvrtc.OPTIONS, *(f"-D{name}={value}" for name, value in kernel.defines)]
        _, log = nvrtc.compiled(kernel.source, [*options, "--gpu-architecture=sm_87", "--ptxas-options=-v"])
        if "registers" not in log:
            pytest.skip("this NVRTC passes on no report of ptxas")
        found = re.search(r"(\d+) bytes smem", log)
        assert kernel.shared + (int(found[1]) if found else 0) <= 48 << 10, node.name


@pytest.mark.parametrize("version", FUSED_VERSIONS)
def test_arguments_are_those_of_the_kernels(version: str) -> None:
    """Names and order, for the shapes of a model; one of them halves the stream."""
    spec = spec_of("0.1B", 2)
    spec = replace(spec, extra={**spec.extra, "rank_decay": 0, "rank_mix": 32, "rank_deep_embed": 32})
    halving = []
    for node in fused_layers(version).nodes.values():
        kernel = node.kernel(sizes_of(node, spec), "float16")
        assert tuple(argument.name for argument in node.inputs) == kernel.inputs
        assert tuple(argument.name for argument in node.outputs) == kernel.outputs
        assert "halted" not in kernel.inputs
        halving += [node.name] * (dict(kernel.defines)["HALVE"] == "1")
    assert halving == [fused_layers(version).of(6, 6)[0].name]


SMALL = {"D": 128, "A": 128, "F": 512, "H": 2, "N": 64, "V": 256, "B": 2, "M": 160, "m": 32}


@pytest.mark.parametrize("version", FUSED_VERSIONS)
def test_all_compile(version: str, nvrtc_architectures: tuple[int, ...]) -> None:
    """A node knows no dimensions but those of its inputs."""
    if 90 not in nvrtc_architectures:
        pytest.skip("this NVRTC does not know compute_90")
    for node in fused_layers(version).nodes.values():
        letters = {letter for argument in node.inputs for letter in argument.axes if letter.isalpha()}
        kernel = node.kernel({letter: SMALL.get(letter, 32) for letter in letters}, "float16")
        assert f".entry {kernel.name}(" in kernel.ptx(90)


def test_five_nodes_a_layer() -> None:
    layers = fused_layers("7")
    names = ["time_mix_in", "wkv", "time_mix_out", "channel_mix_in", "channel_mix_out"]
    assert [node.name for node in layers.of(3)] == [f"v7_{name}" for name in names]
    assert [node.name for node in layers.of(0)] == [f"v7_{name}{'_first' * (i < 2)}" for i, name in enumerate(names)]
    assert layers.of(1) is layers.of(7)
    assert [len(fused_layers(version).of(1)) for version in ("4", "5.0", "5.2", "6", "7a")] == [5, 5, 5, 7, 6]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_plugins_of_the_graph(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvrtc_architectures: tuple[int, ...]
) -> None:
    """The types and shapes of the graph fit a plugin, whose PTX takes a pointer for each input and output."""
    if 86 not in nvrtc_architectures:
        pytest.skip("this NVRTC does not know compute_86")
    module = registered(monkeypatch, 86)
    checkpoint = open_checkpoint(save_pth(random_v7(SHAPES["many heads"]), tmp_path / "model.pth"))
    options = ExportOptions(precision=precision, batch=2, wkv="fused", chunks=(), tokenizer="none")
    export_checkpoint(checkpoint, tmp_path / "fused", options)
    model = onnx.load(tmp_path / "fused" / "step.onnx", load_external_data=False)
    known = {value.name: shape_of(value) for value in (*model.graph.value_info, *model.graph.input)}
    known |= {value.name: shape_of(value) for value in model.graph.output}
    kinds = {1: "FLOAT", 10: "HALF", 16: "BF16"}
    known |= {x.name: (kinds.get(x.data_type, "?"), [*x.dims]) for x in model.graph.initializer}
    calls = [node for node in model.graph.node if node.domain == "rwkv"]
    assert len(calls) == 5 * SHAPES["many heads"].n_layer
    for node in calls:
        assert {a.name: a.s for a in node.attribute} == {"plugin_namespace": b"rwkv"}
        built = trtp_double.build(module, f"rwkv::{node.op_type}", [known[name] for name in node.input])
        numbers = built.numbers()
        for index, ((kind, _), name) in enumerate(zip(built.outputs, node.output, strict=True)):
            shape = list(numbers[str(index)])
            if node.op_type.endswith("_out"):  # so many partial sums as the kernel gives
                shape[0] = 1
            assert (kind.name, shape) == known[name]
        entry = built.ptx[built.ptx.index(".entry") :]
        parameters = re.findall(r"\.param \.(\w+)", entry[: entry.index(")")])
        assert parameters == ["u64"] * (len(node.input) + len(node.output))
        assert f".entry {built.name}(" in built.ptx


def shape_of(value: onnx.ValueInfoProto) -> tuple[str, list[int]]:
    kinds = {1: "FLOAT", 6: "INT32", 10: "HALF", 16: "BF16"}
    tensor = value.type.tensor_type
    return kinds.get(tensor.elem_type, "?"), [dim.dim_value for dim in tensor.shape.dim]


def test_a_plugin_takes_no_other_types(monkeypatch: pytest.MonkeyPatch, nvrtc_architectures: tuple[int, ...]) -> None:
    module = registered(monkeypatch, nvrtc_architectures[-1])
    node = fused_layers("7").nodes["v7_time_mix_out"]
    inputs = [("FLOAT", [2, 128]), ("HALF", [128, 128]), ("BF16", [128, 128])]
    assert len(inputs) == len(node.inputs)
    with pytest.raises(ValueError, match="no combination of types"):
        trtp_double.build(module, f"rwkv::{node.name}", inputs)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"B": 9}, "1 to 8 streams; found 9"),
        ({"w": 12}, "rank_w that is a multiple of 8; found 12"),
        ({"N": 256, "H": 3}, "at most 128 channels"),
    ],
)
def test_what_the_kernels_do_not_take(changed: dict[str, int], sentence: str) -> None:
    node = fused_layers("7").nodes["v7_wkv"]
    with pytest.raises(InputError, match=sentence):
        node.kernel({**sizes_of(node, spec_of("0.1B", 1)), **changed}, "float16")
