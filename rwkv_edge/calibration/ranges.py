"""From a histogram to the largest magnitude that 8 bits shall represent."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rwkv_edge.calibration.histogram import BINS, Histogram

LEVELS = 127
"""Largest magnitude of a symmetric 8-bit integer; −128 is not used."""

CANDIDATES = 128  # thresholds that `mse` and `entropy` compare: 1 % of the range apart and less

PERCENTILES = (50.0, 90.0, 99.0, 99.9, 99.99, 99.999)
"""What a calibration records of every tensor."""


def minmax(histogram: Histogram, percent: float) -> float:
    """The largest magnitude that was seen: nothing is clipped."""
    return histogram.peak


def percentile(histogram: Histogram, percent: float) -> float:
    """What ``percent`` of all magnitudes do not exceed."""
    return histogram.percentile(percent)


def mse(histogram: Histogram, percent: float) -> float:
    """The threshold with the least expected square error of rounding and clipping together."""
    return _best(histogram, _square_error)


def entropy(histogram: Histogram, percent: float) -> float:
    """The threshold with the least KL divergence between the values and their quantized form.

    Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017.
    """
    return _best(histogram, _divergence)


METHODS: dict[str, Callable[[Histogram, float], float]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
"""Name → function of a histogram and a percentage (which only `percentile` uses)."""


def _best(histogram: Histogram, cost: Callable[[Histogram, int], float]) -> float:
    """The end of the bin, among `CANDIDATES`, with the least ``cost``; the largest of equals."""
    last = int(np.flatnonzero(histogram.counts)[-1]) + 1 if histogram.total else 0
    if last <= LEVELS + 1:
        return histogram.peak
    ends = np.unique(np.linspace(LEVELS + 1, last, CANDIDATES).astype(int))[::-1]
    costs = [cost(histogram, int(end)) for end in ends]
    end = int(ends[int(np.argmin(costs))])
    return min(end * histogram.width, histogram.peak)


def _square_error(histogram: Histogram, end: int) -> float:
    """Sum of square errors where the threshold is the end of bin ``end``; values count as the middle of their bin."""
    middles = (np.arange(BINS) + 0.5) * histogram.width
    step = end * histogram.width / LEVELS
    rounded = np.minimum(np.rint(middles / step), LEVELS) * step
    return float(((middles - rounded) ** 2 * histogram.counts).sum())


def _divergence(histogram: Histogram, end: int) -> float:
    """KL divergence where bins from ``end`` on are clipped into the last one and `LEVELS` + 1 levels stay.

    The first bin counts as the second: zeros are exact at any scale, and behind relu² they would outvote the rest.
    """
    kept = histogram.counts[:end].astype(np.float64)
    kept[0] = kept[1]
    clipped = kept.copy()
    clipped[-1] += histogram.counts[end:].sum()
    level = np.arange(end) * (LEVELS + 1) // end
    sums = np.bincount(level, kept, LEVELS + 1)
    filled = np.bincount(level, kept > 0, LEVELS + 1)
    spread = np.where(kept > 0, (sums / np.maximum(filled, 1))[level], 0.0)
    p, q = clipped / clipped.sum(), spread / max(spread.sum(), 1.0)
    where = p > 0
    return float((p[where] * np.log(p[where] / np.maximum(q[where], 1e-9))).sum())
