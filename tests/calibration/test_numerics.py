"""Each quantized product against integers in numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from rwkv_edge.artifact import Artifact
from rwkv_edge.calibration.pieces import QuantizedWeight, packed_int4
from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
from rwkv_edge.calibration.rounding import Rounded, rounded
from rwkv_edge.calibration.schemes import SchemeOptions
from rwkv_edge.calibration.source import FloatWeights
from rwkv_edge.runtime.ort_graph import saturates


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Tensors of a quantized artifact by name; int4 unpacked."""
    raw = np.fromfile(folder / "weights.bin", np.uint8)
    found = {}
    for place in _index(folder):
        part = raw[place["offset"] : place["offset"] + place["nbytes"]]
        if place["dtype"] == "int4":
            pairs = np.stack([part & 15, part >> 4], 1).ravel().astype(np.int8)
            found[place["name"]] = np.where(pairs > 7, pairs - 16, pairs).reshape(place["shape"])
        else:
            found[place["name"]] = part.view(place["dtype"]).reshape(place["shape"])
    return found


def _index(folder: Path) -> list:
    import json

    return json.loads((folder / "weights.json").read_bytes())


def products(folder: Path, cut: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Of every quantized product of the step: parameter, what went into ``cut`` before it, and what came out."""
    model = onnx.load(str(folder / "step.onnx"), load_external_data=False)
    made = {output: node for node in model.graph.node for output in node.output}
    wanted = []
    for node in model.graph.node:
        producer = made.get(node.input[1]) if node.op_type == "MatMul" else None
        if producer is not None and producer.op_type == "DequantizeLinear":
            name = producer.input[0].removesuffix(".q")
            value = node.input[0]
            while cut == "float" and made[value].op_type in ("DequantizeLinear", "QuantizeLinear"):
                value = made[value].input[0]
            wanted.append((name, value, node.output[0]))
    taps = {value for _, *values in wanted for value in values}
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(taps - known))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if saturates(model.SerializeToString()):
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"token": np.array([65])}
    random = np.random.default_rng(3)
    for value in session.get_inputs():
        if value.name != "token":
            feeds[value.name] = random.normal(size=value.shape).astype(np.float32)
    found = dict(zip(sorted(taps), session.run(sorted(taps), feeds), strict=True))
    return [(name, found[before], found[after]) for name, before, after in wanted]


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_w8a8_is_integers_times_scales(version: str, calibrated: Callable, tmp_path: Path) -> None:
    source = calibrated(version)
    quantize_artifact(source.artifact, tmp_path, QuantizeOptions(SchemeOptions("w8a8")), source.calibration)
    tensors = stored(tmp_path)
    found = products(tmp_path, "float")
    assert len(found) > 8
    for name, x, y in found:
        scale = tensors[f"{name}.input_scale"]
        integers = np.clip(np.rint(x.reshape(-1, x.shape[-1]) / scale), -128, 127).astype(np.int32)
        sums = integers @ tensors[f"{name}.q"].astype(np.int32)
        expected = sums.astype(np.float32) * (scale * tensors[f"{name}.scale"])
        assert np.array_equal(y.reshape(expected.shape), expected), name


@pytest.mark.parametrize("scheme", ["w8", "w4"])
def test_weight_only_multiplies_the_restored_weight(scheme: str, calibrated: Callable, tmp_path: Path) -> None:
    """Other outputs keep ONNX Runtime from fusing, so that the standard operators themselves are compared."""
    source = calibrated("7")
    quantize_artifact(source.artifact, tmp_path, QuantizeOptions(SchemeOptions(scheme)), source.calibration)
    tensors = stored(tmp_path)
    for name, x, y in products(tmp_path, "float"):
        q, scale = tensors[f"{name}.q"].astype(np.float32), tensors[f"{name}.scale"]
        weight = Rounded(q, scale.reshape(-1, q.shape[1])).restored()
        expected = x.reshape(-1, x.shape[-1]).astype(np.float64) @ weight
        assert np.abs(y.reshape(expected.shape) - expected).max() < 0.02 * np.abs(expected).max(), name


@pytest.mark.parametrize("bits", [8, 4])
def test_cpu_form_restores_the_same_weight(bits: int, tmp_path: Path) -> None:
    """MatMulNBits with a unit matrix gives the weight back: the integers lie where the kernel looks for them."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(64, 48)).astype(np.float32)
    block = 32 if bits == 4 else None
    form = QuantizedWeight("w", f"w{bits}", (64, 48), block, "float32", "cpu")
    found = rounded(weight, bits, block, None)
    values, scales = form.arrays(found, None)
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", K=64, N=48, bits=bits, block_size=form.cpu_block
    )
    pieces = form.pieces()
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [onnx.helper.make_tensor_value_info("x", 1, [64, 64])],
        [onnx.helper.make_tensor_value_info("y", 1, [64, 48])],
        [
            onnx.helper.make_tensor("q", 2, pieces[0].shape, values.tobytes(), raw=True),
            onnx.helper.make_tensor("s", 1, pieces[1].shape, scales.tobytes(), raw=True),
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.eye(64, dtype=np.float32)})
    assert np.allclose(y, found.restored(), rtol=1e-6, atol=1e-7)


def test_int4_packs_the_first_value_low() -> None:
    packed = packed_int4(np.array([1, -1, 7, -8, 3], np.int8))
    assert packed.tolist() == [0xF1, 0x87, 0x03]


def test_smoothing_changes_no_bit_of_the_float_model(calibrated: Callable, tmp_path: Path) -> None:
    """Products of activations divided by powers of two and weights times the same are the same to the bit."""
    source = calibrated("7")
    quantize_artifact(source.artifact, tmp_path, QuantizeOptions(SchemeOptions("w8a8"), 0.5), source.calibration)
    artifact, plain = Artifact.open(tmp_path), FloatWeights.open(Artifact.open(source.artifact))
    assert artifact.manifest.quantization["smoothed"] > 0
    tensors = stored(tmp_path)
    norm = plain.load("blocks.1.ln1.weight")
    factor = norm / tensors["blocks.1.ln1.weight"]
    assert len(np.unique(factor)) > 1
    assert np.array_equal(np.log2(factor), np.rint(np.log2(factor)))
    kept = plain.load("blocks.1.att.w1")
    assert np.array_equal(tensors["blocks.1.att.w1"], kept * factor[:, None])
