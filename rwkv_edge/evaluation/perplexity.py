"""How well a model predicts a text: negative log-likelihood, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from rwkv_edge.errors import InputError
from rwkv_edge.runtime.session import Session

SCORED_PART = 1024  # tokens whose logits are held at once
WIDENED = 1 << 21  # logits that are float64 at once: 16 MiB, near the size of a cache


@dataclass(frozen=True)
class Likelihood:
    """Of a text under a model, token by token, from an empty state that is carried to the end.

    Attributes:
        tokens: predictions made, one fewer than tokens fed.
        nbytes: bytes of the text that was predicted.
        nats: sum of −ln p of every token after the first.
    """

    tokens: int
    nbytes: int
    nats: float

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """log2 likelihood per byte of text: comparable between tokenizers."""
        return self.nats / math.log(2) / self.nbytes


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """The logarithm of the softmax over the last axis, [..., V] → [..., V] float64; safe for logits of any size."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide


def token_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """−ln p of each target, in nats: [N, V] and [N] → [N] float64; NaN where a row holds NaN or +∞."""
    losses = np.empty(len(targets), np.float64)
    rows = max(1, WIDENED // logits.shape[-1])
    for at in range(0, len(targets), rows):
        part = slice(at, at + rows)
        found = log_probabilities(logits[part])
        losses[part] = -found[np.arange(len(found)), targets[part]]
    return losses


def likelihood(
    session: Session[Any], tokens: Sequence[int], nbytes: int, progress: Callable[[int], None] | None = None
) -> Likelihood:
    """Feed ``tokens`` one at a time and sum what each was predicted with.

    Args:
        session: of batch 1.
        tokens: at least two; the first is fed without being predicted.
        nbytes: bytes that ``tokens[1:]`` stand for.
        progress: told 1 after every token.

    Raises:
        InputError: fewer than two tokens.
    """
    if len(tokens) < 2:
        raise InputError("a likelihood needs at least two tokens")
    state = session.initial_state()
    nats = 0.0
    for token, following in pairwise(tokens):
        nats += float(token_losses(session.step([token], state), np.array([following]))[0])
        if progress:
            progress(1)
    return Likelihood(len(tokens) - 1, nbytes, nats)


def scored_likelihood(
    session: Session[Any], tokens: Sequence[int], nbytes: int, progress: Callable[[int], None] | None = None
) -> Likelihood:
    """`likelihood` by the session's chunks of all logits: the same sum, several times as fast.

    Args:
        session: of batch 1.
        tokens: at least two; the first is fed without being predicted.
        nbytes: bytes that ``tokens[1:]`` stand for.
        progress: told the tokens after every part.

    Raises:
        InputError: fewer than two tokens.
    """
    if len(tokens) < 2:
        raise InputError("a likelihood needs at least two tokens")
    state = session.initial_state()
    nats = 0.0
    for start in range(0, len(tokens) - 1, SCORED_PART):
        fed = np.asarray(tokens[start : min(start + SCORED_PART, len(tokens) - 1)])
        following = np.asarray(tokens[start + 1 : start + 1 + len(fed)])
        nats += float(token_losses(session.score(fed[None], state)[0], following).sum())
        if progress:
            progress(len(fed))
    return Likelihood(len(tokens) - 1, nbytes, nats)
