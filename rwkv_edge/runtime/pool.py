"""Many streams in one batch: they come and go, and none of them notices the others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rwkv_edge.errors import InputError, SessionError, StateError
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.session import checked_tokens, named_from_stored, stored_from_named

if TYPE_CHECKING:
    from rwkv_edge.runtime.cuda import CudaSession

PROBE_STEPS = 3  # from the second on, the recurrence reads a state that is not empty


class Stream:
    """Handle of one stream of a pool; `StatePool.open` and `StatePool.fork` make it."""

    def __init__(self, pool: StatePool, row: int, side: int) -> None:
        self._pool: StatePool | None = pool  # None when closed
        self._row = row
        self._side = side  # which of the two sets of tensors holds its state

    @property
    def is_open(self) -> bool:
        """Whether it can still be used."""
        return self._pool is not None


class StatePool:
    """Room for the states of several streams, any of which can be stepped together.

    Streams that step together lie in the first rows of the batch, so that a step moves no state at all; a change of
    who steps copies the states of those who change places. Idle streams are not touched.

    The logits of a stream have the same bits whoever steps with it. ONNX Runtime sums in another order for few rows
    (always for one; with several threads for up to 6, measured), so few streams may be padded to more rows: as many as
    give the bits that a full pool gives. That is found out by steps of a probe, when a number of streams first occurs.
    They are not the bits of a session at batch 1, which differ in the last places. Where even the rows of a full pool
    differ (ReduceSum over heads whose size is no multiple of 4), streams step one by one.

    Over our CUDA kernels a pool is a `rwkv_edge.runtime.cuda_pool.CudaStatePool`: every step runs all rows, and no
    stream moves.

    One thread at a time may use a pool. The session stays open; it is the caller's.

    Attributes:
        capacity: the most streams that can be open.
    """

    def __new__(cls, session: OrtSession | CudaSession, capacity: int, exact: bool = True) -> StatePool:
        """The pool for a session's backend."""
        from rwkv_edge.runtime.cuda import CudaSession
        from rwkv_edge.runtime.cuda_pool import CudaStatePool

        return super().__new__(CudaStatePool if isinstance(session, CudaSession) else cls)

    def __init__(self, session: OrtSession | CudaSession, capacity: int, exact: bool = True) -> None:
        """Take the memory of all states.

        Args:
            session: of ONNX Runtime, of an artifact that was exported with ``--batch dynamic``, on a CPU best opened
                with ``prepack``, where lone streams mostly need no padding and steps of several are up to twice as
                fast; or of our CUDA kernels, of any artifact.
            capacity: the most streams that can be open.
            exact: pad few streams to more rows, for the same bits; else every stream is one row.

        Raises:
            InputError: the artifact's batch is fixed, or the capacity is below 1.
            SessionError: a backend without rows.
        """
        self._check_capacity(capacity)
        if not isinstance(session, OrtSession):
            raise SessionError(
                f"a pool needs a session of ONNX Runtime or of the backend 'cuda', not {type(session).__name__}"
            )
        if session.spec.batch is not None:
            raise InputError(
                f"a pool needs an artifact with a dynamic batch, but this one has batch {session.spec.batch}; "
                "export it with --batch dynamic"
            )
        self.capacity, self._spec = capacity, session.spec
        self._session = session
        self._state = session.initial_state(capacity)
        self._scratch = session.initial_state(1)
        self._initial = {name: array.copy() for name, array in self._scratch.arrays().items()}
        self._at: list[Stream | None] = [None] * capacity  # row → who lies there
        self._padded: dict[int, int] = {} if exact else {n: n for n in range(1, capacity + 1)}
        self._expected: str | None = None  # digest of a full pool's probe, when known

    def __len__(self) -> int:
        """Number of open streams."""
        return sum(stream is not None for stream in self._at)

    def open(self, arrays: Mapping[str, np.ndarray] | None = None) -> Stream:
        """A new stream.

        Args:
            arrays: its state [1, …] by name, as `export` or a snapshot gives it; the model's initial one where None.

        Raises:
            InputError: the pool is full.
            StateError: the state is of another model, holds NaN, or has several streams.
        """
        stored = self._initial if arrays is None else stored_from_named(arrays, self._spec)
        streams = len(next(iter(stored.values())))
        if streams != 1:
            raise StateError(f"a stream of a pool has a state of one stream, not of {streams}; open them one by one")
        stream = self._placed()
        self._write(stream, stored)
        return stream

    def fork(self, stream: Stream) -> Stream:
        """A new stream with the state of another.

        Raises:
            InputError: the pool is full, or the stream is closed or of another pool.
        """
        self._check(stream)
        twin = self._placed()
        self._copy(stream, twin._row, twin._side)
        return twin

    def close(self, stream: Stream) -> None:
        """Free its place.

        Raises:
            InputError: it is closed already, or of another pool.
        """
        self._check(stream)
        self._at[stream._row] = None
        stream._pool = None

    def step(self, tokens: Mapping[Stream, int]) -> dict[Stream, np.ndarray]:
        """Feed one token to each of some streams.

        Args:
            tokens: stream → token below the vocabulary size.

        Returns:
            Stream → logits [V] float32, rows of a new array.

        Raises:
            InputError: a stream is closed or of another pool, or a token outside the vocabulary; no stream advanced.
            SessionError: the backend failed; no stream advanced.
        """
        for stream in tokens:
            self._check(stream)
        if not tokens:
            return {}
        ids = checked_tokens(list(tokens.values()), 1, len(tokens), self._spec)
        return self._advance(list(tokens), ids)

    def _advance(self, streams: Sequence[Stream], ids: NDArray[np.int64]) -> dict[Stream, NDArray[np.float32]]:
        rows = self.rows(len(streams))
        if not rows:
            return self._step_one_by_one(dict(zip(streams, ids.tolist(), strict=True)))
        self._gather(streams, rows)
        fed = np.zeros(rows, np.int64)
        fed[[stream._row for stream in streams]] = ids
        logits = self._session.step_rows(fed, self._state)
        for stream in streams:
            stream._side = self._state.current
        return {stream: logits[stream._row] for stream in streams}

    def _step_one_by_one(self, tokens: Mapping[Stream, int]) -> dict[Stream, np.ndarray]:
        found, after = {}, {}
        for stream, token in tokens.items():
            self._scratch.copy_row(self._state, stream._row, stream._side, 0, self._scratch.current)
            found[stream] = self._session.step([token], self._scratch)[0]
            after[stream] = {n: array.copy() for n, array in self._scratch.row(0, self._scratch.current).items()}
        for stream, stored in after.items():
            self._write(stream, stored)
        return found

    def prefill(self, stream: Stream, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Feed tokens [T ≥ 1] to one stream, in chunks; returns the logits [V] float32 after the last.

        Raises:
            InputError: the stream is closed or of another pool, or a token outside the vocabulary.
            SessionError: the backend failed; the stream has not advanced.
        """
        self._check(stream)
        return self._prefill(stream, np.asarray(tokens)[None])

    def _prefill(self, stream: Stream, tokens: np.ndarray) -> NDArray[np.float32]:
        self._scratch.copy_row(self._state, stream._row, stream._side, 0, self._scratch.current)
        logits: NDArray[np.float32] = self._session.prefill(tokens, self._scratch)[0]
        self._state.copy_row(self._scratch, 0, self._scratch.current, stream._row, stream._side)
        return logits

    def export(self, stream: Stream) -> dict[str, np.ndarray]:
        """Copies of its state tensors by name, each [1, …]; bfloat16 ones as float32.

        Raises:
            InputError: it is closed or of another pool.
        """
        self._check(stream)
        return named_from_stored(self._read(stream), self._spec)

    def rows(self, streams: int) -> int:
        """Rows that a step of so many streams runs: the fewest that give each the bits of a full pool.

        0 where the rows of a full pool differ among themselves, so that streams have to step one by one.
        """
        if streams not in self._padded:
            if self._expected is None:
                self._expected = self._probe(self.capacity)
            enough = (rows for rows in range(streams, self.capacity) if self._probe(rows) == self._expected)
            self._padded[streams] = next(enough, self.capacity) if self._expected else 0
        return self._padded[streams]

    def _probe(self, rows: int) -> str:
        """Digest of the logits and the state of the same tokens in every row; '' where rows differ."""
        state = self._session.initial_state(rows)
        for step in range(PROBE_STEPS):
            logits = self._session.step(np.full(rows, (step + 1) % self._session.spec.vocab_size), state)
        digest = hashlib.sha256()
        for array in (logits, *state.arrays().values()):
            content = np.ascontiguousarray(array).reshape(rows, -1).view(np.uint8)
            if (content != content[:1]).any():
                return ""
            digest.update(content[0].data)
        return digest.hexdigest()

    @staticmethod
    def _check_capacity(capacity: int) -> None:
        if capacity < 1:
            raise InputError(f"the capacity of a pool must be at least 1, not {capacity}")

    @property
    def _side(self) -> int:
        """Of a new stream."""
        return self._state.current

    def _read(self, stream: Stream) -> Mapping[str, np.ndarray]:
        return self._state.row(stream._row, stream._side)

    def _write(self, stream: Stream, stored: Mapping[str, np.ndarray]) -> None:
        self._state.set_row(stream._row, stream._side, stored)

    def _check(self, stream: Stream) -> None:
        if not isinstance(stream, Stream):
            raise InputError(f"a stream is what StatePool.open returns, not {type(stream).__name__}")
        if stream._pool is None:
            raise InputError("the stream is closed; open a new one")
        if stream._pool is not self:
            raise InputError("the stream belongs to another pool; use it there, or open its exported state here")

    def _placed(self) -> Stream:
        """A new stream in the first free row, its state not yet written."""
        if len(self) == self.capacity:
            raise InputError(f"the pool is full: {self.capacity} streams are open; close one, or make a larger pool")
        stream = Stream(self, self._at.index(None), self._side)
        self._at[stream._row] = stream
        return stream

    def _gather(self, streams: Sequence[Stream], rows: int) -> None:
        """Bring ``streams`` into the first rows and one set of tensors, with nobody in the rows up to ``rows``."""
        self._reserve(self.capacity + rows - len(streams))
        chosen = set(streams)
        wrong = [row for row in range(len(streams)) if self._at[row] not in chosen]
        for stream in streams:
            if stream._row >= len(streams):
                self._exchange(stream, wrong.pop())
        for row in range(len(streams), rows):  # a step would overwrite an idle stream there
            idle = self._at[row]
            if idle is not None:
                self._exchange(idle, self._at.index(None, rows))
        ahead = sum(stream._side for stream in streams)
        self._state.current = int(2 * ahead > len(streams))  # the set that holds most of them
        for stream in streams:
            if stream._side != self._state.current:
                self._copy(stream, stream._row, self._state.current)
                stream._side = self._state.current

    def _exchange(self, stream: Stream, row: int) -> None:
        """Move a stream to another row, and who lies there to its row; each into the set that is free there."""
        former, other = stream._row, self._at[row]
        side = stream._side if other is None else 1 - other._side
        self._copy(stream, row, side)
        if other is not None:
            self._copy(other, former, 1 - stream._side)
            other._row, other._side = former, 1 - stream._side
        self._at[former], self._at[row] = other, stream
        stream._row, stream._side = row, side

    def _copy(self, stream: Stream, row: int, side: int) -> None:
        self._state.copy_row(self._state, stream._row, stream._side, row, side)

    def _reserve(self, rows: int) -> None:
        """Memory for so many rows: all streams and the padding."""
        if rows <= len(self._at):
            return
        grown = self._session.initial_state(rows)
        grown.take(self._state)
        self._state = grown
        self._at += [None] * (rows - len(self._at))
