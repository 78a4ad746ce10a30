"""Statistics of the inputs of linears, in fixed memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rwkv_edge.calibration.histogram import Histogram
from rwkv_edge.calibration.ranges import METHODS, PERCENTILES
from rwkv_edge.calibration.record import Range
from rwkv_edge.errors import CalibrationError


@dataclass(eq=False)
class Statistics:
    """Of one value [..., K].

    Attributes:
        peak: largest |x| of every channel, [K] float32.
        square: sum of x² of every channel, [K] float64.
        rows: number of vectors.
        histogram: of |x|, all channels together.
    """

    peak: np.ndarray
    square: np.ndarray
    rows: int = 0
    histogram: Histogram = field(default_factory=Histogram.empty)

    @classmethod
    def empty(cls, width: int) -> Statistics:
        """Of nothing."""
        return cls(np.zeros(width, np.float32), np.zeros(width))

    def add(self, name: str, value: np.ndarray) -> None:
        """Count vectors.

        Raises:
            CalibrationError: one holds NaN or infinity.
        """
        vectors = np.abs(value.reshape(-1, value.shape[-1]).astype(np.float32, copy=False))
        peak = vectors.max(0)
        if not math.isfinite(float(peak.max())):
            raise CalibrationError(
                f"the input of '{name}' holds NaN or infinity, so no range can be given; are the weights damaged?"
            )
        np.maximum(self.peak, peak, out=self.peak)
        self.histogram.add(vectors)
        self.square += np.einsum("rk,rk->k", vectors, vectors, dtype=np.float64)
        self.rows += len(vectors)

    def range(self, linears: tuple[str, ...], percent: float) -> Range:
        """What a calibration says of it."""
        count = self.rows * len(self.peak)
        return Range(
            linears=linears,
            width=len(self.peak),
            count=count,
            rms=math.sqrt(float(self.square.sum()) / max(count, 1)),
            percentiles={f"{p:g}": self.histogram.percentile(p) for p in PERCENTILES},
            thresholds={name: method(self.histogram, percent) for name, method in METHODS.items()},
        )

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """What lies beside the JSON."""
        mean = self.square / max(self.rows, 1)
        return {f"peak/{name}": self.peak, f"square/{name}": mean.astype(np.float32), **self._histogram(name)}

    def _histogram(self, name: str) -> dict[str, np.ndarray]:
        return {
            f"histogram/{name}": self.histogram.counts,
            f"histogram_top/{name}": np.array([self.histogram.top]),
        }

    def saved(self, name: str) -> dict[str, np.ndarray]:
        """Everything, to the last bit, for `restored`."""
        return {
            **self._histogram(name),
            f"peak/{name}": self.peak,
            f"sum/{name}": self.square,
            f"rest/{name}": np.array([self.rows, self.histogram.peak]),
        }

    @classmethod
    def restored(cls, name: str, arrays: Mapping[str, np.ndarray]) -> Statistics:
        """What `saved` gave."""
        rows, peak = arrays[f"rest/{name}"]
        histogram = Histogram(
            arrays[f"histogram/{name}"].copy(), float(arrays[f"histogram_top/{name}"][0]), float(peak)
        )
        return cls(arrays[f"peak/{name}"].copy(), arrays[f"sum/{name}"].copy(), int(rows), histogram)
