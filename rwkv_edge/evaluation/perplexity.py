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
        logits = session.step([token], state)[0].astype(np.float64)
        peak = logits.max()
        nats += float(peak + np.log(np.exp(logits - peak).sum()) - logits[following])
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
        logits = session.score(fed[None], state)[0].astype(np.float64)
        peak = logits.max(-1)
        log_sum = peak + np.log(np.exp(logits - peak[:, None]).sum(-1))
        nats += float((log_sum - logits[np.arange(len(fed)), following]).sum())
        if progress:
            progress(len(fed))
    return Likelihood(len(tokens) - 1, nbytes, nats)
