"""The largest logits found on the device: layers that a step's engine gets beside its graph.

`rwkv_edge.runtime.candidates` draws from them. The logits stay an output, for what the candidates cannot decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rwkv_edge.engines import CANDIDATE_LOGITS, CANDIDATE_NORM, CANDIDATE_TOKENS
from rwkv_edge.errors import ExportError
from rwkv_edge.exporters.trt_types import Layer, NetworkDefinition, Tensor

TOKENS_AXIS = 1 << 1  # of logits [B, V], as a bit mask


def add_candidates(trt: Any, network: NetworkDefinition, count: int) -> None:
    """Give a step's network three outputs more.

    They are the ``count`` largest logits [B, K] float32 (`CANDIDATE_LOGITS`), their tokens [B, K] int32
    (`CANDIDATE_TOKENS`), and the log of Σ exp(logits) over the vocabulary [B, 1] float32 (`CANDIDATE_NORM`).

    Args:
        trt: TensorRT's module.
        network: has an output ``logits`` [B, V] float32.
        count: K, at most V.

    Raises:
        ExportError: TensorRT does not take the layers.
    """
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    logits = next(tensor for tensor in outputs if tensor.name == "logits")
    largest = _made(network.add_topk(logits, trt.TopKOperation.MAX, count, TOKENS_AXIS))
    norm = _log_sum_exp(trt, network, logits)
    named = (largest[0], CANDIDATE_LOGITS), (largest[1], CANDIDATE_TOKENS), (norm, CANDIDATE_NORM)
    for tensor, name in named:
        tensor.name = name
        network.mark_output(tensor)


def _log_sum_exp(trt: Any, network: NetworkDefinition, logits: Tensor) -> Tensor:
    """max + log Σ exp(logits − max), [B, 1]."""
    reduced, unary, pairs = trt.ReduceOperation, trt.UnaryOperation, trt.ElementWiseOperation
    (peak,) = _made(network.add_reduce(logits, reduced.MAX, TOKENS_AXIS, True))
    (below,) = _made(network.add_elementwise(logits, peak, pairs.SUB))
    (weights,) = _made(network.add_unary(below, unary.EXP))
    (total,) = _made(network.add_reduce(weights, reduced.SUM, TOKENS_AXIS, True))
    (log,) = _made(network.add_unary(total, unary.LOG))
    (norm,) = _made(network.add_elementwise(log, peak, pairs.SUM))
    return norm


def _made(layer: Layer | None) -> Sequence[Tensor]:
    """The outputs of a layer that TensorRT has taken."""
    if layer is None:
        raise ExportError(
            "TensorRT does not take the layers that find the largest logits; build with a smaller --sample-k"
        )
    return [layer.get_output(i) for i in range(layer.num_outputs)]
