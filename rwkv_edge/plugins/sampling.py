"""Kernels that draw the tokens of some streams on the GPU: what is compiled, and in which order arguments go.

What they compute is `rwkv_edge.runtime.sampling.Sampler`. Letters of shapes: B streams of one launch, S streams of the
whole state, V vocabulary, L slices of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from rwkv_edge.errors import InputError
from rwkv_edge.plugins.fused_spec import FusedKernel

THREADS: Final = 256
SLICE: Final = 4 * THREADS
"""Tokens of a block, four for each thread."""

MAX_VOCABULARY: Final = 1 << 17
"""Sums of so many weights fit 63 bits, in units of 2⁻⁴⁶."""

BINS: Final = 2048
"""Of weights by exponent and first four bits of the mantissa; 2033 are used."""

RING: Final = 64
"""Steps whose fractions and tokens are kept: so far may the device be ahead of the host."""

NO_TOKEN: Final = -1
NOT_A_NUMBER: Final = -2
NONE_LEFT: Final = -3
"""In the place of a drawn token: the stream was halted before; its scores hold NaN or +inf, or all are -inf."""

WHOLE: Final = 1 << 63
"""Shares are in units of 2⁻⁶³."""

SETTINGS: Final = np.dtype(
    [("top_p", "<u8"), ("presence", "<f8"), ("frequency", "<f8"), ("decay", "<f8"), ("repetition", "<f4"),
     ("temperature", "<f4"), ("min_p", "<f4"), ("top_k", "<i4")]
)  # fmt: skip
"""How one stream draws: ``Settings`` of sample.cuh."""

CUT: Final = np.dtype(
    [("mass", "<u8"), ("target", "<u8"), ("wanted", "<u4"), ("above", "<u4"), ("bin", "<i4"), ("unused", "<i4")]
)
"""What top-k and top-p found: ``Cut`` of sample_bins.cuh."""

UNTOUCHED: Final = -1.0
SEEN: Final = -2.0
SPARED: Final = -3.0
SPARED_SEEN: Final = -4.0
SPARED_GENERATED: Final = -5.0
"""In the table of counts: never generated; so, but in a prompt; the same of tokens that are not counted, and one of
those that was generated."""


@dataclass(frozen=True)
class Features:
    """What some streams need to have their tokens drawn.

    Attributes:
        greedy: nothing but each stream's largest score.
        cut: some stream has a top-k or top-p.
        penalties: some stream's scores depend on its history.
        bias: some stream has a logit bias.
    """

    greedy: bool
    cut: bool
    penalties: bool
    bias: bool

    @property
    def adjust(self) -> bool:
        """Whether scores are not just the logits."""
        return self.penalties or self.bias


def slices(vocabulary: int) -> int:
    """Blocks that share the vocabulary of a stream."""
    return -(-vocabulary // SLICE)


@dataclass(frozen=True)
class SamplingKernels:
    """The kernels that follow a step, in order.

    Attributes:
        vocabulary: V.
        batch: B.
        streams: S.
        features: what they do.
        tops: largest logits of each stream that the head leaves; 0 where it leaves none.
    """

    vocabulary: int
    batch: int
    streams: int
    features: Features
    tops: int

    def __post_init__(self) -> None:
        if self.vocabulary % 4 or self.vocabulary > MAX_VOCABULARY:
            raise InputError(
                f"tokens are drawn on the GPU from vocabularies of a multiple of 4 up to {MAX_VOCABULARY}; "
                f"found {self.vocabulary}"
            )

    @property
    def own_scores(self) -> bool:
        """Whether `scores` runs: it finds the largest logits where the head does not, or they are not the scores."""
        return self.features.greedy or self.features.adjust or not self.tops

    def all(self) -> tuple[FusedKernel, ...]:
        """What is launched."""
        first = (self.scores(),) if self.own_scores else ()
        if self.features.greedy:
            return first
        return (*first, *((self.cut(),) if self.features.cut else ()), self.draw())

    def scores(self) -> FusedKernel:
        """Bias, penalties, the largest of every slice; greedy: the token."""
        features = self.features
        return self._kernel(
            "sample_scores",
            {"BIAS": features.bias, "PENALTIES": features.penalties, "GREEDY": features.greedy},
            ("logits", "settings", "bias", "counts", "stops"),
            ("scores", "tops", "tops_at", *_ENDS),
        )

    def cut(self) -> FusedKernel:
        """The bin in which top-k and top-p cut."""
        return self._kernel(
            "sample_cut", {}, (self._scored, "tops", "settings", "halted"), ("histogram", "arrived", "cuts")
        )

    def draw(self) -> FusedKernel:
        """The token."""
        return self._kernel(
            "sample_draw",
            {"CUT": self.features.cut},
            (self._scored, "tops", "tops_at", "settings", "fractions", "cuts", "stops"),
            ("masses", "list", "list_count", "faults", *_ENDS),
        )

    @property
    def _scored(self) -> str:
        return "scores" if self.own_scores else "logits"

    def _kernel(
        self, source: str, defines: Mapping[str, int], inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> FusedKernel:
        macros = {
            "KERNEL": f"rwkv_{source}", "ACT": "Float", "VOCABULARY": self.vocabulary, "THREADS": THREADS,
            "SLICE": SLICE, "COUNT": slices(self.vocabulary) if self.own_scores else self.tops,
            "STREAMS": self.streams, "RING": RING, **{name: int(value) for name, value in defines.items()},
        }  # fmt: skip
        return FusedKernel(
            name=f"rwkv_{source}",
            source=f"{source}.cu",
            defines=tuple((name, str(value)) for name, value in macros.items()),
            inputs=inputs,
            outputs=outputs,
            grid=(slices(self.vocabulary), self.batch, 1),
            threads=THREADS,
        )


_ENDS: Final = ("arrived", "tokens", "history", "turns", "accepted", "halted")
"""The last arguments of the kernels that give a token."""
