"""Weights as integers and scales: symmetric, with the scales of least error.

Everything is float32 [in, out] in, integers [in, out] and scales [groups, out] out; a group is a block of inputs,
or all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rwkv_edge.spec import float32_from_stored, stored_from_float32

LIMITS = {8: (-127, 127), 4: (-8, 7)}
"""Bits → smallest and largest integer. −128 is left out: TensorRT's kernels and ONNX Runtime's agree without it."""

RATIOS = {8: (1.0, 0.99, 0.98, 0.96, 0.94), 4: tuple(1.0 - 0.03 * i for i in range(16))}
"""Bits → parts of the largest magnitude that are tried as the end of the range."""

COLUMNS = 1 << 22  # elements searched at a time


@dataclass(frozen=True, eq=False)
class Rounded:
    """Integers [in, out] int8, and scales [groups, out] float32 whose values the stored dtype holds exactly."""

    values: np.ndarray
    scales: np.ndarray

    def restored(self) -> np.ndarray:
        """Integers times scales, [in, out] float32."""
        groups, width = self.scales.shape
        parts = self.values.reshape(groups, -1, width).astype(np.float32) * self.scales[:, None]
        found: np.ndarray = parts.reshape(self.values.shape)
        return found


def rounded(
    weight: np.ndarray, bits: int, block: int | None, importance: np.ndarray | None, dtype: str = "float32"
) -> Rounded:
    """Round to nearest, with the scales that give the least error Σ importance·(w − q·scale)².

    Args:
        weight: [in, out] float32.
        bits: 8 or 4.
        block: inputs of a group; None for all.
        importance: mean square of every input, [in]; None for equal ones.
        dtype: in which scales are stored.
    """
    rows, columns = weight.shape
    weights = np.ones(rows, np.float32) if importance is None else _positive(importance)
    values = np.empty((rows, columns), np.int8)
    scales = np.empty((rows // (block or rows), columns), np.float32)
    step = max(1, COLUMNS // rows)
    for start in range(0, columns, step):
        part = np.ascontiguousarray(weight[:, start : start + step], np.float32)
        part = part.reshape(len(scales), -1, part.shape[1])
        found = best_scales(part, bits, weights.reshape(len(scales), -1, 1), dtype)
        scales[:, start : start + step] = found
        values[:, start : start + step] = integers(part, found[:, None], bits).reshape(rows, -1)
    return Rounded(values, scales)


def integers(weight: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """The nearest integers, int8."""
    low, high = LIMITS[bits]
    found: np.ndarray = np.clip(np.rint(weight / scale), low, high).astype(np.int8)
    return found


def best_scales(weight: np.ndarray, bits: int, importance: np.ndarray, dtype: str) -> np.ndarray:
    """Scales [groups, out] of weights [groups, block, out]: of `RATIOS` the best, then least squares."""
    peak = np.abs(weight).max(1) / LIMITS[bits][1]
    peak[peak == 0] = 1.0  # of a column of zeros: any
    best, least = stored_scale(peak, dtype), np.full(peak.shape, np.inf, np.float32)
    for ratio in RATIOS[bits]:
        scale = stored_scale(peak * np.float32(ratio), dtype)
        best, least = _better(weight, importance, bits, scale, best, least)
    low, high = LIMITS[bits]
    q = np.clip(np.rint(weight / best[:, None]), low, high)
    below = (importance * q * q).sum(1)
    fitted = (importance * weight * q).sum(1) / np.where(below == 0, 1, below)
    scale = stored_scale(np.where((below == 0) | (fitted <= 0), best, fitted), dtype)
    return _better(weight, importance, bits, scale, best, least)[0]


def _better(
    weight: np.ndarray, importance: np.ndarray, bits: int, scale: np.ndarray, best: np.ndarray, least: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    low, high = LIMITS[bits]
    error = np.rint(weight / scale[:, None])
    np.clip(error, low, high, out=error)
    error *= scale[:, None]
    error -= weight
    error *= error
    error *= importance
    total = error.sum(1)
    improved = total < least
    return np.where(improved, scale, best), np.where(improved, total, least)


def stored_scale(scale: np.ndarray, dtype: str) -> np.ndarray:
    """Scales as ``dtype`` stores them, at least its smallest normal number."""
    least = np.float32(2.0**-14 if dtype == "float16" else 2.0**-126)
    return float32_from_stored(stored_from_float32(np.maximum(scale, least), dtype), dtype)


def _positive(importance: np.ndarray) -> np.ndarray:
    """Inputs that never came still count a little."""
    mean = float(importance.mean())
    found: np.ndarray = importance.astype(np.float32) / (mean or 1.0) + np.float32(1e-3)
    return found
