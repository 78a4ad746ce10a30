"""The loss of a float model on the windows of a calibration, with some of its weights replaced by rounded ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rwkv_edge.artifact import Artifact
from rwkv_edge.calibration.pieces import QuantizedWeight, quantized_weights, rounded_weight
from rwkv_edge.calibration.record import Calibration
from rwkv_edge.calibration.source import FloatWeights
from rwkv_edge.calibration.stream import WindowRunner, float_graph
from rwkv_edge.calibration.taps import LOGITS, all_logits_graph
from rwkv_edge.errors import CalibrationError
from rwkv_edge.spec import stored_from_float32

LONGEST_CHUNK = 64


@dataclass(frozen=True)
class LossChange:
    """How much worse a model became, token by token against the float one.

    Attributes:
        nats: mean of the increase of −ln p.
        error: its standard error.
    """

    nats: float
    error: float

    @property
    def percent(self) -> float:
        """Increase of perplexity."""
        return 100 * math.expm1(self.nats)

    @property
    def error_percent(self) -> float:
        """Of `percent`."""
        return 100 * self.error


class LossMeter:
    """Runs the windows of a calibration; what is measured is relative to the float model on the same tokens.

    Args:
        artifact: the float artifact.
        calibration: of it.
        block: of int4.
        tokens: about how many to feed.
        threads: of ONNX Runtime.
    """

    def __init__(self, artifact: Artifact, calibration: Calibration, block: int, tokens: int, threads: int = 0) -> None:
        self._artifact, self._calibration, self._block, self._threads = artifact, calibration, block, threads
        self._weights = FloatWeights.open(artifact)
        warmup, length = (int(calibration.settings[name]) for name in ("warmup", "length"))
        windows = calibration.statistic("tokens", "")
        if windows.shape[1] != warmup + length:
            raise CalibrationError(f"{calibration.path} and the tokens beside it do not fit; calibrate again")
        batch = artifact.manifest.spec.batch or 1
        count = max(batch, math.ceil(tokens / length / batch) * batch)
        self._windows, self._warmup = windows[:count], warmup
        self._entry = float_graph(artifact, (warmup, length), LONGEST_CHUNK)
        self._model = all_logits_graph(artifact.path / self._entry.file, self._entry.tokens)
        self._float = self._losses({})

    @property
    def nats(self) -> float:
        """Loss of the float model per token."""
        return float(self._float.mean())

    @property
    def tokens(self) -> int:
        """Number of predictions."""
        return len(self._float)

    def change(self, formats: Mapping[str, str]) -> LossChange:
        """Of the model whose linears have these formats; those that are not named stay in float."""
        difference = self._losses(self._replaced(formats)) - self._float
        return LossChange(float(difference.mean()), float(difference.std() / math.sqrt(len(difference))))

    def quantized(self, formats: Mapping[str, str]) -> dict[str, QuantizedWeight]:
        """How the linears would be stored."""
        dtype = self._artifact.manifest.spec.act_dtype
        return quantized_weights(self._weights.places, formats, self._block, "float", dtype, "any")

    def nbytes(self, formats: Mapping[str, str]) -> int:
        """Bytes of the linears that are named."""
        quantized = self.quantized(formats)
        kept = (self._weights.places[name].nbytes for name in formats if name not in quantized)
        return sum(piece.nbytes for q in quantized.values() for piece in q.pieces()) + sum(kept)

    def _replaced(self, formats: Mapping[str, str]) -> dict[str, np.ndarray]:
        found = {}
        for name, quantized in self.quantized(formats).items():
            values = rounded_weight(self._weights, quantized, self._calibration, {}).restored()
            found[name] = stored_from_float32(values, self._weights.places[name].dtype)
        return found

    def _losses(self, replaced: Mapping[str, np.ndarray]) -> np.ndarray:
        """−ln p of every token after the warm-up but the first, in one array."""
        runner = WindowRunner(self._artifact, self._model, self._entry, self._threads, replaced)
        found: list[np.ndarray] = []
        for start in range(0, len(self._windows), runner.batch):
            window = self._windows[start : start + runner.batch]
            found += list(_nats(runner.run(window, [LOGITS]), window, self._warmup))
        losses = np.concatenate(found)
        if not np.isfinite(losses).all():
            raise CalibrationError(f"{self._artifact.path} gives NaN with rounded weights; are its weights damaged?")
        return losses


def _nats(chunks: Iterable[tuple[int, Sequence[np.ndarray]]], window: np.ndarray, warmup: int) -> Iterable[np.ndarray]:
    """−ln p of the tokens that follow those of each chunk, after the warm-up."""
    streams, length = window.shape
    for at, (flat,) in chunks:
        logits = flat.reshape(streams, -1, flat.shape[-1]).astype(np.float64)
        fed = min(logits.shape[1], length - 1 - at)  # the last token of a window predicts nothing
        if at < warmup or fed < 1:
            continue
        logits, following = logits[:, :fed], window[:, at + 1 : at + 1 + fed]
        peak = logits.max(-1)
        total = peak + np.log(np.exp(logits - peak[..., None]).sum(-1))
        yield (total - np.take_along_axis(logits, following[..., None].astype(np.int64), -1)[..., 0]).ravel()
