"""What the sampling kernels mean, in numpy: float32 scores and weights, sums of weights as integers.

A block's share of the work does not show here: the kernels' sums are the same in any order.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rwkv_edge.plugins.sampling import (
    CUT,
    NO_TOKEN,
    NONE_LEFT,
    NOT_A_NUMBER,
    SEEN,
    SETTINGS,
    SPARED,
    SPARED_GENERATED,
    UNTOUCHED,
)

ONE, REST = 0x3F800000, 19
NONE = 2**64 - 1


class Memory:
    """A kernel's pointers in order."""

    def __init__(self, arguments: Any) -> None:
        self.a = arguments
        self.batch = arguments.macros["grid"][1]

    def next(self, dtype: Any, *shape: int) -> np.ndarray:
        """The next argument, [B, …], as it lies in memory."""
        kind = np.dtype(dtype)
        shape = (self.batch, *shape)
        return self.at(self.a.pointers.pop(0), kind, shape)

    def at(self, pointer: int, kind: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        return self.a.driver.memory(pointer, math.prod(shape) * kind.itemsize).view(kind).reshape(shape)

    def skip(self) -> int:
        return self.a.pointers.pop(0)

    def stops(self) -> set[int]:
        pointer = self.skip()
        count = int(self.at(pointer, np.dtype(np.int32), (1,))[0])
        return set(self.at(pointer, np.dtype(np.int32), (1 + count,))[1:].tolist())


class Ends:
    """Where tokens go; the last arguments of a kernel."""

    def __init__(self, memory: Memory, stops: set[int]) -> None:
        self.memory, self.stops = memory, stops
        memory.skip()  # blocks that have arrived
        self.tokens = memory.next(np.int32)
        self.history = memory.skip()
        self.turns, self.accepted, self.halted = (memory.next(t) for t in (np.uint32, np.int32, np.int32))

    def give(self, b: int, drawn: int) -> None:
        a = self.memory.a
        place = int(self.turns[b]) % a.RING * a.STREAMS + b
        self.memory.at(self.history + 4 * place, np.dtype(np.int32), (1,))[0] = drawn
        self.turns[b] += 1
        if drawn == NO_TOKEN:
            return
        if drawn < 0 or drawn in self.stops:
            self.halted[b] = 1
        if drawn >= 0:
            self.tokens[b], self.accepted[b] = drawn, 0


def scores(a: Any) -> None:
    memory = Memory(a)
    logits, settings = memory.next(np.float32, a.VOCABULARY), memory.next(SETTINGS)
    bias = memory.next(np.float32, a.VOCABULARY) if a.BIAS else memory.skip()
    counts = memory.next(np.float64, a.VOCABULARY) if a.PENALTIES else memory.skip()
    stops = memory.stops()
    given = memory.skip() if a.GREEDY else memory.next(np.float32, a.VOCABULARY)
    tops, tops_at = (memory.next(t, len(range(0, a.VOCABULARY, a.SLICE))) for t in (np.float32, np.int32))
    ends = Ends(memory, stops)
    a.done()
    for b in range(memory.batch):
        if ends.halted[b]:
            if a.GREEDY:
                ends.give(b, NO_TOKEN)
            continue
        x = logits[b].copy()
        if a.BIAS:
            x += bias[b]
        if a.PENALTIES:
            if not ends.accepted[b]:
                count(counts[b], settings[b]["decay"], int(ends.tokens[b]))
            x = penalized(x, counts[b], settings[b])
        if not a.GREEDY:
            given[b] = x
        x = np.where(np.isnan(x), np.float32(np.inf), x)
        for i, start in enumerate(range(0, a.VOCABULARY, a.SLICE)):
            part = x[start : start + a.SLICE]
            tops_at[b, i] = start + part.argmax()
            tops[b, i] = x[tops_at[b, i]]
        if a.GREEDY:
            best = int(x.argmax())
            wrong = NOT_A_NUMBER if x[best] > 0 else NONE_LEFT
            ends.give(b, best if np.isfinite(x[best]) else wrong)


def count(counts: np.ndarray, decay: float, token: int) -> None:
    """Let the history [V] have a token more."""
    counted = counts >= 0
    counts[counted] *= decay
    if counted[token]:
        counts[token] += 1
    else:
        counts[token] = 1 if counts[token] >= SEEN else SPARED_GENERATED


def penalized(x: np.ndarray, counts: np.ndarray, how: np.void) -> np.ndarray:
    generated = (counts >= 0) | (counts == SPARED_GENERATED)
    seen = (counts != UNTOUCHED) & (counts != SPARED)
    if how["repetition"] != 1:
        x = np.where(seen, np.where(x > 0, x / how["repetition"], x * how["repetition"]), x)
    penalty = how["presence"] + np.maximum(counts, 0) * how["frequency"]
    return np.where(generated, x - penalty.astype(np.float32), x)


def below(x: np.ndarray, peak: np.float32) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # of infinities: whoever draws finds out
        return x - peak


def bits_of(x: np.ndarray) -> np.ndarray:
    """Of the weights of scores below the peak."""
    return np.minimum(np.exp(x).view(np.uint32), ONE)


def fixed(units: int, exponent: int) -> int:
    return units << exponent - 104 if exponent >= 104 else units >> 104 - exponent


def masses_of(bits: np.ndarray) -> list[int]:
    """In units of 2⁻⁴⁶, as Python's integers."""
    return [fixed(b & 0x7FFFFF | 0x800000, b >> 23) for b in bits.tolist()]


def share(total: int, part: int) -> int:
    return -(-total * part >> 63)


def bin_masses(bits: np.ndarray) -> dict[int, int]:
    """The mass of each bin; cut off once, below the sum."""
    found: dict[int, int] = {}
    for b in bits.tolist():
        found[b >> REST] = found.get(b >> REST, 0) + (b & 0x7FFFFF | 0x800000)
    return {at: fixed(units, at >> 4) for at, units in found.items()}


def cut(a: Any) -> None:
    memory = Memory(a)
    scored, tops, settings = (
        memory.next(np.float32, a.VOCABULARY),
        memory.next(np.float32, a.COUNT),
        memory.next(SETTINGS),
    )
    halted, histogram = memory.next(np.int32), memory.next(np.uint64, 2048)
    memory.skip()
    cuts = memory.next(CUT)
    a.done()
    assert not histogram.any()
    for b in range(memory.batch):
        if halted[b]:
            continue
        bits = bits_of(below(scored[b], tops[b].max()))
        masses = bin_masses(bits)
        how, counts = settings[b], np.bincount(bits >> REST, minlength=2048)
        wanted = int(how["top_k"]) if 0 < how["top_k"] < a.VOCABULARY else 2**32 - 1
        target = share(sum(masses.values()), int(how["top_p"])) if how["top_p"] < 1 << 63 else NONE
        above = mass = 0
        found = -1
        for at in sorted(masses, reverse=True):
            if wanted == 2**32 - 1 and target == NONE:
                break
            if above + counts[at] >= wanted or mass + masses[at] >= target:
                found = at
                break
            above, mass = above + int(counts[at]), mass + masses[at]
        cuts[b] = (mass, target, wanted, above, found, 0)


def limit(found: np.void, bits: np.ndarray) -> tuple[int, int]:
    """The smallest weight that passes, and the last token of those with just that weight."""
    inside = np.sort(bits[bits >> REST == found["bin"]])[::-1].tolist()
    count, units = int(found["above"]), 0
    for at, b in enumerate(inside):
        count, units = count + 1, units + (b & 0x7FFFFF | 0x800000)
        if at + 1 < len(inside) and inside[at + 1] == b:
            continue
        if count >= found["wanted"] or int(found["mass"]) + fixed(units, b >> 23) >= found["target"]:
            break
    equal = np.flatnonzero(bits == b)
    room = int(found["wanted"]) - (count - len(equal))
    return b, int(equal[min(room, len(equal)) - 1])


def draw(a: Any) -> None:
    memory = Memory(a)
    scored, tops = memory.next(np.float32, a.VOCABULARY), memory.next(np.float32, a.COUNT)
    tops_at = memory.next(np.int32, a.COUNT)
    settings, fractions = memory.next(SETTINGS), memory.skip()
    cuts = memory.next(CUT) if a.CUT else memory.skip()
    stops = memory.stops()
    for _ in range(4):
        memory.skip()
    ends = Ends(memory, stops)
    a.done()
    for b in range(memory.batch):
        if ends.halted[b]:
            ends.give(b, NO_TOKEN)
            continue
        place = int(ends.turns[b]) % a.RING * a.STREAMS + b
        fraction = int(memory.at(fractions + 8 * place, np.dtype(np.uint64), (1,))[0])
        ends.give(b, drawn(scored[b], tops[b], tops_at[b], settings[b], cuts[b] if a.CUT else None, fraction))


def drawn(
    x: np.ndarray, tops: np.ndarray, tops_at: np.ndarray, how: np.void, found: np.void | None, fraction: int
) -> int:
    peak = tops.max()
    if not (x <= peak).all() or peak == np.inf:
        return NOT_A_NUMBER
    if peak == -np.inf:
        return NONE_LEFT
    if how["temperature"] == 0:
        return int(tops_at[tops == peak].min())
    bits = bits_of(x - peak)
    passes = bits.view(np.float32) >= how["min_p"]
    if found is not None and found["bin"] >= 0:
        least, last = limit(found, bits)
        passes &= (bits > least) | ((bits == least) & (np.arange(len(x)) <= last))
    raised = bits if how["temperature"] == 1 else bits_of((x - peak) / how["temperature"])
    ids = np.flatnonzero(passes)
    masses = masses_of(raised[ids])
    left = share(sum(masses), fraction)
    for token, mass in zip(ids.tolist(), masses, strict=True):
        left -= mass
        if left <= 0:
            return token
    raise AssertionError("the sum is not reached")


KERNELS = {"sample_scores.cu": scores, "sample_cut.cu": cut, "sample_draw.cu": draw}
