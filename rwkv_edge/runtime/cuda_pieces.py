"""Prompts and large batches through the wide kernels: which chain runs how many rows, and the graphs of chunks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from rwkv_edge.plugins.fused_spec import Dimensions
from rwkv_edge.runtime.cuda_driver import Driver
from rwkv_edge.runtime.cuda_launch import Loaded
from rwkv_edge.runtime.cuda_weights import Weights
from rwkv_edge.runtime.cuda_wide import Rows, WideChain
from rwkv_edge.runtime.session import chunk_plan
from rwkv_edge.spec import ModelSpec

if TYPE_CHECKING:
    from rwkv_edge.runtime.cuda_state import CudaState

WIDE_VERSIONS: Final = ("7", "7a")
CHUNKS: Final = (512, 256, 128, 64, 32, 16, 8, 4, 2)
"""Tokens of a chunk. Half as many tokens take the time of the weights alone from some length on, so that a single step
for each of the rest would cost more than a few chunks do."""

MOST_ROWS: Final = 1024
"""Rows of a chain: more fill the GPU no better, and their activations take memory."""

LEAST_ROWS: Final = 16
TOKEN: Final = 4  # bytes
SCORED_ROWS: Final = 128  # of logits that are computed at once: 32 MiB with a vocabulary of 65536


@dataclass(frozen=True)
class Piece:
    """Tokens that go through a chain at once.

    Attributes:
        ids: device address, [B, T] int32.
        tokens: T; 1 is a step.
        ends_chunk: with it a chunk of `Session.prefill` ends.
    """

    ids: int
    tokens: int
    ends_chunk: bool


@dataclass(frozen=True)
class PieceKey:
    """What the graph of a chunk depends on, beside the side of the token shifts."""

    tokens: int


class Pieces:
    """The wide chains of a model, by the number of rows."""

    def __init__(
        self,
        driver: Driver,
        spec: ModelSpec,
        dimensions: Dimensions,
        weights: Weights,
        loaded: Loaded,
    ) -> None:
        """Nothing is allocated yet; see `WideChain` for the arguments."""
        self._driver, self._spec, self._dimensions, self._weights = driver, spec, dimensions, weights
        self._loaded = loaded
        self._chains: dict[int, WideChain] = {}
        self.runs = spec.version in WIDE_VERSIONS and not spec.rescale

    @property
    def chunks(self) -> tuple[int, ...]:
        """See `Session.chunks`."""
        return CHUNKS if self.runs else ()

    @contextlib.contextmanager
    def uploaded(self, tokens: np.ndarray) -> Iterator[list[Piece]]:
        """Tokens [B, T] on the device for as long as the context lasts, in the pieces that chains take."""
        batch, count = tokens.shape
        lengths = [(n, end) for chunk in chunk_plan(count, self.chunks) for n, end in self._split(chunk, batch)]
        ends = np.cumsum([n for n, _ in lengths])
        parts = [tokens[:, end - n : end].reshape(-1) for (n, _), end in zip(lengths, ends, strict=True)]
        ids = self._driver.allocate(TOKEN * tokens.size)
        try:
            self._driver.upload(np.concatenate(parts).astype(np.int32), ids)
            yield [
                Piece(ids + TOKEN * batch * int(end - n), n, ends_chunk)
                for (n, ends_chunk), end in zip(lengths, ends, strict=True)
            ]
        finally:
            self._driver.free(ids)

    def _split(self, chunk: int, batch: int) -> Iterator[tuple[int, bool]]:
        """Tokens that go through a chain at once, of a chunk of ``batch`` streams; whether it ends there."""
        most = MOST_ROWS // batch
        lengths = list(chunk_plan(chunk, [n for n in self.chunks if n <= most]))
        return ((n, i == len(lengths) - 1) for i, n in enumerate(lengths))

    def chain(self, rows: int) -> WideChain:
        """The chain for so many rows, at most `MOST_ROWS`: there is one for every power of two."""
        size = LEAST_ROWS
        while size < rows:
            size *= 2
        if size not in self._chains:
            self._chains[size] = WideChain(self._driver, self._spec, self._dimensions, self._weights, size)
        return self._chains[size]

    def enqueue(self, piece: Piece, state: CudaState, lasts: bool) -> WideChain:
        """Advance a state; one that does not last has no graph the first time: it may never see the length again."""
        chain = self.chain(state.batch * piece.tokens)
        self._driver.copy(chain.ids, piece.ids, TOKEN * state.batch * piece.tokens)
        key = (state.side, PieceKey(piece.tokens))
        if key in state.graphs:
            state.graphs[key].launch()
        else:
            rows = Rows(state.batch, piece.tokens, chain.ids, state.places(0), state.side, state.halted)
            self._run_or_capture(chain, rows, key, state, lasts)
        state.side = 1 - state.side
        return chain

    def _run_or_capture(
        self, chain: WideChain, rows: Rows, key: tuple[int, PieceKey], state: CudaState, lasts: bool
    ) -> None:
        launches = chain.launches(rows)
        if not lasts and key not in state.ran:
            state.ran.add(key)
            self._loaded.enqueue(launches)
            return
        state.graphs[key] = self._loaded.captured([launches])
        state.graphs[key].launch()

    def give_last(self, chain: WideChain, piece: Piece, state: CudaState) -> None:
        """Enqueue the logits of the last tokens that `enqueue` has fed."""
        launches = [chain.last_norm(state.batch, piece.tokens, 1), chain.head(0, state.batch, state.logits)]
        self._loaded.enqueue(launches)

    def scored(self, chain: WideChain, piece: Piece, batch: int) -> np.ndarray:
        """Logits [B, T, V] of all tokens that `enqueue` has fed."""
        rows = batch * piece.tokens
        found = np.empty((rows, self._spec.vocab_size), np.float32)
        scratch = self._driver.allocate(found[:SCORED_ROWS].nbytes)
        try:
            self._loaded.enqueue([chain.last_norm(batch, piece.tokens, piece.tokens)])
            for first in range(0, rows, SCORED_ROWS):
                part = found[first : first + SCORED_ROWS]
                self._loaded.enqueue([chain.head(first, len(part), scratch)])
                self._driver.download(scratch, part)
        finally:
            self._driver.free(scratch)
        return found.reshape(batch, piece.tokens, -1)

    def fill_with_nan(self) -> None:
        """What a test does to find out whether a kernel reads what none has written."""
        for chain in self._chains.values():
            chain.fill_with_nan()

    def close(self) -> None:
        """Give the buffers back."""
        for chain in self._chains.values():
            chain.close()
        self._chains.clear()
