"""Tokens of one stream that the GPU draws before they are asked for, and the way back where they are not wanted.

Steps are enqueued in flights. While the host hands out the tokens of one, the GPU is at work on the next. Before every
flight the state is copied; so whoever asks for the state in the middle gets just what the tokens handed out have made
of it: the copy, and those tokens fed again, by the same kernels and so to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rwkv_edge.errors import SessionError
from rwkv_edge.plugins.sampling import NO_TOKEN, RING
from rwkv_edge.runtime.cuda_sampling import checked_token
from rwkv_edge.runtime.sampling import Sampler

if TYPE_CHECKING:
    from rwkv_edge.runtime.cuda import CudaSession
    from rwkv_edge.runtime.cuda_state import CudaState

LONGEST = 8  # steps of a flight; the first has one, every other twice as many as the one before
assert 2 * LONGEST < RING

Fetch = Callable[[], NDArray[np.float32]]


@dataclass
class Flight:
    """Steps that were enqueued together.

    Attributes:
        turns: of its steps.
        before: a copy of the state before its first step.
        fed: the tokens fed so far, as far as the host knows them: the last one drew what was handed out last.
    """

    turns: range
    before: CudaState
    fed: list[int] = field(default_factory=list)

    @property
    def used_up(self) -> bool:
        """Whether all its tokens were handed out."""
        return len(self.fed) == len(self.turns)


class Ahead:
    """An endless iterator of tokens over a state that runs ahead of them.

    Each item comes with the function that fetches the logits it was drawn from, which raises `SessionError` once the
    next one was asked for. A stop token is a token like others, but the state stays as it is behind it; who asks for
    more feeds it.
    """

    def __init__(
        self, session: CudaSession, sampler: Sampler, token: int, stop_tokens: Collection[int], limit: int | None
    ) -> None:
        """Nothing is enqueued yet.

        Args:
            session: runs the steps.
            sampler: is kept as if it had drawn every token that was handed out; what others do to it in between counts.
            token: fed first.
            stop_tokens: behind which no more is asked for.
            limit: tokens that will be asked for at most, where that is known.
        """
        self._session, self._sampler, self._token = session, sampler, token
        self._stop_tokens, self._limit = frozenset(stop_tokens), limit
        self._flight: Flight | None = None  # whose tokens are handed out
        self._next: Flight | None = None
        self._copies: list[CudaState] = []
        self._flying = False  # the state runs ahead
        self._stopped = False  # the device has halted behind the last token
        self._handed_out, self._changes, self._size = 0, 0, 1

    def next(self, state: CudaState) -> tuple[int, Fetch]:
        """The next token.

        Raises:
            SessionError: the backend failed, or the logits hold NaN.
        """
        flight = self._current(state)
        (drawn,) = self._session.draws(state).tokens(flight.turns[len(flight.fed)]).tolist()
        token = checked_token(drawn)
        self._sampler.take(token)
        flight.fed.append(self._token)
        self._token, self._changes = token, self._sampler.changes
        self._stopped = token in self._stop_tokens
        self._handed_out += 1
        return token, partial(self._logits, state, self._handed_out)

    def land(self, state: CudaState) -> None:
        """Make the state what the tokens handed out, but for the last, have made of it; some may be owed to it."""
        if not self._flying:
            return
        self._flying, state.ahead = False, None
        if not self._is_exact:
            self._go_back(state)
        self._session.resume(state)

    def copy_to(self, state: CudaState, other: CudaState) -> None:
        """Give ``other`` what `land` would give the state, which flies on."""
        if self._is_exact:
            other.copy_from(state)
        else:
            self._go_back(other)

    def _go_back(self, state: CudaState) -> None:
        flight = self._flight
        assert flight is not None
        if flight.used_up and self._next is not None:
            flight = self._next
        state.copy_from(flight.before)
        state.owed = list(flight.fed)

    @property
    def _is_exact(self) -> bool:
        """Whether the state is just behind the tokens handed out."""
        return self._flight is None or self._stopped or (self._next is None and self._flight.used_up)

    def _current(self, state: CudaState) -> Flight:
        """The flight with the next token; from the second on, another one is behind it."""
        if not self._flying or self._stopped or self._sampler.changes != self._changes:
            self._start(state)
        if self._flight is not None and self._flight.used_up:
            self._flight, self._next = self._next, None
        if self._flight is None:
            self._flight = self._prepared(state)
            self._enqueue(self._flight, state)
        if self._next is None and self._size > 2 and self._still_wanted > 0:
            self._next = self._prepared(state)
            self._enqueue(self._next, state)
        return self._flight

    def _start(self, state: CudaState) -> None:
        """Begin from what the state and the sampler are now."""
        self._session.repay(state)
        self._flight = self._next = None
        self._session.draws(state).load([self._sampler], self._stop_tokens)
        self._session.feed(np.array([self._token]), state)
        self._changes, self._size, self._stopped = self._sampler.changes, 1, False
        self._flying, state.ahead = True, self

    def _prepared(self, state: CudaState) -> Flight:
        """The steps of the next flight, and the way back: known before they are enqueued, which may be interrupted."""
        count = max(1, min(self._size, self._still_wanted))
        turn = self._session.draws(state).turn
        return Flight(range(turn, turn + count), self._copy(state))

    def _enqueue(self, flight: Flight, state: CudaState) -> None:
        self._session.draws(state).enqueue(len(flight.turns), lambda: self._session.draw(state))
        self._size = min(2 * self._size, LONGEST)

    @property
    def _still_wanted(self) -> int:
        """Tokens beyond those of the flights."""
        if self._limit is None:
            return LONGEST
        under_way = sum(len(f.turns) - len(f.fed) for f in (self._flight, self._next) if f is not None)
        return self._limit - self._handed_out - under_way

    def _copy(self, state: CudaState) -> CudaState:
        """A copy of the state, in the memory of one that no flight needs any more."""
        used = [flight.before for flight in (self._flight, self._next) if flight is not None]
        free = [copy for copy in self._copies if all(copy is not other for other in used)]
        if not free:
            free = [self._session.empty_state()]
            self._copies += free
        free[0].copy_from(state)
        return free[0]

    def _logits(self, state: CudaState, number: int) -> NDArray[np.float32]:
        """What the token of that number was drawn from: read, or computed again."""
        flight = self._flight
        if number != self._handed_out or flight is None or not flight.fed:
            raise SessionError("the GPU has overwritten the logits; ask for them before the next step")
        if self._flying and self._next is None and flight.used_up:
            row: NDArray[np.float32] = self._session.logits(state)[0]
            return row
        copied = self._session.empty_state()
        copied.copy_from(flight.before)
        copied.owed = flight.fed[:-1]
        again: NDArray[np.float32] = self._session.step(flight.fed[-1:], copied)[0]
        return again


def drawn_tokens(
    session: CudaSession, tokens: NDArray[np.int64], state: CudaState, count: int, stop_tokens: Collection[int]
) -> NDArray[np.int64]:
    """Feed ``tokens`` [B] and what is drawn, ``count`` times or until all streams have halted.

    The samplers are loaded already. Returns [B, count], `NO_TOKEN` behind a stop token or an error.
    """
    draws, found = session.draws(state), np.full((count, state.batch), NO_TOKEN, np.int64)
    flights: list[tuple[int, range]] = []
    session.feed(tokens, state)
    at, running = 0, True
    while (running and at < count) or flights:
        while running and at < count and len(flights) < 2:
            turns = draws.enqueue(min(LONGEST, count - at), lambda: session.draw(state))
            flights.append((at, turns))
            at += len(turns)
        start, turns = flights.pop(0)
        for i, turn in enumerate(turns):
            found[start + i] = draws.tokens(turn)
        last = found[start + len(turns) - 1]
        running = not all(token < 0 or token in stop_tokens for token in last.tolist())
    return found.T
