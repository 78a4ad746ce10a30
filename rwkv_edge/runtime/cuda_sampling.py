"""Tokens drawn on the GPU: what a state needs in device memory, and the launches that end its steps.

The host draws the random numbers, from the generator of each `Sampler`, and uploads them some steps ahead; the device
uses the next one for every token. So a seed means the same here and on the host, but for rounding: the host sums
weights in float64, the device in fixed point with units of 2⁻⁴⁶ of the largest, and the last bits of exp may differ. A
token can differ where a random number, or a limit of top-p, falls that close to the edge of a token, which is rare: of
many thousands, none does in the tests.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rwkv_edge.errors import InputError, SessionError
from rwkv_edge.plugins import sampling as kernels
from rwkv_edge.plugins.sampling import NO_TOKEN, RING, Features, SamplingKernels, slices
from rwkv_edge.runtime.cuda_chain import Outputs
from rwkv_edge.runtime.cuda_driver import Driver, Event
from rwkv_edge.runtime.cuda_launch import Launch
from rwkv_edge.runtime.sampling import NONE_LEFT, NOT_FINITE, Past, Sampler, SamplerConfig

LEAST_STOPS = 15  # stop tokens that there is room for from the beginning


def draws_on_device(vocabulary: int) -> bool:
    """Whether the kernels draw from vocabularies of this size."""
    return vocabulary % 4 == 0 and vocabulary <= kernels.MAX_VOCABULARY


def features_of(configs: Iterable[SamplerConfig], vocabulary: int) -> Features:
    """What the kernels have to do for streams with these settings."""
    every = tuple(configs)
    drawing = [c for c in every if c.temperature > 0]
    return Features(
        greedy=not drawing,
        cut=any(0 < c.top_k < vocabulary or c.top_p < 1 for c in drawing),
        penalties=any(c.presence_penalty or c.frequency_penalty or c.repetition_penalty != 1 for c in every),
        bias=any(c.logit_bias for c in every),
    )


def settings_of(configs: Sequence[SamplerConfig]) -> np.ndarray:
    """Settings [S] of `rwkv_edge.plugins.sampling.SETTINGS`."""
    found = np.zeros(len(configs), kernels.SETTINGS)
    for row, config in zip(found, configs, strict=True):
        share = kernels.WHOLE if config.top_p == 1 else max(1, int(float(config.top_p) * 2.0**63))
        row["top_p"], row["top_k"], row["min_p"] = share, min(config.top_k, kernels.MAX_VOCABULARY), config.min_p
        row["presence"], row["frequency"] = config.presence_penalty, config.frequency_penalty
        row["decay"], row["repetition"] = config.penalty_decay, config.repetition_penalty
        row["temperature"] = config.temperature if config.temperature == 0 else max(config.temperature, 1e-30)
    return found


def counts_of(past: Past, vocabulary: int) -> np.ndarray:
    """The table of counts [V], float64, that penalties are computed from."""
    table = np.full(vocabulary, kernels.UNTOUCHED)
    table[past.seen] = kernels.SEEN
    spared = past.uncounted
    table[spared] = np.where(table[spared] == kernels.SEEN, kernels.SPARED_SEEN, kernels.SPARED)
    table[past.generated] = past.counts
    generated = np.intersect1d(past.generated, spared)
    table[generated] = kernels.SPARED_GENERATED
    return table


def fractions_of(numbers: np.random.Generator, count: int) -> np.ndarray:
    """The next fractions [count] of a sampler, in (0, 1], as uint64 in units of 2⁻⁶³."""
    return ((1.0 - numbers.random(count)) * 2.0**53).astype(np.uint64) << np.uint64(10)


def checked_token(token: int) -> int:
    """A drawn token.

    Raises:
        SessionError: it stands for scores from which none can be drawn.
    """
    if token == kernels.NOT_A_NUMBER:
        raise SessionError(NOT_FINITE)
    if token == kernels.NONE_LEFT:
        raise SessionError(NONE_LEFT)
    return token


@dataclass(frozen=True)
class DrawKey:
    """What the graph of a step that ends with a draw depends on: the work, and where the stop tokens lie."""

    features: Features
    stops: int


class Draws:
    """Device memory with which the tokens of a state's streams are drawn.

    Attributes:
        features: of the samplers that were loaded.
        turn: steps enqueued so far; every one takes a place of the rings.
    """

    def __init__(self, driver: Driver, batch: int, vocabulary: int) -> None:
        """Allocate what all samplers need.

        Args:
            driver: the GPU.
            batch: streams of the state.
            vocabulary: V.

        Raises:
            SessionError: the kernels do not draw from such a vocabulary.
        """
        if not draws_on_device(vocabulary):
            raise SessionError(
                "the GPU draws from vocabularies of a multiple of 4 up to "
                f"{kernels.MAX_VOCABULARY}, not {vocabulary}; use Sampler on the logits of `step`"
            )
        self._driver, self._batch, self._vocabulary = driver, batch, vocabulary
        self.turn = 0
        self.features = Features(greedy=True, cut=False, penalties=False, bias=False)
        self._numbers: list[np.random.Generator] = []
        self._address: dict[str, int] = {}
        blocks = slices(vocabulary)
        self._row_bytes = {
            "settings": kernels.SETTINGS.itemsize, "turns": 4, "accepted": 4, "tops": 4 * blocks,
            "tops_at": 4 * blocks, "arrived": 4, "histogram": 8 * kernels.BINS, "cuts": kernels.CUT.itemsize,
            "masses": 8 * blocks, "list": 8 * vocabulary, "list_count": 4, "faults": 4, "scores": 4 * vocabulary,
            "bias": 4 * vocabulary, "counts": 8 * vocabulary, "fractions": 8, "history": 4, "stops": 0,
        }  # fmt: skip
        self._pinned = [driver.pinned(8 * RING * batch), driver.pinned(4 * RING * batch)]
        self._fractions = self._pinned[0].view(np.uint64).reshape(RING, batch)
        self._history = self._pinned[1].view(np.int32).reshape(RING, batch)
        self._events = [driver.event() for _ in range(RING)]
        self._stops_room = LEAST_STOPS
        weakref.finalize(self, _release, driver, self._address, self._events, self._pinned)
        for name in ("settings", "turns", "accepted", "tops", "tops_at", "arrived", "faults"):
            self._room(name)
        self._address["fractions"] = driver.allocate(8 * RING * batch)
        self._address["stops"] = driver.allocate(4 * (1 + LEAST_STOPS))

    @property
    def key(self) -> DrawKey:
        """Of the graph of a step with the samplers that were loaded."""
        return DrawKey(self.features, self._address["stops"])

    def load(self, samplers: Sequence[Sampler], stop_tokens: Collection[int]) -> None:
        """Take over from samplers, one for each stream: settings, history, random numbers.

        Raises:
            InputError: a token of a bias or history is outside the vocabulary.
        """
        pasts = [sampler.past(self._vocabulary) for sampler in samplers]
        configs = [sampler.config for sampler in samplers]
        self.features = features_of(configs, self._vocabulary)
        self._numbers = [sampler.numbers() for sampler in samplers]
        self._upload("settings", settings_of(configs))
        if not self.features.greedy:
            for name in ("histogram", "cuts", "masses", "list", "list_count"):
                self._room(name)
        if self.features.adjust:
            self._room("scores")
        if self.features.bias:
            table = np.zeros((self._batch, self._vocabulary), np.float32)
            for row, config in zip(table, configs, strict=True):
                row[list(config.logit_bias)] = list(config.logit_bias.values())
            self._upload("bias", table)
        if self.features.penalties:
            self._upload("counts", np.stack([counts_of(past, self._vocabulary) for past in pasts]))
        self._upload("accepted", np.ones(self._batch, np.int32))
        self._upload_stops(stop_tokens)

    def enqueue(self, count: int, step: Callable[[], None]) -> range:
        """Enqueue so many steps, at most a ring's; returns their turns."""
        turns = range(self.turn, self.turn + count)
        self._upload_fractions(turns)
        for turn in turns:
            step()
            self.turn = turn + 1
            self._events[turn % RING].record()
        return turns

    def tokens(self, turn: int) -> np.ndarray:
        """What the step of a turn drew [S] int32, once it has; `NO_TOKEN` and below: see `plugins.sampling`."""
        self._events[turn % RING].wait()
        drawn: np.ndarray = self._history[turn % RING].copy()
        return drawn

    def launches(self, row: int, batch: int, head: Launch, outputs: Outputs) -> list[Launch]:
        """The kernels that draw for streams from ``row`` on, after the ``head`` that gave their logits."""
        given = dict(zip(head.kernel.outputs, head.pointers[len(head.kernel.inputs) :], strict=True))
        tops = head.grid[0] if "best" in given else 0
        chosen = SamplingKernels(self._vocabulary, batch, self._batch, self.features, tops)
        if not chosen.features.greedy and chosen.own_scores:
            self._room("scores")
        places = {name: at + row * self._row_bytes[name] for name, at in self._address.items()}
        places |= {"logits": outputs.logits, "tokens": outputs.tokens, "halted": outputs.halted}
        places["history"] = self._history.ctypes.data + 4 * row
        if not chosen.own_scores:
            places |= {"tops": given["best"], "tops_at": given["best_at"]}
        unused = outputs.logits  # for arguments that the kernel was compiled not to touch
        return [
            Launch(k, tuple(places.get(name, unused) for name in (*k.inputs, *k.outputs)), k.grid) for k in chosen.all()
        ]

    def _room(self, name: str) -> None:
        """Memory of this name, zeros where it is new."""
        if name not in self._address:
            self._address[name] = self._driver.allocate(self._batch * self._row_bytes[name])

    def _upload(self, name: str, values: np.ndarray) -> None:
        self._room(name)
        self._driver.upload(values, self._address[name])

    def _upload_stops(self, stop_tokens: Collection[int]) -> None:
        listed = np.array([len(stop_tokens), *sorted(stop_tokens)], np.int32)
        if len(stop_tokens) > self._stops_room:
            self._driver.free(self._address.pop("stops"))
            self._address["stops"], self._stops_room = self._driver.allocate(listed.nbytes), len(stop_tokens)
        self._driver.upload(listed, self._address["stops"])

    def _upload_fractions(self, turns: range) -> None:
        """The random numbers of these steps, enqueued from pinned memory: rows that the device has used long ago."""
        if self.features.greedy:
            return
        columns = [fractions_of(numbers, len(turns)) for numbers in self._numbers]
        places = np.arange(turns.start, turns.stop) % RING
        self._fractions[places] = np.stack(columns, 1)
        wrap = len(turns) if places[0] <= places[-1] else RING - int(places[0])
        for part in (places[:wrap], places[wrap:]):
            if len(part):
                rows = self._fractions[part[0] : part[-1] + 1]
                self._driver.enqueue_upload(rows, self._address["fractions"] + 8 * self._batch * int(part[0]))


def _release(
    driver: Driver,
    address: dict[str, int],
    events: Sequence[Event],
    pinned: Sequence[np.ndarray],
) -> None:
    """Give back what was allocated."""
    for event in events:
        event.close()
    driver.free(*address.values())
    driver.free_pinned(*pinned)


def checked_samplers(samplers: Sequence[Sampler], batch: int) -> tuple[Sampler, ...]:
    """One sampler for each stream.

    Raises:
        InputError: another number of them, or one that two streams would share.
    """
    found = tuple(samplers)
    if len(found) != batch or len({id(sampler) for sampler in found}) != batch:
        raise InputError(f"each of {batch} streams needs a sampler of its own; found {len(found)}")
    return found


def take_all(drawn: np.ndarray, samplers: Sequence[Sampler]) -> None:
    """Let samplers accept the tokens [S, n] of their streams, up to `NO_TOKEN`.

    Raises:
        SessionError: a stream had scores from which no token can be drawn.
    """
    for row, sampler in zip(drawn.tolist(), samplers, strict=True):
        for token in row:
            if token == NO_TOKEN:
                break
            sampler.take(checked_token(token))
