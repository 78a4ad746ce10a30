"""The state of streams in the memory of a device: it stays there between steps, and the steps are CUDA graphs."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rwkv_edge.errors import SessionError
from rwkv_edge.runtime.ort_graph import ONNX_TYPE, OrtGraph
from rwkv_edge.runtime.ort_memory import ALIGNMENT, Device, bytes_of, copy, view
from rwkv_edge.runtime.ort_providers import first_line, onnxruntime_module
from rwkv_edge.spec import ModelSpec, numpy_dtype

KEPT_BYTES = 1 << 28  # of sets of states that nobody uses, kept for the next state


class CaptureError(SessionError):
    """A run could not become a CUDA graph; the state has not advanced."""


@dataclass(frozen=True)
class _Bound:
    """A graph bound to one direction between the two sets of a `_Room`.

    ``graph_id`` is that of its CUDA graph, None where runs are not captured.
    """

    binding: Any
    tokens: Any  # OrtValue int64 [rows] or [rows, T]
    logits: Any  # OrtValue float32 [rows, V] or [rows, T, V]
    run_options: Any
    graph_id: int | None


class _Room:
    """Two sets of state tensors for ``batch`` streams, one block of memory each, and the graphs bound to them."""

    def __init__(self, memory: DeviceMemory, batch: int) -> None:
        self.batch = batch
        self.offsets: dict[str, int] = {}
        end = 0
        for t in memory.spec.state:
            self.offsets[t.name] = end
            end += -(-batch * t.nbytes // ALIGNMENT) * ALIGNMENT
        self.nbytes = end
        self.blocks = tuple(memory.device.block(end) for _ in range(2))
        for block in self.blocks:
            block.update_inplace(np.zeros(end, np.uint8))  # rows that only pad a batch are computed too
        self.bound: weakref.WeakKeyDictionary[OrtGraph, dict[tuple[int, int], _Bound]] = weakref.WeakKeyDictionary()


class DeviceMemory:
    """The memory of a session's states on its device.

    What a state leaves behind, the next one of its batch takes over: CUDA graphs hold the addresses that they were
    captured with, and ONNX Runtime keeps them until its session ends. So there are as many as states at one time.
    """

    def __init__(self, spec: ModelSpec, device: Device) -> None:
        """Takes nothing yet."""
        self.spec = spec
        self.device = device
        self._unused: list[_Room] = []
        self._ids = itertools.count(1)  # 0 is what runs without an id have
        self._closed = False

    def room(self, batch: int) -> _Room:
        """Memory for ``batch`` streams.

        Raises:
            SessionError: there is not enough.
        """
        for room in reversed(self._unused):
            if room.batch == batch:
                self._unused.remove(room)
                return room
        return _Room(self, batch)

    def leave(self, room: _Room) -> None:
        """Nobody uses this memory any more."""
        if self._closed:
            return
        self._unused.append(room)
        while sum(2 * unused.nbytes for unused in self._unused) > KEPT_BYTES:
            _release_graphs(self._unused.pop(0))

    def close(self) -> None:
        """Free what no state uses; the rest goes with its states."""
        self._closed = True
        self._unused.clear()

    def bound(self, room: _Room, graph: OrtGraph, side: int, rows: int) -> _Bound:
        """A graph that reads one set and writes the other, made once per graph, direction and number of rows."""
        known = room.bound.setdefault(graph, {})
        if (side, rows) not in known:
            known[side, rows] = self._bind(room, graph, side, rows)
        return known[side, rows]

    def _bind(self, room: _Room, graph: OrtGraph, side: int, rows: int) -> _Bound:
        device = self.device
        length = (graph.tokens,) if graph.tokens > 1 else ()
        tokens = device.tensor((rows, *length), np.int64)
        logits = device.tensor((rows, *(length if graph.all_logits else ()), self.spec.vocab_size), np.float32)
        binding = graph.session.io_binding()
        binding.bind_ortvalue_input(graph.input_name, tokens)
        binding.bind_ortvalue_output("logits", logits)
        for bind, suffix, block in (
            (binding.bind_input, "", room.blocks[side]),
            (binding.bind_output, ".out", room.blocks[1 - side]),
        ):
            for t in self.spec.state:
                address = block.data_ptr() + room.offsets[t.name]
                bind(t.name + suffix, device.kind, device.number, ONNX_TYPE[t.dtype], [rows, *t.shape], address)
        graph_id = next(self._ids) if graph.captured else None
        return _Bound(binding, tokens, logits, _run_options(graph, graph_id), graph_id)


class DeviceState:
    """`rwkv_edge.runtime.ort_state.OrtState` in the memory of a device: only tokens and logits cross its border.

    Two sets of tensors take turns: a run reads one and writes the other. With CUDA graphs, the first run of a
    direction is several: ONNX Runtime runs once or twice as usual, so that all memory is taken, captures, and launches
    what it captured. Since none of them writes the set that is read, all of them write the same values, and the state
    has advanced by one token when they are done. A graph is captured for the thread that runs it, so a state should
    stay with one thread.

    Attributes:
        batch: number of streams.
        current: index of the set that holds the state.
    """

    def __init__(self, memory: DeviceMemory, stored: Mapping[str, np.ndarray]) -> None:
        """A state with the values ``stored``, arrays [B, …] by name in stored form.

        Raises:
            SessionError: the device has not enough memory.
        """
        self.batch = next(iter(stored.values())).shape[0]
        self.current = 0
        self._memory = memory
        self._room = memory.room(self.batch)
        weakref.finalize(self, memory.leave, self._room).atexit = False
        content = np.zeros(self._room.nbytes, np.uint8)
        for t in memory.spec.state:
            start = self._room.offsets[t.name]
            content[start : start + self.batch * t.nbytes] = bytes_of(stored[t.name])
        self._room.blocks[0].update_inplace(content)

    def run(self, graph: OrtGraph, tokens: np.ndarray, rows: int | None = None) -> np.ndarray:
        """Feed tokens to the first ``rows`` streams (all by default); afterwards the other set is their state.

        Args:
            graph: takes as many tokens per stream as there are.
            tokens: [rows] or [rows, T] int64.
            rows: number of streams; those behind keep their state in the set that was current.

        Returns:
            Logits [rows, V] or [rows, T, V] float32.

        Raises:
            CaptureError: the first run of a direction failed, and runs are captured.
            SessionError: the backend failed.
        """
        rows = self.batch if rows is None else rows
        known = self._room.bound.get(graph, {})
        first = (self.current, rows) not in known
        bound = self._memory.bound(self._room, graph, self.current, rows)
        try:
            bound.tokens.update_inplace(np.ascontiguousarray(tokens))
            graph.session.run_with_iobinding(bound.binding, bound.run_options)
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            if first:
                del self._room.bound[graph][self.current, rows]
            kind = CaptureError if first and graph.captured else SessionError
            raise kind(f"ONNX Runtime failed at a step: {first_line(error)}") from error
        self.current = 1 - self.current
        logits: np.ndarray = bound.logits.numpy()
        return logits

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies of the tensors by name, each [B, …] in stored form."""
        content = np.array(self._room.blocks[self.current].numpy())
        found = {}
        for t in self._memory.spec.state:
            start = self._room.offsets[t.name]
            raw = content[start : start + self.batch * t.nbytes]
            found[t.name] = raw.view(numpy_dtype(t.dtype)).reshape(self.batch, *t.shape)
        return found

    def copy(self) -> DeviceState:
        """An independent copy."""
        twin = DeviceState.__new__(DeviceState)
        twin.batch, twin.current, twin._memory = self.batch, 0, self._memory
        twin._room = self._memory.room(self.batch)
        weakref.finalize(twin, self._memory.leave, twin._room).atexit = False
        copy(self._room.blocks[self.current], twin._room.blocks[0])
        twin._finish()
        return twin

    def row(self, row: int, side: int) -> dict[str, np.ndarray]:
        """Copies [1, …] of one stream in one of the sets, in stored form."""
        return {
            t.name: np.array(region.numpy()).view(numpy_dtype(t.dtype)).reshape(1, *t.shape)
            for t, region in zip(self._memory.spec.state, self._regions(row, side), strict=True)
        }

    def set_row(self, row: int, side: int, stored: Mapping[str, np.ndarray]) -> None:
        """Give one stream in one of the sets the values of arrays [1, …]."""
        for t, region in zip(self._memory.spec.state, self._regions(row, side), strict=True):
            region.update_inplace(bytes_of(stored[t.name]))

    def copy_row(self, source: DeviceState, source_row: int, source_side: int, row: int, side: int) -> None:
        """Give one stream in one of the sets what another has, here or in another state of the session."""
        pairs = zip(source._regions(source_row, source_side), self._regions(row, side), strict=True)
        for before, after in pairs:
            copy(before, after)
        self._finish()

    def take(self, source: DeviceState) -> None:
        """Both sets begin with the rows of a smaller state, and the same one of them is current."""
        for side in range(2):
            pairs = zip(source._regions(0, side, source.batch), self._regions(0, side, source.batch), strict=True)
            for before, after in pairs:
                copy(before, after)
        self._finish()
        self.current = source.current

    def _regions(self, row: int, side: int, rows: int = 1) -> Iterator[Any]:
        """Views of uint8 [n]: the bytes of ``rows`` streams in every tensor of one set."""
        block, device = self._room.blocks[side], self._memory.device
        for t in self._memory.spec.state:
            yield view(block, device, self._room.offsets[t.name] + row * t.nbytes, [rows * t.nbytes])

    def _finish(self) -> None:
        """Wait for copies inside the device: CUDA does not make the host wait, nor the stream that runs the graphs."""
        view(self._room.blocks[0], self._memory.device, 0, [1]).numpy()


def _run_options(graph: OrtGraph, graph_id: int | None) -> Any:
    if graph_id is None:
        return graph.run_options
    options = onnxruntime_module().RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options


def _release_graphs(room: _Room) -> None:
    """Let ONNX Runtime forget the CUDA graphs over memory that is given back, where it can."""
    for graph, bindings in room.bound.items():
        release = getattr(graph.session, "release_captured_graph", None)
        for bound in bindings.values():
            if release is not None and bound.graph_id is not None:
                release(bound.graph_id)
