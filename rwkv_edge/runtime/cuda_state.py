"""States on the GPU: the memory of streams, and the graphs that advance it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rwkv_edge.runtime.cuda_chain import Give, Outputs, StatePlaces, row_bytes, state_layout
from rwkv_edge.runtime.cuda_driver import Driver, Graph
from rwkv_edge.runtime.cuda_pieces import PieceKey
from rwkv_edge.runtime.cuda_sampling import DrawKey, Draws
from rwkv_edge.spec import ModelSpec

if TYPE_CHECKING:
    from rwkv_edge.runtime.cuda_ahead import Ahead


class CudaState:
    """The memory of streams on the GPU: matrices updated in place, token shifts on two sides that take turns.

    Attributes:
        batch: number of streams.
        side: of the token shifts that hold the state.
        generation: of the kernels that ``graphs`` hold; see `CudaSession.retune`.
        ran: chunks that have run once; the second time is worth a graph.
        owed: tokens of a lone stream that the state stands behind, but that have still to be fed.
        ahead: who runs ahead with it; it must land before anybody else uses the state.
        draws: with what its tokens are drawn, once any were.
    """

    def __init__(self, driver: Driver, spec: ModelSpec, batch: int) -> None:
        self.batch, self.side, self.generation = batch, 0, 0
        self._driver, self._spec = driver, spec
        self.single, self.double = state_layout(spec, batch)
        self._sizes = tuple(_end(places) for places in (self.single, self.double))
        self.matrices = driver.allocate(self._sizes[0])
        self.shifts = driver.allocate(self._sizes[1]), driver.allocate(self._sizes[1])
        self.tokens = driver.allocate(4 * batch)
        self.logits = driver.allocate(4 * batch * spec.vocab_size)
        self.halted = driver.allocate(4 * batch)
        self.graphs: dict[tuple[int, Give | DrawKey | PieceKey], Graph] = {}
        self.ran: set[tuple[int, PieceKey]] = set()
        self.owed: list[int] = []
        self.ahead: Ahead | None = None
        self.draws: Draws | None = None
        pointers = (self.matrices, *self.shifts, self.tokens, self.logits, self.halted)
        weakref.finalize(self, _release, driver, pointers, self.graphs)

    def address(self, name: str, side: int, row: int = 0) -> int:
        """Of a stream's part of a state tensor."""
        at = row * row_bytes(self._spec, name)
        if name in self.single:
            return self.matrices + self.single[name][0] + at
        return self.shifts[side] + self.double[name][0] + at

    def places(self, row: int) -> StatePlaces:
        """The streams from ``row`` on."""
        layers = range(self._spec.n_layer)
        shifts = [
            tuple(
                (self.address(f"att_shift.{i}", side, row), self.address(f"ffn_shift.{i}", side, row)) for i in layers
            )
            for side in (0, 1)
        ]
        parts = [(name, *name.rsplit(".", 1)) for name in self.single]
        single = tuple({part: self.address(name, 0, row) for name, part, i in parts if i == str(n)} for n in layers)
        return StatePlaces(single, (shifts[0], shifts[1]))

    def outputs(self, row: int) -> Outputs:
        """Tokens, logits and flags of the streams from ``row`` on."""
        logits = self.logits + 4 * row * self._spec.vocab_size
        return Outputs(self.tokens + 4 * row, logits, self.halted + 4 * row)

    def drop_graphs(self, generation: int) -> None:
        """Forget the graphs of kernels that are used no more."""
        for graph in self.graphs.values():
            graph.close()
        self.graphs.clear()
        self.generation = generation

    def copy_from(self, other: CudaState) -> None:
        """Take the state of ``other``, of as many streams."""
        self._driver.copy(self.matrices, other.matrices, self._sizes[0])
        self._driver.copy(self.shifts[self.side], other.shifts[other.side], self._sizes[1])


def _release(
    driver: Driver, pointers: Sequence[int], graphs: dict[tuple[int, Give | DrawKey | PieceKey], Graph]
) -> None:
    """Give back what a state held."""
    for graph in graphs.values():
        graph.close()
    graphs.clear()
    driver.free(*pointers)


def _end(places: Mapping[str, tuple[int, int]]) -> int:
    return max((offset + nbytes for offset, nbytes in places.values()), default=0)
