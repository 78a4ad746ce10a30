"""Drawing from the few largest logits of a step exactly as from all of them, or finding out that this cannot be known.

A device that finds the K largest logits itself sends K values instead of the whole vocabulary's. The other tokens are
not known, but none of them has a logit above the smallest of the K; and the sum of exp(logits) over all tokens comes
along, so that probabilities are known. Where that decides which tokens are kept, drawing among them takes the same
floats in the same order as drawing among all, so the token is the same. Where it does not, all logits are fetched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rwkv_edge.runtime.sampling import SamplerConfig

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

SUM_ERROR = 2e-5  # relative, of Σ exp(logits) in float32 by 256 partial sums of 256: 264 · 2⁻²⁴, and exp itself
NORM_ERROR = 2.0**-22  # of its logarithm: four roundings to float32
EXP_ERROR = 1e-6  # relative, of exp in float32: how far a larger argument may give a smaller result


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a device says of the logits of one stream after a step.

    Attributes:
        tokens: those with the K largest logits, in any order.
        logits: theirs, float32.
        norm: log of the sum of exp(logits) over the vocabulary.
        vocab_size: of the model.
        full: fetches all logits [V] float32. It raises `SessionError` once the stream has gone on.
    """

    tokens: Ids
    logits: Floats
    norm: float
    vocab_size: int
    full: Callable[[], Floats]

    def ascending(self) -> tuple[Ids, Floats]:
        """The tokens in ascending order and a copy of their logits."""
        order = np.argsort(self.tokens)
        return self.tokens[order].astype(np.int64), self.logits[order].astype(np.float32)

    @property
    def is_sound(self) -> bool:
        """Whether the values can be used: no NaN or +inf anywhere in the vocabulary, and tokens outside it."""
        return (
            0 < len(self.tokens) < self.vocab_size and bool(np.isfinite(self.norm)) and not np.isnan(self.logits).any()
        )


CandidateStep = Callable[[np.ndarray, Any], list[Candidates]]
"""Feeds one token [B] to each stream of a state; what the device says of each stream's logits."""


def candidate_step(session: object, config: SamplerConfig) -> CandidateStep | None:
    """How the session steps where its device finds the candidates and these settings can use them; else None.

    Such a session has ``candidates``, their number K (0 where there are none), and ``step_candidates``.
    """
    step: CandidateStep | None = getattr(session, "step_candidates", None)
    return step if step is not None and decides(config, int(getattr(session, "candidates", 0))) else None


def decides(config: SamplerConfig, count: int) -> bool:
    """Whether ``count`` candidates can decide draws by these settings at all.

    Some limit must keep few tokens, and nothing may lift a token that is not among the candidates above them.
    """
    limited = config.temperature == 0 or 0 < config.top_k <= count or (config.top_k == 0 and _has_cutoff(config))
    lifts = config.repetition_penalty < 1 or any(bias > 0 for bias in config.logit_bias.values())
    return count > 0 and limited and not lifts


def _has_cutoff(config: SamplerConfig) -> bool:
    return config.top_p < 1 or config.min_p > 0


@dataclass(frozen=True)
class Outside:
    """What is known of the tokens that are no candidates, in weights: exp(score − the largest score).

    Attributes:
        most: no other token's weight is above it.
        least_total: the sum of all tokens' weights is at least so much,
        most_total: and at most so much.
    """

    most: float
    least_total: float
    most_total: float


def outside_of(raw: Floats, scores: Floats, peak: np.float32, norm: float, lowered: int) -> Outside:
    """What follows from the candidates.

    Args:
        raw: logits of the candidates [K].
        scores: the same after bias and penalties, none of them above its logit.
        peak: the largest score.
        norm: log of the sum of exp(logits) over the vocabulary.
        lowered: tokens outside that bias or penalties lowered, at most.
    """
    most = float(np.exp(np.float64(raw.min()) - peak))
    total = float(np.exp(np.float64(norm) - peak))
    taken = float((np.exp(raw.astype(np.float64) - peak) - np.exp(scores.astype(np.float64) - peak)).sum())
    error = (SUM_ERROR + NORM_ERROR * abs(norm)) * total
    tiny = float(np.finfo(np.float32).tiny)
    return Outside(most * (1 + EXP_ERROR) + tiny, total - taken - lowered * most - error, total - taken + error)


def kept_places(
    weights: Floats, outside: Outside, vocab_size: int, top_k: int, top_p: float, min_p: float
) -> NDArray[np.intp] | None:
    """Places of the candidates that pass top-k, top-p and min-p, ascending; None where that cannot be known.

    The result is that of `rwkv_edge.runtime.sampling.kept_tokens` over the vocabulary.

    Args:
        weights: of the candidates in ascending order of their tokens [K]; the largest is 1.
        outside: the other tokens.
        vocab_size: V, more than K.
        top_k: see `kept_tokens`, as for the others.
        top_p: a share of the sum of all weights.
        min_p: a share of the largest.
    """
    places: NDArray[np.intp] | None = None
    if 0 < top_k < vocab_size:
        if top_k > len(weights):
            return None
        places = np.sort(np.argsort(-weights, kind="stable")[:top_k])  # of equal weights the lower tokens
        if weights[places].min() <= outside.most:
            return None
    cutoff = np.float32(min_p)
    if top_p < 1:
        nucleus = _nucleus(weights if places is None else weights[places], outside, top_p, places is not None)
        if nucleus is None:
            return None
        cutoff = max(cutoff, nucleus)
    if places is not None:
        return places[weights[places] >= cutoff]
    return np.flatnonzero(weights >= cutoff) if cutoff > outside.most else None


def _nucleus(weights: Floats, outside: Outside, top_p: float, all_pass: bool) -> np.float32 | None:
    """The weight with which the sum, largest first, reaches top_p of the total; None where the total is too vague.

    ``all_pass`` says that all pass where their sum does not reach it (top-k has chosen them already).
    """
    ordered = np.sort(weights)[::-1]
    sums = ordered.cumsum(dtype=np.float64)
    least, most = (int(np.searchsorted(sums, top_p * x)) for x in (outside.least_total, outside.most_total))
    last = len(ordered) - 1
    if all_pass:
        least, most = min(least, last), min(most, last)
    return np.float32(ordered[least]) if least == most <= last else None
