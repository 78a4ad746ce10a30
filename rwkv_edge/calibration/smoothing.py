"""Activation smoothing: outliers of channels move from activations into weights, exactly.

Source: G. Xiao et al., "SmoothQuant", https://arxiv.org/abs/2211.10438. Factors are powers of two, so that not a bit of
the float model changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rwkv_edge.calibration.record import Calibration
from rwkv_edge.calibration.source import FloatWeights
from rwkv_edge.models.architecture import Smoothing
from rwkv_edge.spec import ModelSpec

MOST = 16  # largest exponent: a channel that was nearly silent in the calibration may speak later


def smooth(
    weights: FloatWeights,
    formats: Mapping[str, str],
    places: tuple[Smoothing, ...],
    calibration: Calibration,
    spec: ModelSpec,
    strength: float,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Set the factors of ``weights``.

    Args:
        weights: get factors of rows and columns.
        formats: by linear; only inputs of w8a8 linears matter.
        places: what the version allows.
        calibration: peaks of channels.
        spec: dimensions.
        strength: α of the paper, from 0 (nothing is moved) to 1 (all channels of activations get the same peak).

    Returns:
        Factors [K] by which the inputs of linears became smaller, and those [D] of token-shift states, by name.
    """
    inputs: dict[str, np.ndarray] = {}
    states: dict[str, np.ndarray] = {}
    for i in range(spec.n_layer):
        for place in places:
            if i > 0 and "{i}" not in place.divided[0]:
                continue  # once for the model
            divided, multiplied = (
                [name for name in (text.format(i=i) for text in texts) if name in weights.places]
                for texts in (place.divided, place.multiplied)
            )
            factor = _factor(weights, divided, multiplied, formats, calibration, place.power, strength)
            if factor is None:
                continue
            for name in divided:
                weights.columns[name] = (1 / factor).astype(np.float32)
            for name in multiplied:
                weights.rows[name] = factor**place.power
                inputs[name] = factor**place.power
            if place.state:
                states[place.state.format(i=i)] = factor
    return inputs, states


def _factor(
    weights: FloatWeights,
    divided: list[str],
    multiplied: list[str],
    formats: Mapping[str, str],
    calibration: Calibration,
    power: int,
    strength: float,
) -> np.ndarray | None:
    """Powers of two [K]; None where nothing would be gained."""
    static = [name for name in multiplied if formats.get(name) == "w8a8"]
    if not static or not divided:
        return None
    peaks = [calibration.statistic("peak", calibration.input_of(name)) for name in static]
    activation = np.max(peaks, axis=0).astype(np.float64)
    weight = np.max([np.abs(weights.load(name)).max(1) for name in static], axis=0).astype(np.float64)
    heard = (activation > 0) & (weight > 0)
    wanted = np.zeros(len(activation))
    wanted[heard] = strength * np.log2(activation[heard]) - (1 - strength) * np.log2(weight[heard])
    wanted[heard] -= np.median(wanted[heard]) if heard.any() else 0
    exponents = np.clip(np.rint(wanted / power), -MOST, MOST)
    return np.exp2(exponents).astype(np.float32) if exponents.any() else None
