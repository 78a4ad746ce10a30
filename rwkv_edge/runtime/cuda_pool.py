"""Pools of streams on our CUDA kernels: each has a row of one state, and rows that pause are halted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rwkv_edge.errors import InputError
from rwkv_edge.plugins.fused_spec import MAX_BATCH
from rwkv_edge.runtime.cuda import CudaSession
from rwkv_edge.runtime.pool import StatePool, Stream


class CudaStatePool(StatePool):
    """See `StatePool`, which makes it of a `CudaSession`.

    A step runs all rows, whoever takes part: no state moves, flags on the GPU keep those that pause as they are, to the
    bit. So a pool should be no larger than the number of streams that mostly step together. Sums of a row do not depend
    on other rows in the wide kernels. Few rows, which would take the matrix-vector products (these leave out what is
    zero in all streams), are padded to as many as take the wide ones.
    """

    def __init__(self, session: CudaSession, capacity: int, exact: bool = True) -> None:
        """See `StatePool`.

        Raises:
            InputError: the capacity is below 1; or ``exact``, where the kernels of this model are not.
            SessionError: the GPU has too little memory.
        """
        self._check_capacity(capacity)
        counts = range(capacity, max(capacity, MAX_BATCH + 1) + 1)
        rows = next((n for n in counts if session.keeps_rows_apart(n)), 0) if exact else capacity
        if not rows:
            raise InputError(
                "the kernels of this model leave out what is zero in all streams, which changes the last bits of each; "
                "make the pool with exact=False, or use another backend"
            )
        self.capacity, self._spec, self._device = capacity, session.spec, session
        self._all, self._one = session.initial_state(rows), session.initial_state()
        self._places, self._lone = session.rows(self._all), session.rows(self._one)
        self._initial = self._lone.read(0)
        self._at: list[Stream | None] = [None] * capacity

    def rows(self, streams: int) -> int:
        """Rows that a step of any number of streams runs."""
        del streams
        return self._all.batch

    @property
    def _side(self) -> int:
        """That of the whole state counts."""
        return 0

    def _read(self, stream: Stream) -> dict[str, np.ndarray]:
        return self._places.read(stream._row)

    def _write(self, stream: Stream, stored: Mapping[str, np.ndarray]) -> None:
        self._places.write(stream._row, stored)

    def _copy(self, stream: Stream, row: int, side: int) -> None:
        del side
        self._places.copy(row, self._places, stream._row)

    def _advance(self, streams: Sequence[Stream], ids: NDArray[np.int64]) -> dict[Stream, NDArray[np.float32]]:
        places = [stream._row for stream in streams]
        fed, goes = np.zeros(self._all.batch, np.int64), np.zeros(self._all.batch, bool)
        fed[places], goes[places] = ids, True
        logits = self._device.step_rows(fed, goes, self._all)
        return {stream: logits[stream._row] for stream in streams}

    def _prefill(self, stream: Stream, tokens: np.ndarray) -> NDArray[np.float32]:
        self._lone.copy(0, self._places, stream._row)
        logits: NDArray[np.float32] = self._device.prefill(tokens, self._one)[0]
        self._places.copy(stream._row, self._lone, 0)
        return logits
