"""Q/DQ insertion: an exported graph with quantized weights in the place of float ones, by onnx-graphsurgeon.

The graph is never loaded with its weights: constants refer to the new weights.bin. Local functions pass unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from rwkv_edge.artifact import WEIGHTS
from rwkv_edge.calibration.pieces import BITS, QuantizedWeight
from rwkv_edge.calibration.source import Place
from rwkv_edge.calibration.taps import import_graph, is_external, linear_nodes
from rwkv_edge.errors import CalibrationError

QUANTIZATION_KEY = "rwkv_edge.quantization"
CPU_ACCURACY = 4  # MatMulNBits: int8 arithmetic; the others are up to 100 times slower
MICROSOFT = "com.microsoft"

DATA_TYPE = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "int8": onnx.TensorProto.INT8,
    "uint8": onnx.TensorProto.UINT8,
    "int4": onnx.TensorProto.INT4,
}


class Surgeon:
    """Rewrites the graphs of one artifact.

    Args:
        quantized: by parameter.
        places: of the tensors of the new weights.bin.
        scheme: what the graph's metadata says.
    """

    def __init__(
        self, quantized: Mapping[str, QuantizedWeight], places: Mapping[str, Place], scheme: Mapping[str, Any]
    ) -> None:
        self._quantized, self._places, self._scheme = quantized, places, scheme

    def rewrite(self, source: Path, target: Path) -> int:
        """Write the quantized form of a graph; returns its number of nodes.

        Raises:
            CalibrationError: the graph lacks a linear that should be quantized.
            OSError: it cannot be written.
        """
        graph = import_graph(source)
        properties = {p.key: p.value for p in onnx.load(str(source), load_external_data=False).metadata_props}
        nodes = linear_nodes(graph)
        missing = sorted(n for n, q in self._quantized.items() if q.form != "rows" and n not in nodes)
        if missing:
            raise CalibrationError(f"{source.name} has no product with '{missing[0]}'; export the checkpoint again")
        _unfusable(nodes)
        inputs: dict[tuple[str, str], Any] = {}
        for name, node in nodes.items():
            if name in self._quantized:
                self._linear(graph, node, self._quantized[name], inputs)
        for name, quantized in self._quantized.items():
            if quantized.form == "rows":
                self._embedding(graph, name, quantized)
        self._move_weights(graph)
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
        model = gs.export_onnx(graph, do_type_check=False)
        properties[QUANTIZATION_KEY] = json.dumps(self._scheme)
        onnx.helper.set_model_props(model, properties)
        target.write_bytes(model.SerializeToString())
        return len(model.graph.node)

    def _linear(
        self, graph: gs.Graph, node: gs.Node, quantized: QuantizedWeight, inputs: dict[tuple[str, str], Any]
    ) -> None:
        if quantized.target == "cpu":
            self._cpu_linear(graph, node, quantized)
            return
        name, dtype = quantized.name, np.dtype(quantized.scale_dtype)
        if quantized.form == "w8a8":
            node.inputs[0] = self._input(graph, node.inputs[0], quantized, inputs)
        attributes = {"axis": 0, "block_size": quantized.block} if quantized.block else {"axis": 1}
        weight = gs.Variable(f"{name}.dequantized", dtype, list(quantized.shape))
        parts = [self._constant(f"{name}.q"), self._constant(f"{name}.scale")]
        graph.nodes.append(gs.Node("DequantizeLinear", f"{name}.DequantizeLinear", attributes, parts, [weight]))
        node.inputs[1] = weight

    def _input(
        self, graph: gs.Graph, value: Any, quantized: QuantizedWeight, inputs: dict[tuple[str, str], Any]
    ) -> Any:
        """``value`` through int8 and back, with its static scale."""
        name, dtype = quantized.name, np.dtype(quantized.scale_dtype)
        scale, zero = self._constant(f"{name}.input_scale"), gs.Constant(f"{name}.zero", np.zeros((), np.int8))
        integers = gs.Variable(f"{name}.input_q", np.int8, value.shape)
        back = gs.Variable(f"{name}.input_dequantized", dtype, value.shape)
        graph.nodes += [
            gs.Node("QuantizeLinear", f"{name}.input.QuantizeLinear", {}, [value, scale, zero], [integers]),
            gs.Node("DequantizeLinear", f"{name}.input.DequantizeLinear", {}, [integers, scale, zero], [back]),
        ]
        return back

    def _cpu_linear(self, graph: gs.Graph, node: gs.Node, quantized: QuantizedWeight) -> None:
        rows, columns = quantized.shape
        attributes = {
            "K": rows, "N": columns, "bits": BITS[quantized.form], "block_size": quantized.cpu_block,
            "accuracy_level": CPU_ACCURACY,
        }  # fmt: skip
        name = quantized.name
        parts = [node.inputs[0], self._constant(f"{name}.q"), self._constant(f"{name}.scale")]
        outputs = list(node.outputs)
        node.outputs.clear()
        node.inputs.clear()
        graph.nodes.remove(node)
        graph.nodes.append(gs.Node("MatMulNBits", f"{name}.MatMulNBits", attributes, parts, outputs, domain=MICROSOFT))

    def _embedding(self, graph: gs.Graph, name: str, quantized: QuantizedWeight) -> None:
        """Rows of integers, gathered and multiplied with the scale of each."""
        node = next(n for n in graph.nodes if n.op == "Gather" and n.inputs[0].name == name)
        dtype, tokens, width = np.dtype(quantized.scale_dtype), node.inputs[1], quantized.shape[1]
        rows = tokens.shape[0] if tokens.shape else None
        integers = gs.Variable(f"{name}.row_q", np.int8, [rows, width])
        wide = gs.Variable(f"{name}.row", dtype, [rows, width])
        scale = gs.Variable(f"{name}.row_scale", dtype, [rows, 1])
        outputs = list(node.outputs)
        node.outputs.clear()
        graph.nodes.remove(node)
        graph.nodes += [
            gs.Node("Gather", f"{name}.q.Gather", {"axis": 0}, [self._constant(f"{name}.q"), tokens], [integers]),
            gs.Node("Gather", f"{name}.scale.Gather", {"axis": 0}, [self._constant(f"{name}.scale"), tokens], [scale]),
            gs.Node("Cast", f"{name}.Cast", {"to": DATA_TYPE[quantized.scale_dtype]}, [integers], [wide]),
            gs.Node("Mul", f"{name}.Mul", {}, [wide, scale], outputs),
        ]

    def _constant(self, name: str) -> gs.Constant:
        """A constant that refers to its place."""
        place = self._places[name]
        tensor = onnx.TensorProto(name=name, data_type=DATA_TYPE[place.dtype], dims=place.shape)
        _refer(tensor, place)
        return gs.Constant(name, LazyValues(tensor))

    def _move_weights(self, graph: gs.Graph) -> None:
        """Let the weights that stay in float refer to their new places."""
        for value in graph.tensors().values():
            if isinstance(value, gs.Constant) and is_external(value) and value.name in self._places:
                _refer(value._values.tensor, self._places[value.name])


def _unfusable(nodes: Mapping[str, gs.Node]) -> None:
    """Biases behind products are added by Sum.

    ONNX Runtime would make a Gemm of an Add, with two Reshapes around it: measured, 3 % of an int4 step.
    """
    for node in nodes.values():
        for consumer in node.outputs[0].outputs:
            if consumer.op == "Add" and any(isinstance(value, gs.Constant) for value in consumer.inputs):
                consumer.op = "Sum"


def _refer(tensor: onnx.TensorProto, place: Place) -> None:
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", WEIGHTS), ("offset", str(place.offset)), ("length", str(place.nbytes))):
        tensor.external_data.add(key=key, value=value)
