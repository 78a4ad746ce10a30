"""How the kernels spread a head over threads, as a function of the head size N alone.

A quad is four neighbouring floats of a row of the state, one 16-byte load. The figures were chosen by
benchmarks/wkv_gpu.py on an H100.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FLOAT = 4  # bytes
WARP = 32
BUFFERS = 2  # of shared memory in the sequence kernels: one is filled while the other is read


@dataclass(frozen=True)
class Tuning:
    """Threads of a block, channels that it covers, dynamic shared memory in bytes, further macros."""

    threads: int
    channels: int
    shared_memory: int = 0
    macros: Mapping[str, int] = field(default_factory=dict)


def wkv4_step(head: int) -> Tuning:
    """One thread a channel; the head size has no meaning."""
    return Tuning(128, 128, macros={"SEQUENCE": 0, "CHUNK": 1})


def wkv4_sequence(head: int) -> Tuning:
    """One thread a channel, 16 tokens fetched ahead; small blocks, since there are few threads for many processors."""
    return Tuning(64, 64, macros={"SEQUENCE": 1, "CHUNK": 16})


def wkv7_step(head: int, threads: int = 64, most_rows: int = 2) -> Tuning:
    """A thread has one quad of columns and up to ``most_rows`` rows of the state, all in flight at once."""
    lanes = _lanes(head)
    groups = threads // lanes
    blocks = -(-head // (groups * most_rows))
    rows = -(-head // (groups * blocks))
    return Tuning(threads, groups * rows, macros={"LANES": lanes, "ROWS": rows})


def wkv5_step(head: int) -> Tuning:
    """`wkv6_step` with a decay that is a parameter."""
    return _wkv6_step(head, static_decay=1)


def wkv6_step(head: int) -> Tuning:
    """A block has a whole head, since y sums over rows; a thread one quad of columns and up to 16 rows."""
    return _wkv6_step(head, static_decay=0)


def wkv7_sequence(head: int, threads: int = 0, lanes: int = 0, chunk: int = 0, tile: int = 1) -> Tuning:
    """``lanes`` threads share ``tile`` quads of rows; vectors r, w, k, v, kk, −kk∘a."""
    return _sequence(head, threads, lanes, chunk, tile, vectors=6, macros={})


def wkv5_sequence(head: int, threads: int = 0, lanes: int = 0, chunk: int = 0, tile: int = 1) -> Tuning:
    """`wkv6_sequence` with a decay that is a parameter: vectors r, k, v."""
    return _sequence(head, threads, lanes, chunk, tile, vectors=3, macros={"STATIC_DECAY": 1})


def wkv6_sequence(head: int, threads: int = 0, lanes: int = 0, chunk: int = 0, tile: int = 1) -> Tuning:
    """``lanes`` threads share ``tile`` quads of columns; vectors r, w, k, v."""
    return _sequence(head, threads, lanes, chunk, tile, vectors=4, macros={"STATIC_DECAY": 0})


def _wkv6_step(head: int, static_decay: int) -> Tuning:
    lanes = _lanes(head)
    threads = 128 if head <= 64 else 256
    rows = -(-head // (threads // lanes))
    return Tuning(threads, head, macros={"LANES": lanes, "ROWS": rows, "STATIC_DECAY": static_decay})


def _sequence(
    head: int, threads: int, lanes: int, chunk: int, tile: int, vectors: int, macros: Mapping[str, int]
) -> Tuning:
    """Tiles of 4·tile × (N / lanes): 32 registers of state at N = 64, 64 at most with one tile.

    A zero for ``threads``, ``lanes`` or ``chunk`` (tokens of a buffer) chooses: more lanes mean fewer registers, fewer
    lanes less padding; past N = 64 a block of 128 threads, four to a processor, would spill.
    """
    lanes = lanes or (8 if head > 64 or head % 32 == 0 else 4)
    threads = threads or min(128 if head <= 64 else 64, -(-head * lanes // (4 * WARP)) * WARP)
    chunk = chunk or (8 if head <= 64 else 4)
    width = -(-head // (4 * lanes)) * 4 * lanes
    shared = BUFFERS * chunk * vectors * width * FLOAT
    return Tuning(
        threads, threads // lanes * 4 * tile, shared, {"LANES": lanes, "CHUNK": chunk, "TILE": tile, **macros}
    )


def _lanes(head: int) -> int:
    """Threads that cover a row by quads: a power of two, so that they sum by shuffles."""
    lanes = 1
    while lanes * 4 < head:
        lanes *= 2
    return lanes
