"""A GPU made of numpy: the fused kernels' meaning, run on memory that is addressed as the device's is.

It proves everything around the kernels: which buffers each one is given, the order, states, graphs, the session. What
the CUDA text computes is proved on a GPU.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import cuda_sampling_double
import cuda_wide_double
import numpy as np

from rwkv_edge.errors import SessionError
from rwkv_edge.plugins.fused_spec import FusedKernel, rounded_up
from rwkv_edge.plugins.wide import EVERY_GRID
from rwkv_edge.spec import float32_from_stored, numpy_dtype, stored_from_float32

DTYPES = {"Float": "float32", "Half": "float16", "Brain": "bfloat16"}


def described(kernel: FusedKernel, capability: int) -> str:
    """What stands for PTX here."""
    return json.dumps({"source": kernel.source, "grid": kernel.grid, **dict(kernel.defines)})


class Driver:
    """See `rwkv_edge.runtime.cuda_driver.Driver`."""

    capability, name, block_shared, multiprocessors = 90, "numpy", 99 << 10, 8
    streams: ClassVar[dict[int, Driver]] = {}  # handle → whose stream it is; for libraries that enqueue on one

    def __init__(self, ordinal: int = 0, memory: int = 1 << 34) -> None:
        self._blocks: dict[int, np.ndarray] = {}
        self._pinned: dict[int, np.ndarray] = {}
        self._end, self._left = 4096, memory
        self.recording: list[Callable[[], None]] | None = None
        self.launches = 0
        self.stream = 7000 + len(self.streams)
        self.streams[self.stream] = self

    def allocate(self, nbytes: int) -> int:
        nbytes = max(nbytes, 16)
        if nbytes > self._left:
            raise SessionError("out of memory")
        pointer = self._end
        self._blocks[pointer] = np.zeros(nbytes, np.uint8)
        self._end += -(-nbytes // 256) * 256 + 256
        self._left -= nbytes
        return pointer

    def free(self, *pointers: int) -> None:
        for pointer in pointers:
            block = self._blocks.pop(pointer, None)
            self._left += 0 if block is None else block.nbytes

    def free_memory(self) -> int:
        return self._left

    def memory(self, pointer: int, nbytes: int) -> np.ndarray:
        """A view; what lies outside an allocation is an error, as compute-sanitizer would say."""
        blocks = self._blocks if pointer < self._end else self._pinned  # the device reaches both
        starts = sorted(blocks)
        start = starts[bisect.bisect_right(starts, pointer) - 1]
        assert start <= pointer, "an address that was never allocated"
        assert pointer + nbytes <= start + blocks[start].nbytes, "out of bounds"
        return blocks[start][pointer - start : pointer - start + nbytes]

    def view(self, pointer: int, shape: Sequence[int], dtype: str = "float32") -> np.ndarray:
        found = numpy_dtype(dtype)
        return self.memory(pointer, math.prod(shape) * found.itemsize).view(found).reshape(shape)

    def upload(self, array: np.ndarray, to: int) -> None:
        assert self.recording is None
        self.memory(to, array.nbytes)[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)

    upload_file = upload

    def download(self, pointer: int, array: np.ndarray) -> None:
        array.view(np.uint8).reshape(-1)[:] = self.memory(pointer, array.nbytes)

    def pinned(self, nbytes: int) -> np.ndarray:
        array = np.zeros(nbytes, np.uint8)
        self._pinned[array.ctypes.data] = array
        return array

    def free_pinned(self, *arrays: np.ndarray) -> None:
        for array in arrays:
            self._pinned.pop(array.ctypes.data, None)

    def enqueue_upload(self, array: np.ndarray, to: int) -> None:
        assert self.is_pinned(array)
        self._do(lambda: np.copyto(self.memory(to, array.nbytes), array.reshape(-1).view(np.uint8)), count=0)

    def enqueue_download(self, pointer: int, array: np.ndarray) -> None:
        assert self.is_pinned(array)
        self._do(lambda: np.copyto(array.reshape(-1).view(np.uint8), self.memory(pointer, array.nbytes)), count=0)

    def is_pinned(self, array: np.ndarray) -> bool:
        start = array.ctypes.data
        return array.flags.c_contiguous and any(
            at <= start and start + array.nbytes <= at + block.nbytes for at, block in self._pinned.items()
        )

    def copy(self, to: int, source: int, nbytes: int) -> None:
        self._do(lambda: np.copyto(self.memory(to, nbytes), self.memory(source, nbytes)))

    def synchronize(self) -> None: ...

    def event(self) -> Event:
        return Event()

    def function(self, ptx: str, name: str, shared: int = 0) -> dict[str, Any]:
        return json.loads(ptx)

    def launch(
        self,
        function: dict[str, Any],
        grid: Sequence[int],
        threads: int,
        shared: int,
        pointers: Sequence[int],
        early: bool,
    ) -> None:
        assert function["grid"] in (list(grid), list(EVERY_GRID))
        run = KERNELS[function["source"]]
        self._do(lambda: run(Arguments(self, {**function, "grid": list(grid)}, list(pointers))))

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        graph = Graph()
        self.recording = graph.work
        try:
            yield graph
        finally:
            self.recording = None

    def elapsed_ms(self, work: Callable[[], None]) -> float:
        work()
        return 1.0

    def close(self) -> None:
        self._blocks.clear()
        self._pinned.clear()

    def enqueue(self, work: Callable[[], None]) -> None:
        """What a library puts on the stream."""
        self._do(work)

    def _do(self, work: Callable[[], None], count: int = 1) -> None:
        if self.recording is None:
            self.launches += count
            work()
        else:
            self.recording.append(work)


class Event:
    """What ran by now: everything."""

    def __init__(self) -> None:
        self.recorded = False

    def record(self) -> None:
        self.recorded = True

    def wait(self) -> None:
        assert self.recorded, "nothing would end this wait"

    def close(self) -> None: ...


class Graph:
    """What was recorded."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def launch(self) -> None:
        for work in self.work:
            work()

    def close(self) -> None:
        self.work = []


class Arguments:
    """A kernel's pointers in order, read and written as arrays of the dimensions that it was compiled for."""

    def __init__(self, driver: Driver, macros: dict[str, Any], pointers: list[int]) -> None:
        self.driver, self.macros, self.pointers = driver, macros, pointers
        self.act = DTYPES[macros["ACT"]]

    def __getattr__(self, name: str) -> int:
        return int(self.macros[name])

    def take(self, *shape: int, dtype: str = "float32") -> np.ndarray:
        """The next argument's values as float32 (integers as they are)."""
        stored = self.driver.view(self.pointers.pop(0), shape, dtype)
        return stored.copy() if dtype == "int32" else float32_from_stored(stored.copy(), dtype)

    def matrices(self, *shapes: tuple[int, int], bit: int = 0) -> list[np.ndarray]:
        """The next arguments are matrices, the first of them the kernel's ``bit``-th; then come their scales."""
        pointers, scales = self.pointers[: len(shapes)], self.pointers[len(shapes) : 2 * len(shapes)]
        rest = self.pointers[2 * len(shapes) :]
        found = []
        for at, (shape, matrix, scale) in enumerate(zip(shapes, pointers, scales, strict=True), bit):
            if self.INT8 >> at & 1:
                self.pointers = [matrix, scale]
                integers = self.driver.view(self.pointers.pop(0), shape, "int8").astype(np.float32)
                found.append(integers * self.take(shape[1], dtype=self.act))
            elif self.INT4 >> at & 1:
                self.pointers = [matrix, scale]
                found.append(self.int4(shape))
            else:
                self.pointers = [matrix]
                found.append(self.take(*shape, dtype=DTYPES[self.macros["WEIGHT"]]))
        self.pointers = rest
        return found

    def int4(self, shape: tuple[int, int]) -> np.ndarray:
        """Two columns a byte, the first in the low half; a scale for BLOCK rows."""
        rows, columns = shape
        pairs = self.driver.view(self.pointers.pop(0), (rows, columns // 2), "uint8")
        nibbles = np.stack([pairs & 15, pairs >> 4], -1).reshape(rows, columns)
        signed = (nibbles ^ 8).astype(np.float32) - 8
        return signed * np.repeat(self.take(rows // self.BLOCK, columns, dtype=self.act), self.BLOCK, 0)

    def halted(self, batch: int) -> np.ndarray:
        """Whether each stream stays as it is."""
        return self.take(batch, dtype="int32") != 0 if self.HALT else np.zeros(batch, bool)

    def weight(self, *shape: int) -> np.ndarray:
        """A matrix that is never int8."""
        return self.take(*shape, dtype=DTYPES[self.macros["WEIGHT"]])

    def give(self, value: np.ndarray, dtype: str = "float32") -> None:
        stored = value.astype(np.int32) if dtype == "int32" else stored_from_float32(value.astype(np.float32), dtype)
        self.driver.view(self.pointers.pop(0), value.shape, dtype)[...] = stored

    def done(self) -> None:
        assert not self.pointers, "arguments are left over"


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def normed(x: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def residual(a: Arguments) -> np.ndarray:
    stream, parts = a.take(a.BATCH, a.WIDTH), a.take(a.PARTS, a.BATCH, a.WIDTH)
    return (stream + parts.sum(0)) * (0.5 if a.HALVE else 1.0)


def embedded(a: Arguments) -> np.ndarray:
    """Rows of the embedding; in int8 with a scale each."""
    tokens, table, scales = (a.pointers.pop(0) for _ in range(3))
    dtype, item = ("int8", 1) if a.EMBED_INT8 else (a.act, numpy_dtype(a.act).itemsize)
    rows = []
    for t in a.driver.view(tokens, (a.BATCH,), "int32"):
        row = a.driver.view(table + int(t) * a.WIDTH * item, (a.WIDTH,), dtype)
        if a.EMBED_INT8:
            scale = a.driver.view(scales + int(t) * numpy_dtype(a.act).itemsize, (1,), a.act)
            rows.append(row.astype(np.float32) * float32_from_stored(scale.copy(), a.act))
        else:
            rows.append(float32_from_stored(row.copy(), a.act))
    return np.stack(rows)


def shifted(a: Arguments, xn: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The new token-shift state: that of a halted stream is the old one."""
    return np.where(a.halted(a.BATCH)[:, None], before, xn)


def time_mix_in(a: Arguments) -> None:
    ranks = [a.RANK_W, a.RANK_A, a.RANK_G, *([a.RANK_V] if a.RANK_V else [])]
    x = embedded(a) if a.EMBED else residual(a)
    before = a.take(a.BATCH, a.WIDTH, dtype=a.act)
    weight, bias = (a.take(a.WIDTH, dtype=a.act) for _ in range(2))
    mix = a.take(6, a.WIDTH, dtype=a.act)
    matrices = a.matrices(*((a.WIDTH, n) for n in [a.INNER] * 3 + ranks))
    xn = normed(x, 1e-5) * weight + bias
    r, w, k, v, rate, g = (xn + (before - xn) * m for m in mix)
    found = [y @ m for y, m in zip([r, k, v, w, rate, g, v], matrices, strict=False)]
    found[3], found[5] = np.tanh(found[3]), sigmoid(found[5])
    after = shifted(a, xn, before)
    a.give(x)
    a.give(after, a.act)
    for value in found:
        a.give(value)
    a.done()


def wkv(a: Arguments) -> None:
    batch, heads = a.macros["grid"][1], a.INNER // a.HEAD
    r, k, v = (a.take(batch, heads, a.HEAD) for _ in range(3))
    ranks = [a.RANK_W, a.RANK_A, a.RANK_G, *([a.RANK_V] if a.RANK_V else [])]
    hidden = [a.take(batch, n) for n in ranks]
    first = a.take(batch, heads, a.HEAD) if a.RANK_V else None
    seconds = [a.weight(ranks[0], a.INNER), a.weight(ranks[1], a.INNER), *a.matrices((ranks[2], a.INNER))]
    seconds += [a.weight(a.RANK_V, a.INNER)] if a.RANK_V else []
    halves = [(h @ second).reshape(r.shape) for h, second in zip(hidden, seconds, strict=True)]
    shape = heads, a.HEAD
    decay = np.exp(-0.6065306597126334 * sigmoid(halves[0] + a.take(*shape)))
    rate = sigmoid(halves[1] + a.take(*shape, dtype=a.act))
    if first is not None:
        v = v + (first - v) * sigmoid(halves[3] + a.take(*shape, dtype=a.act))
    k_k, k_a, r_k, weight, bias = (a.take(*shape) for _ in range(5))
    state = old = a.take(batch, heads, a.HEAD, a.HEAD)
    outputs = a.matrices((a.INNER, a.WIDTH), bit=1) if a.OUT else []
    halted = a.halted(batch)
    kk = k * k_k
    kk /= np.maximum(np.linalg.norm(kk, axis=-1, keepdims=True), 1e-12)
    k = k * ((rate - 1) * k_a + 1)
    removed = np.einsum("bhij,bhj->bhi", state, kk)
    state = state * decay[:, :, None] - removed[..., None] * (kk * rate)[:, :, None] + v[..., None] * k[:, :, None]
    y = normed(np.einsum("bhij,bhj->bhi", state, r), 64e-5) * weight + bias
    y = (y + (r * k * r_k).sum(-1, keepdims=True) * v) * halves[2]
    if outputs:  # a partial sum for each head
        y = np.einsum("bhi,hij->hbj", y, outputs[0].reshape(heads, a.HEAD, a.WIDTH))
    a.give(y)
    a.give(np.where(halted[:, None, None, None], old, state))
    a.done()


def project(a: Arguments) -> None:
    x, (matrix,) = a.take(a.BATCH, a.FROM), a.matrices((a.FROM, a.WIDTH))
    size = rounded_up(-(-a.FROM // a.SPLIT), a.BLOCK)
    shares = a.take(a.BATCH, a.WIDTH) if a.FACTOR else 1.0
    slices = [slice(i * size, (i + 1) * size) for i in range(a.SPLIT)]
    a.give(np.stack([x[:, rows] @ matrix[rows] * shares for rows in slices]))
    a.done()


def channel_mix_in(a: Arguments) -> None:
    x = residual(a)
    before = a.take(a.BATCH, a.WIDTH, dtype=a.act)
    weight, bias = (a.take(a.WIDTH, dtype=a.act) for _ in range(2))
    mix, (key,) = a.take(a.WIDTH, dtype=a.act), a.matrices((a.WIDTH, a.HIDDEN))
    xn = normed(x, 1e-5) * weight + bias
    after = shifted(a, xn, before)
    a.give(x)
    a.give(after, a.act)
    a.give(np.maximum((xn + (before - xn) * mix) @ key, 0) ** 2)
    a.done()


def head(a: Arguments) -> None:
    x = residual(a)
    weight, bias = (a.take(a.WIDTH, dtype=a.act) for _ in range(2))
    logits = (normed(x, 1e-5) * weight + bias) @ a.matrices((a.WIDTH, a.HEAD_COLUMNS))[0][:, : a.VOCABULARY]
    a.give(logits)
    blocks = [logits[:, i : i + a.TILE] for i in range(0, a.VOCABULARY, a.TILE)]
    a.give(np.stack([b.max(1) for b in blocks], 1))
    a.give(np.stack([b.argmax(1) + i * a.TILE for i, b in enumerate(blocks)], 1), "int32")
    a.done()


def argmax(a: Arguments) -> None:
    batch = a.macros["grid"][0]
    best, at = a.take(batch, a.COUNT), a.take(batch, a.COUNT, dtype="int32")
    a.give(at[np.arange(batch), best.argmax(1)], "int32")
    a.done()


KERNELS: dict[str, Callable[[Arguments], None]] = {
    **cuda_sampling_double.KERNELS,
    **cuda_wide_double.KERNELS,
    "v7_time_mix_in.cu": time_mix_in,
    "v7_wkv.cu": wkv,
    "v7_project.cu": project,
    "v7_channel_mix_in.cu": channel_mix_in,
    "head.cu": head,
    "argmax.cu": argmax,
}
