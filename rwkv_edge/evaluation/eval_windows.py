"""How a text is cut into windows, and how batches of windows run through a session that gives all their logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rwkv_edge.errors import InputError, VerificationError
from rwkv_edge.runtime.session import Session

BLOCK = 64
"""Tokens whose losses are summed before a standard error is taken: the losses of neighbours correlate."""

LOGITS_BYTES = 1 << 26  # of one session's logits at once; copies come on top
MOST_ROWS = 16  # streams of a batch, where the user leaves the choice; more gain little on a CPU
STEPPED_PART = 32  # tokens of a part without a graph that scores
PADDING_PAYS = 16  # a scoring chunk takes about as long as a sixteenth of its tokens in single steps

Measure = Callable[[Sequence[np.ndarray], np.ndarray], np.ndarray]
"""Logits [N, V] of each session and targets [N] → [N, M] float64."""


@dataclass(frozen=True)
class Window:
    """One run from the initial state: ``tokens[start:stop - 1]`` are fed, ``tokens[first:stop]`` are scored."""

    start: int
    first: int
    stop: int

    @property
    def form(self) -> tuple[int, int]:
        """Fed tokens whose logits are not needed, and all that are fed: windows of one form run in one batch."""
        return self.first - 1 - self.start, self.stop - 1 - self.start


def windows_of_text(count: int, window: int, warm_up: int = 0) -> list[Window]:
    """Windows that score each of ``count`` tokens but the first exactly once.

    Args:
        count: tokens of the text.
        window: tokens that are fed from the initial state at most; 0 for one window, whose state is carried throughout.
        warm_up: how many of them come before the first that is scored, except at the beginning of the text.

    Raises:
        InputError: fewer than two tokens, or a warm-up that leaves nothing to score.
    """
    if count < 2:
        raise InputError("the text has fewer than two tokens, so none can be predicted; give a longer one")
    if window < 0 or warm_up < 0:
        raise InputError(f"a window and its warm-up must be at least 0 tokens, not {min(window, warm_up)}")
    if window == 0:
        if warm_up:
            raise InputError("a warm-up is for windows, but the state is carried through the whole text; leave it out")
        return [Window(0, 1, count)]
    if warm_up >= window:
        raise InputError(f"a warm-up of {warm_up} tokens leaves none of a window of {window} to score; make it shorter")
    found = [Window(0, 1, min(count, window + 1))]
    while found[-1].stop < count:
        first = found[-1].stop
        start = max(0, first - 1 - warm_up)
        found.append(Window(start, first, min(count, start + window + 1)))
    return found


def batches_of_windows(windows: Sequence[Window], rows: int) -> Iterator[list[Window]]:
    """Windows of one form, at most ``rows`` together, in the order of the text."""
    for _, group in itertools.groupby(windows, key=lambda w: w.form):
        alike = list(group)
        for at in range(0, len(alike), rows):
            yield alike[at : at + rows]


@dataclass(frozen=True)
class Batching:
    """``rows`` windows at once, whose logits come in parts of ``part`` tokens."""

    rows: int
    part: int


def batching(vocab_size: int, chunks: Sequence[int], rows: int | None = None) -> Batching:
    """What keeps the logits of a batch near 64 MiB.

    Args:
        vocab_size: V.
        chunks: lengths of the graphs that score, of all sessions.
        rows: as many at once, whatever they take; None for the choice.
    """
    token = 4 * vocab_size
    if chunks:
        part = max(chunks)
        return Batching(rows or min(MOST_ROWS, max(1, LOGITS_BYTES // (token * part))), part)
    rows = rows or min(MOST_ROWS, max(1, LOGITS_BYTES // token))
    return Batching(rows, min(STEPPED_PART, max(1, LOGITS_BYTES // (token * rows))))


class Rows:
    """Any number of streams on a session whose graphs may take another number: in groups, the last one padded."""

    def __init__(self, session: Session[Any], rows: int) -> None:
        self._session, self._rows = session, rows
        self._size = session.spec.batch or min(rows, getattr(session, "max_batch", rows))
        self._states = [session.initial_state(self._size) for _ in range(0, rows, self._size)]

    def prefill(self, tokens: np.ndarray) -> None:
        """Feed [R, T] without looking at the logits."""
        for state, group in self._groups(tokens):
            self._session.prefill(group, state)

    def score(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [R, T, V] float32 after every token."""
        found = [self._session.score(group, state) for state, group in self._groups(tokens)]
        return (found[0] if len(found) == 1 else np.concatenate(found))[: self._rows]

    def _groups(self, tokens: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
        missing = len(self._states) * self._size - self._rows
        padded = np.concatenate([tokens, np.repeat(tokens[-1:], missing, axis=0)]) if missing else tokens
        for i, state in enumerate(self._states):
            yield state, padded[i * self._size : (i + 1) * self._size]


def parts_of_rows(
    sessions: Sequence[Session[Any]], tokens: np.ndarray, first: int, choice: Batching, chunks: Sequence[int]
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Run [R, T] tokens from the initial state; yields the position of a part and each session's logits [R, t, V].

    The ``first`` tokens give no logits. They are fed by the chunks of prompts; what would be left for single steps goes
    with the tokens that are scored, if those are fed in chunks. A last part that is shorter than a scoring chunk is
    padded to it: what follows a token does not change its logits.
    """
    feeds = [Rows(session, len(tokens)) for session in sessions]
    least = max(min(session.chunks, default=1) for session in sessions)
    begin = first - first % least if chunks else first
    if begin:
        for feed in feeds:
            feed.prefill(tokens[:, :begin])
    for at in range(begin, tokens.shape[1], choice.part):
        part = tokens[:, at : at + choice.part]
        length, unscored = part.shape[1], max(0, first - at)
        if chunks and choice.part > length >= choice.part // PADDING_PAYS:
            part = np.pad(part, ((0, 0), (0, choice.part - length)))
        logits = [feed.score(part)[:, unscored:length] for feed in feeds]
        if unscored < length:
            yield at + unscored, logits


@dataclass(frozen=True)
class Blocks:
    """Sums of measured values over blocks of neighbouring tokens, for means and their standard errors.

    Attributes:
        sums: [K, M] float64.
        counts: [K] tokens of each block.
        largest: [M], the largest value of one token.
    """

    sums: np.ndarray
    counts: np.ndarray
    largest: np.ndarray

    @property
    def tokens(self) -> int:
        """All of them."""
        return int(self.counts.sum())

    def total(self, column: int) -> float:
        """Sum of a column over all tokens."""
        return float(self.sums[:, column].sum())

    def mean(self, column: int) -> float:
        """Mean of a column over all tokens."""
        return self.total(column) / self.tokens

    def standard_error(self, values: np.ndarray) -> float | None:
        """Of the mean per token of block sums [K]; None where there are fewer than two blocks.

        The ratio estimator of cluster sampling, with blocks as clusters. Source: Cochran, Sampling Techniques, 3rd
        edition, chapter 6.
        """
        count = len(values)
        if count < 2:
            return None
        residuals = values - values.sum() / self.tokens * self.counts
        return float(np.sqrt(count / (count - 1) * (residuals**2).sum()) / self.tokens)


def measured(
    sessions: Sequence[Session[Any]],
    tokens: np.ndarray,
    windows: Sequence[Window],
    choice: Batching,
    chunks: Sequence[int],
    measure: Measure,
    progress: Callable[[int], None],
) -> Blocks:
    """Run all windows through all sessions and measure every scored token.

    Only the logits of one part of one batch are held at a time.

    Args:
        sessions: of one vocabulary.
        tokens: [N] of the text.
        windows: of the text.
        choice: rows and parts.
        chunks: lengths of the graphs that score.
        measure: what to compute from the logits.
        progress: told of the tokens scored.

    Raises:
        VerificationError: a session gives logits that are not finite.
    """
    sums, counts, largest = [], [], []
    for batch in batches_of_windows(windows, choice.rows):
        unscored, length = batch[0].form
        fed = np.stack([tokens[w.start : w.stop - 1] for w in batch])
        targets = np.stack([tokens[w.start + 1 : w.stop] for w in batch])
        values: list[np.ndarray] = []
        for at, logits in parts_of_rows(sessions, fed, unscored, choice, chunks):
            check_finite(logits, batch[0].start + at)
            aims = targets[:, at : at + logits[0].shape[1]]
            flat = measure([part.reshape(-1, part.shape[-1]) for part in logits], aims.reshape(-1))
            values.append(flat.reshape(*aims.shape, -1))
            progress(aims.size)
        joined = np.concatenate(values, axis=1)
        edges = np.arange(0, length - unscored, BLOCK)
        sums.append(np.add.reduceat(joined, edges, axis=1).reshape(-1, joined.shape[-1]))
        counts.append(np.tile(np.diff(edges, append=length - unscored), len(batch)))
        largest.append(joined.max((0, 1)))
    return Blocks(np.concatenate(sums), np.concatenate(counts), np.max(largest, axis=0))


def check_finite(logits: Sequence[np.ndarray], position: int) -> None:
    """Whether logits can be evaluated at all.

    Raises:
        VerificationError: they hold NaN or infinity.
    """
    if not all(np.isfinite(part).all() for part in logits):
        raise VerificationError(
            f"the logits are NaN or infinite near token {position}, so the model cannot be evaluated; "
            "compare it with its checkpoint: rwkv-edge verify"
        )
