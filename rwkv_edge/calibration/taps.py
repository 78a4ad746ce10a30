"""A float graph that also gives the inputs of its linears, of every token of a chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from rwkv_edge.calibration.schemes import is_part_of
from rwkv_edge.errors import CalibrationError

LOGITS = "rwkv_edge.all_logits"
"""The output of `all_logits_graph`: [R, V], every token's."""


@dataclass(frozen=True)
class Tapped:
    """A graph in memory, beside whose file its weights lie.

    Attributes:
        model: serialised.
        taps: name of the first linear → name of the output with its input, [..., R, K].
        linears: name of the first linear → all linears with the same input.
    """

    model: bytes
    taps: Mapping[str, str]
    linears: Mapping[str, tuple[str, ...]]


def import_graph(path: Path) -> gs.Graph:
    """A graph without the values of its weights.

    Raises:
        CalibrationError: it is no ONNX file.
    """
    try:
        return gs.import_onnx(onnx.load(str(path), load_external_data=False))
    except Exception as error:  # protobuf's DecodeError, and what surgeon makes of a damaged graph
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CalibrationError(f"{path} cannot be parsed ({reason}); export the checkpoint again") from error


def linear_nodes(graph: gs.Graph) -> dict[str, gs.Node]:
    """The products of a value and a stored matrix [in, out], by the matrix's name, in the graph's order."""
    found: dict[str, gs.Node] = {}
    for node in graph.nodes:
        weight = weight_of(node)
        if weight is not None:
            found[weight.name] = node
    return found


def weight_of(node: gs.Node) -> gs.Constant | None:
    """The stored matrix of a linear; None of other nodes."""
    weight = node.inputs[1] if node.op == "MatMul" else None
    if not isinstance(weight, gs.Constant) or len(weight.shape) != 2 or not is_external(weight):
        return None
    return weight


def is_external(value: Any) -> bool:
    """Whether a constant lies in the weight file, as all parameters of the model do."""
    tensor = getattr(getattr(value, "_values", None), "tensor", None)
    return tensor is not None and len(tensor.external_data) > 0


def tapped_graph(path: Path, skipped: Sequence[str], tokens: int) -> Tapped:
    """The graph of a file with the inputs of its linears as further outputs.

    In a chunk the head sees the last token only; here its norm runs over all of them once more.

    Args:
        path: a step or prefill graph.
        skipped: parts of names of linears that are of no interest.
        tokens: of a chunk; 1 for a step.
    """
    graph = import_graph(path)
    linears: dict[str, list[str]] = {}
    taps: dict[str, str] = {}
    sources: dict[str, str] = {}
    for name, node in linear_nodes(graph).items():
        if is_part_of(name, skipped):
            continue
        value = node.inputs[0] if tokens == 1 else _of_all_tokens(graph, node)
        first = sources.setdefault(value.name, name)
        linears.setdefault(first, []).append(name)
        if first == name:
            taps[name] = value.name
            if value not in graph.outputs:
                graph.outputs.append(value)
    model = gs.export_onnx(graph, do_type_check=False)
    return Tapped(model.SerializeToString(), taps, {name: tuple(names) for name, names in linears.items()})


def all_logits_graph(path: Path, tokens: int) -> bytes:
    """The graph of a chunk, or a step, with the logits of every token as the output `LOGITS`, serialised."""
    graph = import_graph(path)
    head = list(linear_nodes(graph).values())[-1]
    value = head.inputs[0] if tokens == 1 else _of_all_tokens(graph, head)
    logits = gs.Variable(LOGITS)
    graph.nodes.append(gs.Node("MatMul", f"{LOGITS}.MatMul", inputs=[value, head.inputs[1]], outputs=[logits]))
    graph.outputs.append(logits)
    return bytes(gs.export_onnx(graph, do_type_check=False).SerializeToString())


def _of_all_tokens(graph: gs.Graph, node: gs.Node) -> gs.Variable:
    """The input of a linear; where only the last rows of a chunk reach it, the same norm of all rows."""
    norm = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if norm is None or norm.op != "LayerNormalization":
        return node.inputs[0]
    rows = norm.inputs[0]
    for op in ("Squeeze", "Slice", "Reshape"):
        producer = rows.inputs[0] if rows.inputs else None
        if producer is None or producer.op != op:
            return node.inputs[0]
        rows = producer.inputs[0]
    whole = gs.Variable(f"{norm.outputs[0].name}.all_tokens", norm.outputs[0].dtype)
    if whole.name not in graph.tensors():
        again = gs.Node(norm.op, f"{norm.name}.all_tokens", norm.attrs, [rows, *norm.inputs[1:]], [whole])
        graph.nodes.append(again)
    return whole
