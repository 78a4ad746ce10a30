"""The state of streams in the memory of a GPU, bound to engines in both directions between its two sets.

A run reads one set of state tensors and writes the other. The first run of an engine in a direction is enqueued as it
is, which is its warm-up: TensorRT takes memory and compiles then, which no capture allows. The second run of that
direction is captured into a CUDA graph, and from then on launched with one call.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from rwkv_edge.errors import SessionError
from rwkv_edge.runtime.cuda_driver import Driver, Graph
from rwkv_edge.runtime.trt_graph import TrtGraph
from rwkv_edge.runtime.trt_module import EngineLoader, ExecutionContext
from rwkv_edge.spec import ITEM_SIZE, ModelSpec

ALIGNMENT = 256  # bytes; what TensorRT wants of every address
KEPT_BYTES = 1 << 28  # of rooms that no state uses, kept for the next state


@dataclass(eq=False)
class Machine:
    """What all states of a session share.

    Attributes:
        driver: the GPU.
        loader: the backend.
        spec: of the model.
        captures: runs become CUDA graphs; False once one could not.
    """

    driver: Driver
    loader: EngineLoader
    spec: ModelSpec
    captures: bool = True
    _rooms: weakref.WeakSet[Room] = field(default_factory=weakref.WeakSet)
    _unused: list[Room] = field(default_factory=list)
    _closed: bool = False

    def room(self, batch: int) -> Room:
        """Memory for ``batch`` streams; what a state has left, with its contexts and CUDA graphs, where there is such.

        Raises:
            SessionError: there is not enough memory.
        """
        for room in reversed(self._unused):
            if room.batch == batch:
                self._unused.remove(room)
                return room
        room = Room(self, batch)
        self._rooms.add(room)
        return room

    def leave(self, room: Room) -> None:
        """No state uses this room any more."""
        if self._closed:
            return
        self._unused.append(room)
        while sum(2 * unused.nbytes for unused in self._unused) > KEPT_BYTES:
            self._unused.pop(0).close()

    def free_unused(self) -> None:
        """Give back what is only kept for the next state."""
        while self._unused:
            self._unused.pop().close()

    def close(self) -> None:
        """Give back all rooms, those of states too."""
        self._closed = True
        self._unused.clear()
        for room in tuple(self._rooms):
            room.close()

    def enqueue(self, context: ExecutionContext, file: str) -> None:
        """Put one run on the stream.

        Raises:
            SessionError: TensorRT refuses.
        """
        if not context.execute_async_v3(self.driver.stream):
            raise SessionError(f"{self.loader.words} failed at a run of {file}: {self.loader.reason()}")

    def captured(self, context: ExecutionContext, file: str) -> Graph | None:
        """One run as a CUDA graph, and nothing is run; None if that is impossible, which one warning says."""
        try:
            with self.driver.capture() as graph:
                self.enqueue(context, file)
        except SessionError as error:
            self.captures = False
            # 5: who called step or prefill, above both methods run
            warnings.warn(f"steps run without CUDA graphs, which is slower: {error}", RuntimeWarning, stacklevel=5)
            return None
        return graph


@dataclass(frozen=True)
class Ports:
    """Device addresses of an engine's tokens, logits and candidates, for one number of streams.

    The candidates' parts lie in one block, at the ``offsets`` of their names, in all ``nbytes``. The arrays are pinned
    memory of the host for a step's tokens [B] int64, logits [B, V] float32 and block; empty for chunks.
    """

    tokens: int
    logits: int
    candidates: int
    offsets: dict[str, int]
    nbytes: int
    host_tokens: np.ndarray
    host_logits: np.ndarray
    host_candidates: np.ndarray


@dataclass
class _Bound:
    """An engine bound to one direction; ``graph`` is its CUDA graph, once there is one."""

    context: ExecutionContext
    warm: bool = False
    graph: Graph | None = None


class Room:
    """Two sets of state tensors for ``batch`` streams, and all that is bound to them."""

    def __init__(self, machine: Machine, batch: int) -> None:
        """Raises SessionError where memory is short."""
        self.batch = batch
        self.offsets, self.nbytes = _offsets({t.name: batch * t.nbytes for t in machine.spec.state})
        self._machine = machine
        self._pointers: list[int] = []
        self._pinned: list[np.ndarray] = []
        self.sets = self._allocate(self.nbytes), self._allocate(self.nbytes)
        self._ports: dict[TrtGraph, Ports] = {}
        self._bound: dict[tuple[TrtGraph, int], _Bound] = {}

    def ports(self, graph: TrtGraph) -> Ports:
        """Where a run of this engine finds its tokens and leaves its logits; made once."""
        if graph not in self._ports:
            spec = self._machine.spec
            shapes = graph.candidate_shapes(self.batch)
            offsets, end = _offsets({name: _nbytes(shape, "float32") for name, shape in shapes.items()})
            tokens, logits = graph.tokens_shape(self.batch), graph.logits_shape(self.batch, spec)
            batch = self.batch if graph.entry.kind == "step" else 0
            self._ports[graph] = Ports(
                self._allocate(_nbytes(tokens, "int64")),
                self._allocate(_nbytes(logits, "float32")),
                self._allocate(end) if end else 0,
                offsets,
                end,
                self._host(8 * batch).view(np.int64),
                self._host(4 * batch * spec.vocab_size).view(np.float32).reshape(batch, spec.vocab_size),
                self._host(end if batch else 0),
            )
        return self._ports[graph]

    def run(self, graph: TrtGraph, side: int) -> None:
        """Enqueue a run that reads the set ``side`` and writes the other.

        Raises:
            SessionError: TensorRT fails.
        """
        machine, file = self._machine, graph.entry.file
        if (graph, side) not in self._bound:
            self._bound[graph, side] = _Bound(self._context(graph, side))
        bound = self._bound[graph, side]
        if bound.graph is None and bound.warm and machine.captures:
            with self._kept(side):
                bound.graph = machine.captured(bound.context, file)
        if bound.graph is not None:
            bound.graph.launch()
            return
        machine.enqueue(bound.context, file)
        bound.warm = True

    def close(self) -> None:
        """Give all of it back."""
        for bound in self._bound.values():
            if bound.graph is not None:
                bound.graph.close()
        self._machine.driver.free(*self._pointers)
        self._machine.driver.free_pinned(*self._pinned)
        self._pinned.clear()
        self._bound.clear()  # the contexts: nothing runs any more, for free waits
        self._ports.clear()
        self._pointers.clear()

    @contextlib.contextmanager
    def _kept(self, side: int) -> Iterator[None]:
        """Save the set that a captured run reads, and put it back afterwards.

        A warm-up needs no such guard, since it is the run that was asked for: its result is the new state, and it runs
        once. A capture should run nothing, and its run does not write the set that it reads. But what an engine does
        is not ours: a plugin that works in place, or a library that launches something beside the stream, would
        advance the state unnoticed (as ONNX Runtime #32243 did). One copy within the device, once per engine,
        direction and state, rules that out.
        """
        driver = self._machine.driver
        saved = driver.allocate(self.nbytes)
        try:
            driver.copy(saved, self.sets[side], self.nbytes)
            driver.synchronize()
            yield
            driver.copy(self.sets[side], saved, self.nbytes)
        finally:
            driver.free(saved)

    def _context(self, graph: TrtGraph, side: int) -> ExecutionContext:
        """A context of the engine with all its addresses."""
        context = graph.context(self._machine.loader, self._machine.spec, self.batch)
        ports, before, after = self.ports(graph), self.sets[side], self.sets[1 - side]
        addresses = {graph.input_name: ports.tokens, "logits": ports.logits}
        addresses |= {name: ports.candidates + offset for name, offset in ports.offsets.items()}
        for name, offset in self.offsets.items():
            addresses |= {name: before + offset, f"{name}.out": after + offset}
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                loader = self._machine.loader
                raise SessionError(
                    f"{loader.words} takes no memory for '{name}' of {graph.entry.file}: {loader.reason()}"
                )
        return context

    def _host(self, nbytes: int) -> np.ndarray:
        """Pinned bytes; ordinary ones where there are none."""
        if not nbytes:
            return np.empty(0, np.uint8)
        self._pinned.append(self._machine.driver.pinned(nbytes))
        return self._pinned[-1]

    def _allocate(self, nbytes: int) -> int:
        pointer = self._machine.driver.allocate(nbytes)
        self._pointers.append(pointer)
        return pointer


class TrtState:
    """The memory of ``batch`` streams; when nobody holds it any more, its room is the next state's.

    Attributes:
        batch: number of streams.
        side: of the sets in ``room``, the one that holds the state.
        room: the memory.
        runs: how often it has gone on.
    """

    def __init__(self, machine: Machine, batch: int) -> None:
        """A state whose values are yet to be written."""
        self.batch, self.side, self.runs = batch, 0, 0
        self.room = machine.room(batch)
        weakref.finalize(self, machine.leave, self.room).atexit = False

    def address(self, name: str) -> int:
        """Of a state tensor."""
        return self.room.sets[self.side] + self.room.offsets[name]

    def run(self, graph: TrtGraph) -> None:
        """Enqueue a run of the tokens in the engine's ports; afterwards the other set is the state."""
        self.runs += 1  # before: whatever comes of it, what the run before has left is gone
        self.room.run(graph, self.side)
        self.side = 1 - self.side


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    size = ITEM_SIZE[dtype]
    for n in shape:
        size *= n
    return size


def _offsets(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where tensors of so many bytes lie one after another, and how many bytes they take together."""
    found, end = {}, 0
    for name, nbytes in sizes.items():
        found[name] = end
        end += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return found, end
