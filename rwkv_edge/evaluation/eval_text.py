"""Perplexity and bits per byte of a text, and how far one artifact is from another on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rwkv_edge.evaluation.eval_windows import BLOCK, Batching, Blocks, Window, measured
from rwkv_edge.evaluation.perplexity import WIDENED, log_probabilities, token_losses
from rwkv_edge.runtime.session import Session

_LOSS, _REFERENCE_LOSS, _KL, _AGREES = range(4)  # columns of what is measured


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text.

    Attributes:
        tokens: that were predicted.
        nbytes: that they stand for.
        nats: sum of their −ln p.
        perplexity: exp(nats / tokens).
        perplexity_error: its standard error, from sums over blocks of 64 tokens; None for fewer than two blocks.
        bits_per_byte: nats / ln 2 / nbytes, which compares models of different tokenizers.
    """

    tokens: int
    nbytes: int
    nats: float
    perplexity: float
    perplexity_error: float | None
    bits_per_byte: float


@dataclass(frozen=True)
class Comparison:
    """An artifact against a reference on the same tokens.

    Attributes:
        tokens: compared.
        kl_mean: mean of KL(reference ‖ artifact), nats per token.
        kl_error: its standard error.
        kl_max: the largest of them.
        top1: share of tokens after which both expect the same next token most.
        perplexity_change: perplexity over the reference's, minus 1, in percent.
        perplexity_change_error: its standard error, from the paired differences of the losses, which are far less
            spread than the losses themselves.
        reference: the reference's own score.
    """

    tokens: int
    kl_mean: float
    kl_error: float | None
    kl_max: float
    top1: float
    perplexity_change: float
    perplexity_change_error: float | None
    reference: TextScore


def score_text(
    session: Session[Any],
    tokens: np.ndarray,
    nbytes: int,
    windows: Sequence[Window],
    choice: Batching,
    chunks: Sequence[int],
    progress: Callable[[int], None],
) -> TextScore:
    """Score every token of a text but the first; see `rwkv_edge.evaluation.eval_windows.measured`."""
    blocks = measured([session], tokens, windows, choice, chunks, _losses, progress)
    return _score(blocks, _LOSS, nbytes)


def compare_on_text(
    session: Session[Any],
    reference: Session[Any],
    tokens: np.ndarray,
    nbytes: int,
    windows: Sequence[Window],
    choice: Batching,
    chunks: Sequence[int],
    progress: Callable[[int], None],
) -> tuple[TextScore, Comparison]:
    """Score a text by both and compare the distributions, token by token."""
    blocks = measured([session, reference], tokens, windows, choice, chunks, _differences, progress)
    differences = blocks.sums[:, _LOSS] - blocks.sums[:, _REFERENCE_LOSS]
    ratio = math.exp(float(differences.sum()) / blocks.tokens)
    error = blocks.standard_error(differences)
    comparison = Comparison(
        tokens=blocks.tokens,
        kl_mean=blocks.mean(_KL),
        kl_error=blocks.standard_error(blocks.sums[:, _KL]),
        kl_max=float(blocks.largest[_KL]),
        top1=blocks.mean(_AGREES),
        perplexity_change=100 * (ratio - 1),
        perplexity_change_error=None if error is None else 100 * ratio * error,  # d exp(x) = exp(x) dx
        reference=_score(blocks, _REFERENCE_LOSS, nbytes),
    )
    return _score(blocks, _LOSS, nbytes), comparison


def score_lines(score: TextScore) -> list[str]:
    """For a terminal."""
    error = "" if score.perplexity_error is None else f" ± {score.perplexity_error:.2g}"
    return [
        f"  perplexity     {score.perplexity:.4f}{error} per token",
        f"  bits per byte  {score.bits_per_byte:.4f}",
    ]


def comparison_lines(found: Comparison) -> list[str]:
    """For a terminal."""

    def error(value: float | None) -> str:
        return "" if value is None else f" ± {value:.2g}"

    return [
        f"  perplexity     {found.reference.perplexity:.4f} of the reference; "
        f"change {found.perplexity_change:+.3f}{error(found.perplexity_change_error)} %",
        f"  KL             mean {found.kl_mean:.3g}{error(found.kl_error)}, max {found.kl_max:.3g} nats per token",
        f"  top-1          {100 * found.top1:.2f} % of tokens agree",
        f"  ±              standard errors, by blocks of {BLOCK} tokens",
    ]


def _score(blocks: Blocks, column: int, nbytes: int) -> TextScore:
    perplexity = _exp(blocks.mean(column))
    error = blocks.standard_error(blocks.sums[:, column])
    return TextScore(
        tokens=blocks.tokens,
        nbytes=nbytes,
        nats=blocks.total(column),
        perplexity=perplexity,
        perplexity_error=None if error is None else perplexity * error,
        bits_per_byte=blocks.total(column) / math.log(2) / nbytes,
    )


def _exp(value: float) -> float:
    """exp, whose largest value is a float's: JSON has no infinity."""
    return math.exp(min(value, 700.0))


def _losses(logits: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
    return token_losses(logits[0], targets)[:, None]


def _differences(logits: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
    """[N, 4]: both losses, KL(reference ‖ artifact), and whether the most likely tokens agree."""
    values = np.empty((len(targets), 4), np.float64)
    rows = max(1, WIDENED // logits[0].shape[-1])
    for at in range(0, len(targets), rows):
        part = slice(at, at + rows)
        found, reference = (log_probabilities(side[part]) for side in logits)
        each = np.arange(len(found))
        values[part, _LOSS] = -found[each, targets[part]]
        values[part, _REFERENCE_LOSS] = -reference[each, targets[part]]
        divergence = (np.exp(reference) * (reference - found)).sum(-1)
        values[part, _KL] = np.maximum(divergence, 0.0)  # rounding can take a zero below it
        values[part, _AGREES] = found.argmax(-1) == reference.argmax(-1)
    return values
