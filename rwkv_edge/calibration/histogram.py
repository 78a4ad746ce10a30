"""Histograms of magnitudes in fixed memory, whatever comes and however much of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

BINS = 2048
"""Of which the upper half is always in use: 16 to 32 a step of 8 bits, fine enough to choose a threshold."""


@dataclass(eq=False)
class Histogram:
    """Counts of |x| in `BINS` equal bins over [0, ``top``); ``top`` is a power of two that doubles by merging bins.

    Quantization is symmetric, so signs do not matter. The same values in the same order give the same counts.

    Attributes:
        counts: [BINS] int64.
        top: upper end of the last bin; 0 as long as only zeros came.
        peak: largest |x|.
    """

    counts: np.ndarray
    top: float = 0.0
    peak: float = 0.0

    @classmethod
    def empty(cls) -> Histogram:
        """Without a value."""
        return cls(np.zeros(BINS, np.int64))

    def add(self, magnitudes: np.ndarray) -> None:
        """Count values, all finite and at least 0, of any shape, in float32."""
        peak = float(magnitudes.max(initial=0.0))
        self.peak = max(self.peak, peak)
        self._reach(peak)
        if self.top == 0:
            self.counts[0] += magnitudes.size
            return
        bins = (magnitudes * np.float32(BINS / self.top)).astype(np.int32)
        self.counts += np.bincount(bins.ravel(), minlength=BINS)

    def _reach(self, peak: float) -> None:
        """Make room for ``peak``."""
        if peak == 0 or peak < self.top:
            return
        wanted = 2.0 ** (math.floor(math.log2(peak)) + 1)
        if self.top == 0:
            self.top = wanted  # what was counted was 0, and stays in the first bin
        while self.top < wanted:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.concatenate([merged, np.zeros(BINS // 2, np.int64)])
            self.top *= 2

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """Of a bin."""
        return self.top / BINS

    def percentile(self, percent: float) -> float:
        """The upper end of the bin in which ``percent`` of all values are reached, at most the peak."""
        wanted = math.ceil(self.total * percent / 100)
        index = int(np.searchsorted(np.cumsum(self.counts), max(wanted, 1)))
        return min((index + 1) * self.width, self.peak)
