"""A step graph of fused nodes, run as TensorRT would run its engine: every node by its plugin's kernel.

All that is used is what the plugin says: PTX, grid, block, shared memory, shapes; pointers of inputs, then of outputs.
The kernels run on a GPU, or as numpy in `cuda_double`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import trtp_double
from onnx import helper
from onnx.reference import ReferenceEvaluator

from rwkv_edge.spec import ModelSpec, float32_from_stored, numpy_dtype, stored_from_float32

TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32"}
ONNX = {"float32": 1, "float16": 10, "bfloat16": 16, "int32": 6}
OWN_SHARED = 48 << 10  # bytes that a block has without being given more, which TensorRT cannot do


@dataclass(frozen=True)
class Value:
    """An array in its stored form, bfloat16 as bits."""

    array: np.ndarray
    dtype: str

    @property
    def wide(self) -> np.ndarray:
        return float32_from_stored(self.array, self.dtype)


@dataclass(frozen=True)
class Ran:
    """A node with what it was given and what its kernel gave."""

    node: onnx.NodeProto
    inputs: list[Value]
    outputs: list[Value]


class FusedEngine:
    """See the module's docstring.

    Args:
        folder: an artifact with a fused step of a fixed batch size.
        driver: a GPU's, or `cuda_double.Driver`.
        trtp: the double of tensorrt.plugin, with the plugins registered for the driver's capability.
    """

    def __init__(self, folder: Path, driver: Any, trtp: trtp_double.Module) -> None:
        self.model = onnx.load(folder / "step.onnx", load_external_data=False)
        (text,) = [p.value for p in self.model.metadata_props if p.key == "rwkv_edge.spec"]
        self.spec = ModelSpec.from_json(json.loads(text))
        self._driver, self._trtp, self._built = driver, trtp, {}
        data = np.memmap(folder / "weights.bin", np.uint8, mode="r")
        self.weights = {}
        for entry in json.loads((folder / "weights.json").read_text()):
            raw = data[entry["offset"] : entry["offset"] + entry["nbytes"]]
            array = raw.view(numpy_dtype(entry["dtype"])).reshape(entry["shape"])
            self.weights[entry["name"]] = Value(np.array(array), entry["dtype"])

    def step(self, tokens: np.ndarray, state: Mapping[str, Value]) -> Iterator[Ran]:
        """Run all nodes of a step; the last give the new state under the names of the graph's outputs."""
        self.values = {**self.weights, **state}
        (cast,) = [node for node in self.model.graph.node if node.op_type == "Cast" and node.input[0] == "token"]
        self.values[cast.output[0]] = Value(tokens.astype(np.int32), "int32")
        for node in self.model.graph.node:
            if node.op_type == "Split":  # stacked coefficients, for kernels that take them one by one
                stacked = self.values[node.input[0]]
                parts = np.split(stacked.array, len(node.output))
                self.values.update({n: Value(x, stacked.dtype) for n, x in zip(node.output, parts, strict=True)})
            if node.domain == "rwkv":
                inputs = [self.values[name] for name in node.input]
                outputs = self._run(node.op_type, inputs)
                self.values.update(zip(node.output, outputs, strict=True))
                yield Ran(node, inputs, outputs)

    def after(self) -> dict[str, Value]:
        """The state after a step."""
        return {tensor.name: self.values[f"{tensor.name}.out"] for tensor in self.spec.state}

    def logits(self) -> np.ndarray:
        """What the plain operators after the last node make of its open sum."""
        summed = next(node for node in self.model.graph.node if node.op_type == "ReduceSum")
        total = next(node for node in self.model.graph.node if node.op_type == "Sum")
        assert total.input[1] == summed.output[0]
        x = self.values[total.input[0]].wide + self.values[summed.input[0]].wide.sum(0)
        if self.spec.rescale and self.spec.n_layer % self.spec.rescale == 0:
            x = x * 0.5
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        norm = [self.weights[f"ln_out.{part}"].wide for part in ("weight", "bias")]
        return (x * norm[0] + norm[1]) @ self.weights["head"].wide

    def _run(self, name: str, inputs: Sequence[Value]) -> list[Value]:
        """A plugin's kernel, its outputs full of NaN before."""
        shapes = [(TYPES[value.dtype], value.array.shape) for value in inputs]
        if (name, str(shapes)) not in self._built:
            built = trtp_double.build(self._trtp, f"rwkv::{name}", shapes)
            self._built[name, str(shapes)] = built, self._driver.function(built.ptx, built.name)
        built, function = self._built[name, str(shapes)]
        numbers, driver = built.numbers(), self._driver
        assert numbers["scalars"] == ()
        assert numbers["shared"][0] <= OWN_SHARED
        assert numbers["block"][1:] == (1, 1)
        names = {trtp_double.DataType[kind]: dtype for dtype, kind in TYPES.items()}
        outputs = []
        for index, (kind, _) in enumerate(built.outputs):
            full = np.full(numbers[str(index)], np.nan, np.float32)
            outputs.append(Value(stored_from_float32(full, names[kind]), names[kind]))
        places = {id(value): driver.allocate(value.array.nbytes) for value in (*inputs, *outputs)}
        for value in (*inputs, *outputs):
            driver.upload(np.ascontiguousarray(value.array), places[id(value)])
        pointers = [places[id(value)] for value in (*inputs, *outputs)]
        driver.launch(function, numbers["grid"], numbers["block"][0], numbers["shared"][0], pointers, early=False)
        for value in outputs:
            driver.download(places[id(value)], value.array)
        driver.free(*places.values())
        return outputs


class Bodies:
    """The functions of a graph, each run by itself: by ONNX Runtime, or in bfloat16 by the reference of onnx."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._functions = {function.name: function for function in model.functions}
        self._sessions: dict[str, Any] = {}

    def run(self, ran: Ran) -> list[np.ndarray]:
        """The outputs of the body for the inputs of a node, in float32."""
        function = self._functions[ran.node.op_type]
        values = dict(zip(function.input, ran.inputs, strict=True))
        exact = any(value.dtype == "bfloat16" for value in ran.inputs)
        if function.name not in self._sessions:
            model = self._model(function, values, [value.dtype for value in ran.outputs])
            self._sessions[function.name] = ReferenceEvaluator(model) if exact else _session(model)
        feeds = {name: _as_bfloat16(value) if exact else value.array for name, value in values.items()}
        return [np.asarray(found, np.float32) for found in self._sessions[function.name].run(None, feeds)]

    def _model(
        self, function: onnx.FunctionProto, values: Mapping[str, Value], outputs: Sequence[str]
    ) -> onnx.ModelProto:
        inputs = [
            helper.make_tensor_value_info(name, ONNX[value.dtype], value.array.shape) for name, value in values.items()
        ]
        names = [f"out_{i}" for i in range(len(outputs))]
        infos = [
            helper.make_tensor_value_info(name, ONNX[dtype], None) for name, dtype in zip(names, outputs, strict=True)
        ]
        node = helper.make_node(function.name, list(function.input), names, domain=function.domain)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(function.domain, 1)]
        graph = helper.make_graph([node], "alone", inputs, infos)
        return helper.make_model(graph, ir_version=10, opset_imports=opsets, functions=[function])


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def _as_bfloat16(value: Value) -> np.ndarray:
    """With the dtype that the reference knows."""
    kind = helper.tensor_dtype_to_np_dtype(ONNX["bfloat16"])
    return value.array.view(kind) if value.dtype == "bfloat16" else value.array
