"""The state of streams in host memory, bound to ONNX Runtime without copies."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rwkv_edge.errors import SessionError
from rwkv_edge.runtime.ort_graph import ONNX_TYPE, OrtGraph
from rwkv_edge.runtime.ort_providers import first_line
from rwkv_edge.spec import ModelSpec


class StreamStates(Protocol):
    """What sessions of ONNX Runtime and pools do with a state, wherever its memory is: see `OrtState`."""

    batch: int
    current: int

    def run(self, graph: OrtGraph, tokens: np.ndarray, rows: int | None = None) -> np.ndarray:
        """Feed tokens to the first ``rows`` streams; returns logits, which the next run may overwrite."""
        ...

    def arrays(self) -> Mapping[str, np.ndarray]:
        """The tensors by name, each [B, …] in stored form; not to be written."""
        ...

    def copy(self) -> StreamStates:
        """An independent copy."""
        ...

    def row(self, row: int, side: int) -> Mapping[str, np.ndarray]:
        """One stream in one of the sets, arrays [1, …]; not to be written."""
        ...

    def set_row(self, row: int, side: int, stored: Mapping[str, np.ndarray]) -> None:
        """Give one stream in one of the sets the values of arrays [1, …]."""
        ...

    def copy_row(self, source: Any, source_row: int, source_side: int, row: int, side: int) -> None:
        """Give one stream in one of the sets what another has, here or in another state of the session."""
        ...

    def take(self, source: Any) -> None:
        """Both sets begin with the rows of a smaller state, and the same one of them is current."""
        ...


@dataclass(frozen=True)
class _Bound:
    """A graph bound to one direction between the two sets, with its tokens and logits."""

    binding: Any
    tokens: np.ndarray
    logits: np.ndarray


class OrtState:
    """Two sets of state tensors that take turns: a run reads one and writes the other.

    The shift states must not share memory with their outputs: ONNX Runtime may write an output before it read the
    input.

    Attributes:
        batch: number of streams.
        sets: the two sets of tensors by name, each [B, …] in stored form.
        current: index of the set that holds the state.
    """

    def __init__(self, spec: ModelSpec, stored: dict[str, np.ndarray]) -> None:
        """``stored`` becomes the current set; it is owned from now on."""
        self.batch = next(iter(stored.values())).shape[0]
        self.sets = (stored, {name: np.zeros_like(array) for name, array in stored.items()})
        self.current = 0
        self._spec = spec
        self._logits = np.zeros((self.batch, spec.vocab_size), np.float32)
        self._bound: weakref.WeakKeyDictionary[OrtGraph, dict[tuple[int, int], _Bound]] = weakref.WeakKeyDictionary()

    def run(self, graph: OrtGraph, tokens: np.ndarray, rows: int | None = None) -> np.ndarray:
        """Feed tokens to the first ``rows`` streams (all by default); afterwards the other set is their state.

        Args:
            graph: takes as many tokens per stream as there are.
            tokens: [rows] or [rows, T] int64.
            rows: number of streams; those behind keep their state in the set that was current.

        Returns:
            Logits [rows, V] or [rows, T, V] float32: memory that the next run overwrites.

        Raises:
            SessionError: the backend failed.
        """
        bound = self._bound_to(graph, self.current, self.batch if rows is None else rows)
        bound.tokens[:] = tokens
        try:
            graph.session.run_with_iobinding(bound.binding, graph.run_options)
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            raise SessionError(f"ONNX Runtime failed at a step: {first_line(error)}") from error
        self.current = 1 - self.current
        return bound.logits

    def arrays(self) -> dict[str, np.ndarray]:
        """The tensors themselves, each [B, …] in stored form."""
        return self.sets[self.current]

    def copy(self) -> OrtState:
        """An independent copy."""
        return OrtState(self._spec, {name: array.copy() for name, array in self.arrays().items()})

    def row(self, row: int, side: int) -> dict[str, np.ndarray]:
        """Views [1, …] of one stream in one of the sets."""
        return {name: array[row : row + 1] for name, array in self.sets[side].items()}

    def set_row(self, row: int, side: int, stored: Mapping[str, np.ndarray]) -> None:
        """Give one stream in one of the sets the values of arrays [1, …]."""
        for name, array in self.sets[side].items():
            array[row] = stored[name][0]

    def copy_row(self, source: OrtState, source_row: int, source_side: int, row: int, side: int) -> None:
        """Give one stream in one of the sets what another has, here or in another state."""
        self.set_row(row, side, source.row(source_row, source_side))

    def take(self, source: OrtState) -> None:
        """Both sets begin with the rows of a smaller state, and the same one of them is current."""
        for before, after in zip(source.sets, self.sets, strict=True):
            for name, array in before.items():
                after[name][: len(array)] = array
        self.current = source.current

    def _bound_to(self, graph: OrtGraph, side: int, rows: int) -> _Bound:
        """Made once per graph, direction and number of rows."""
        known = self._bound.setdefault(graph, {})
        if (side, rows) not in known:
            known[side, rows] = self._bind(graph, self.sets[side], self.sets[1 - side], rows)
        return known[side, rows]

    def _bind(
        self, graph: OrtGraph, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], rows: int
    ) -> _Bound:
        tokens = np.zeros((rows, graph.tokens) if graph.tokens > 1 else rows, np.int64)
        logits = self._logits[:rows]
        if graph.all_logits:
            logits = np.zeros((rows, graph.tokens, self._spec.vocab_size), np.float32)
        dtypes = {t.name: t.dtype for t in self._spec.state}
        inputs = [(graph.input_name, "int64", tokens), *((n, dtypes[n], a[:rows]) for n, a in before.items())]
        outputs = [("logits", "float32", logits), *((f"{n}.out", dtypes[n], a[:rows]) for n, a in after.items())]
        binding = graph.session.io_binding()
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, dtype, array in tensors:
                bind(name, "cpu", 0, ONNX_TYPE[dtype], list(array.shape), array.ctypes.data)
        return _Bound(binding, tokens, logits)
