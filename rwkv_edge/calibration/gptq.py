"""GPTQ: rounding one input after the other, each error made good by the weights of the inputs that follow.

Source: E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
https://arxiv.org/abs/2210.17323, algorithm 1, without the reordering of inputs: groups are blocks of neighbours.
"""

from __future__ import annotations

import numpy as np

from rwkv_edge.calibration.rounding import Rounded, best_scales, integers

DAMPING = 0.01  # of the mean diagonal, as in the paper
PANEL = 128  # inputs whose errors are passed on together


def gptq(weight: np.ndarray, hessian: np.ndarray, bits: int, block: int | None, dtype: str = "float32") -> Rounded:
    """Round a weight so that X·W changes least.

    Args:
        weight: [in, out] float32.
        hessian: mean of x xᵀ over the inputs x, [in, in].
        bits: 8 or 4.
        block: inputs that share a scale; None for all.
        dtype: in which scales are stored.

    Returns:
        Integers and scales; where the Hessian says nothing of an input, it is rounded to nearest.
    """
    rows, columns = weight.shape
    size = block or rows
    left = weight.astype(np.float32).copy()
    factor = inverse_factor(hessian)
    importance = np.maximum(np.diagonal(hessian), 1e-3 * float(np.diagonal(hessian).mean())).astype(np.float32)
    values = np.empty((rows, columns), np.int8)
    scales = np.empty((rows // size, columns), np.float32)
    for start in range(0, rows, PANEL):
        stop = min(start + PANEL, rows)
        errors = np.empty((stop - start, columns), np.float32)
        for i in range(start, stop):
            if i % size == 0:
                group = left[None, i : i + size]
                scales[i // size] = best_scales(group, bits, importance[None, i : i + size, None], dtype)[0]
            scale = scales[i // size]
            values[i] = integers(left[i], scale, bits)
            error = (left[i] - values[i] * scale) / factor[i, i]
            errors[i - start] = error
            if i + 1 < stop:
                left[i + 1 : stop] -= np.outer(factor[i, i + 1 : stop], error)
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return Rounded(values, scales)


def inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """The upper triangular Cholesky factor of the damped Hessian's inverse, [in, in] float32."""
    damped = hessian.astype(np.float64)
    diagonal = np.diagonal(damped).copy()
    dead = diagonal <= 0
    step = DAMPING * float(diagonal.mean()) or 1.0
    damped[np.diag_indices_from(damped)] = np.where(dead, 1.0, diagonal) + step
    lower = np.linalg.cholesky(damped)
    inverse = np.linalg.inv(lower)
    upper = np.linalg.cholesky(inverse.T @ inverse).T
    found: np.ndarray = upper.astype(np.float32)
    return found
