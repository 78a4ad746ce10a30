"""From logits to the next token, in numpy.

The order is that of `PIPELINE` in the `rwkv` package: temperature comes last and does not change which tokens are kept.
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rwkv_edge.errors import InputError, SessionError
from rwkv_edge.runtime.candidates import Candidates, decides, kept_places, outside_of

if TYPE_CHECKING:
    from rwkv_edge.tokenizers.base import Tokenizer

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

_LEAST_TEMPERATURE = 1e-30  # float32 cannot hold much less; there the greedy token has all the probability anyway
_MOST = 1e6  # what no logit comes near; keeps float32 from overflowing
_BLOCK = 256  # √65536: the block sums and one block cost the same
_BISECTIONS = 20  # equal weights cannot be told apart, but then the sort is fast
_SORTED_AT_ONCE = 2048  # sorting so many costs less than another bisection of them

NOT_FINITE = (
    "logits must be finite or -inf, but the model gave NaN or +inf; export it in a wider precision (bf16, fp32)"
)
NONE_LEFT = "no token has a finite logit after the bias and the penalties; ban fewer tokens in logit_bias"


@dataclass(frozen=True)
class SamplerConfig:
    """How to sample; the defaults sample from the model's own distribution.

    Attributes:
        temperature: 0 is greedy; above it the kept probabilities are raised to 1/temperature.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens that together reach this probability, in (0, 1]; 1 keeps all.
        min_p: keep tokens with at least this fraction of the largest probability, in [0, 1].
        presence_penalty: subtracted from the logit of each generated token, from 0.
        frequency_penalty: subtracted as often as the token was generated, from 0.
        penalty_decay: factor on those counts after each token, in [0, 1].
        repetition_penalty: divides the positive and multiplies the negative logits of seen tokens; 1 is off.
        logit_bias: token id → added to its logit; -inf bans the token.
        seed: of the random generator, at least 0; None takes one from the operating system.

    Raises:
        InputError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), "from 0 to 1e6", lambda x: 0 <= x <= _MOST)
        for name in ("min_p", "penalty_decay"):
            _check_number(name, getattr(self, name), "from 0 to 1", lambda x: 0 <= x <= 1)
        _check_number("top_p", self.top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
        _check_number("repetition_penalty", self.repetition_penalty, "from 1e-6 to 1e6", lambda x: 1e-6 <= x <= _MOST)
        _check_count("top_k", self.top_k)
        if self.seed is not None:
            _check_count("seed", self.seed)
        for token, bias in self.logit_bias.items():
            _check_count("a token id in logit_bias", token)
            _check_number("logit_bias", bias, "-inf or from -1e6 to 1e6", lambda x: x == -math.inf or abs(x) <= _MOST)


def _check_number(name: str, value: object, expected: str, fits: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not fits(float(value)):
        raise InputError(f"{name} must be {expected}, not {value!r}")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise InputError(f"{name} must be a whole number of at least 0, not {value!r}")


@dataclass(frozen=True, eq=False)
class Past:
    """The tokens that a sampler remembers; what a device needs to go on from there.

    Attributes:
        generated: tokens drawn, each once.
        counts: their decayed counts, float64.
        seen: those and the tokens of prompts.
        uncounted: whose count stays 0.
    """

    generated: Ids
    counts: NDArray[np.float64]
    seen: Ids
    uncounted: Ids


class Sampler:
    """Draws tokens from logits by a `SamplerConfig` and remembers what it drew.

    Each call of `sample` does, in this order:

    1. adds the logit bias;
    2. applies the repetition penalty to every token seen (source: `RepetitionPenaltyLogitsProcessor` of Hugging Face
       transformers), then subtracts ``presence_penalty + count · frequency_penalty`` from every generated token, where
       the counts decay (source: `PIPELINE.generate` of the `rwkv` package);
    3. keeps the tokens that pass top-k, top-p and min-p, each judged on the probabilities of the whole vocabulary at
       temperature 1; on ties top-k keeps the lower ids, top-p all (source: `PIPELINE.sample_logits`);
    4. raises the kept probabilities to 1/temperature and draws.

    At temperature 0 the largest logit after step 2 wins, the lowest id among equals.

    The same seed, logits and calls give the same tokens on one machine and numpy version. ``uncounted`` are tokens
    whose count stays 0: `PIPELINE` so spares spaces and digits the frequency penalty, see `uncounted_tokens`.
    """

    def __init__(self, config: SamplerConfig, uncounted: Collection[int] = ()) -> None:
        self.config = config
        self._uncounted = frozenset(uncounted)
        self._scores = self._weights = np.empty(
            0, np.float32
        )  # [V] buffers: fresh ones cost page faults, 0.4 ms a token
        self._bias_ids = np.array(list(config.logit_bias), np.int64)
        self._bias = np.array(list(config.logit_bias.values()), np.float32)
        self.changes = 0  # counts what `reset`, `observe` and `accept` do, for who draws ahead
        self.reset()

    def reset(self) -> None:
        """Forget all tokens and start the random generator again from the seed."""
        self._rng = np.random.Generator(np.random.PCG64(self.config.seed))
        self._place: dict[int, int] = {}  # generated token → index into the two arrays
        self._generated = np.empty(0, np.int64)
        self._counts = np.empty(0, np.float64)
        self._seen: set[int] = set()
        self._seen_ids: Ids | None = None  # the set as an array, made when needed
        self.changes = self.changes + 1

    def copy(self) -> Sampler:
        """A sampler that continues from here on its own, with the same history and random numbers."""
        return copy.deepcopy(self)

    def observe(self, tokens: Iterable[int]) -> None:
        """Let the repetition penalty count ``tokens``, those of a prompt say, as seen."""
        self._seen.update(int(token) for token in tokens)
        self._seen_ids = None
        self.changes += 1

    def sample(self, logits: np.ndarray) -> int:
        """The next token, which is also accepted into the history.

        ``logits`` is [V], float32; it is not changed.

        Raises:
            InputError: ``logits`` is not [V], or a token of the bias or history is not in [0, V).
            SessionError: the logits hold NaN or +inf, or no finite value is left.
        """
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            scores = self._adjusted(np.asarray(logits, np.float32))
            best = int(scores.argmax())
            peak = scores[best]
            if not np.isfinite(peak):
                raise SessionError(NOT_FINITE if _is_unsound(logits) else NONE_LEFT)
            token = best if self.config.temperature == 0 else self._draw(np.subtract(scores, peak, out=scores))
        self.accept(token)
        return token

    def sample_from(self, candidates: Candidates) -> int:
        """What `sample` draws from all logits, told from the largest where they decide it; else all are fetched.

        Raises:
            InputError, SessionError: as `sample`.
        """
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            usable = candidates.is_sound and decides(self.config, len(candidates.tokens))
            token = self._decided(candidates) if usable else None
        if token is None:
            return self.sample(candidates.full())
        self.accept(token)
        return token

    def accept(self, token: int) -> None:
        """Count ``token`` as generated; `sample` does so itself, call this for tokens chosen elsewhere."""
        self._counts *= self.config.penalty_decay
        if token not in self._place:
            self._place[token] = len(self._place)
            self._generated = np.append(self._generated, token)
            self._counts = np.append(self._counts, 0.0)
        if token not in self._uncounted:
            self._counts[self._place[token]] += 1
        if token not in self._seen:
            self._seen.add(token)
            self._seen_ids = None
        self.changes += 1

    def past(self, vocab_size: int) -> Past:
        """What it remembers, for a device that draws in its place.

        Raises:
            InputError: a token of the bias or history is not in [0, ``vocab_size``).
        """
        seen = np.fromiter(self._seen, np.int64)
        for ids, where in ((self._bias_ids, "logit_bias"), (seen, "the history"), (self._generated, "the history")):
            if len(ids):
                self._check_ids(ids, vocab_size, where)
        uncounted = np.fromiter((token for token in self._uncounted if 0 <= token < vocab_size), np.int64)
        return Past(self._generated.copy(), self._counts.copy(), seen, uncounted)

    def numbers(self) -> np.random.Generator:
        """Its random generator's twin: ``1 - random()`` of it are the fractions of the tokens to come."""
        return copy.deepcopy(self._rng)

    def take(self, token: int) -> None:
        """Accept a token that a device drew with the next of `numbers`."""
        if self.config.temperature != 0:
            self._rng.random()
        self.accept(token)

    def _adjusted(self, logits: Floats) -> Floats:
        """Logits [V] after bias and penalties, in the sampler's buffer."""
        if logits.ndim != 1 or not len(logits):
            raise InputError(f"logits must be one row [V], not of shape {list(logits.shape)}")
        if len(self._scores) != len(logits):
            self._scores, self._weights = np.empty((2, len(logits)), np.float32)
        scores = self._scores
        scores[:] = logits
        self._adjust(scores, len(logits))
        return scores

    def _adjust(self, scores: Floats, vocab_size: int, among: Ids | None = None) -> int:
        """Add bias and penalties to the scores of the tokens ``among``, ascending (None: of all).

        Returns:
            How many adjustments were for other tokens.
        """
        config, others = self.config, 0
        if len(self._bias_ids):
            self._check_ids(self._bias_ids, vocab_size, "logit_bias")
            places, known = _places(self._bias_ids, among)
            scores[places] += self._bias[known]
            others += len(self._bias_ids) - len(places)
        if config.repetition_penalty != 1.0 and self._seen:
            if self._seen_ids is None:
                self._seen_ids = np.fromiter(self._seen, np.int64)
            self._check_ids(self._seen_ids, vocab_size, "the history")
            places, _ = _places(self._seen_ids, among)
            seen = scores[places]
            factor = np.float32(config.repetition_penalty)
            scores[places] = np.where(seen > 0, seen / factor, seen * factor)
            others += len(self._seen_ids) - len(places)
        if (config.presence_penalty or config.frequency_penalty) and len(self._generated):
            self._check_ids(self._generated, vocab_size, "the history")
            penalty = config.presence_penalty + self._counts * config.frequency_penalty
            places, known = _places(self._generated, among)
            scores[places] -= penalty.astype(np.float32)[known]
            others += len(self._generated) - len(places)
        return others

    def _decided(self, candidates: Candidates) -> int | None:
        """The token that `sample` would draw, or None, with nothing drawn, where the candidates leave that open."""
        config = self.config
        ids, raw = candidates.ascending()
        scores = raw.copy()
        others = self._adjust(scores, candidates.vocab_size, ids)
        best = int(scores.argmax())
        peak = scores[best]
        if not np.isfinite(peak) or peak <= raw.min():
            return None
        if config.temperature == 0:
            return int(ids[best])
        outside = outside_of(raw, scores, peak, candidates.norm, others)
        scores -= peak
        weights = np.exp(scores)
        kept = kept_places(weights, outside, candidates.vocab_size, config.top_k, config.top_p, config.min_p)
        return None if kept is None else int(ids[self._drawn_of(scores, weights, kept)])

    def _drawn_of(self, scores: Floats, weights: Floats, kept: NDArray[np.intp] | None) -> int:
        """A place among ``kept`` (all, where None), by scores, whose largest is 0, and weights; both may be changed."""
        if self.config.temperature != 1:
            scores = scores if kept is None else scores[kept]
            scores /= np.float32(max(self.config.temperature, _LEAST_TEMPERATURE))
            weights = np.exp(scores, out=scores)
        elif kept is not None:
            weights = weights[kept]
        index = _drawn(weights, 1.0 - self._rng.random())
        return index if kept is None else int(kept[index])

    @staticmethod
    def _check_ids(ids: Ids, vocab_size: int, where: str) -> None:
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise InputError(
                f"token ids of {where} must be from 0 to {vocab_size - 1}, the model's vocabulary, not {ids}"
            )

    def _draw(self, scores: Floats) -> int:
        """A token by its score [V], where the largest is 0; ``scores`` is overwritten."""
        config = self.config
        weights = np.exp(scores, out=self._weights)
        ids = kept_tokens(weights, config.top_k, config.top_p, config.min_p)
        return self._drawn_of(scores, weights, ids)


def _places(ids: Ids, among: Ids | None) -> tuple[Ids, slice | NDArray[np.bool_]]:
    """Where tokens stand among those of an ascending list, and which of them do; None stands for all."""
    if among is None:
        return ids, slice(None)
    places = np.minimum(np.searchsorted(among, ids), len(among) - 1)
    known = among[places] == ids
    return places[known], known


def _drawn(weights: Floats, fraction: float) -> int:
    """Index where the running sum of ``weights`` reaches ``fraction``, in (0, 1], of their sum; never one of weight 0.

    The running sum goes by blocks first, which is 10 times faster than over 65536 weights one by one.
    """
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64).cumsum()
    point = fraction * blocks[-1]
    block = int(np.searchsorted(blocks, point))  # the first to reach the point, so its sum is above 0
    start = block * _BLOCK
    inner = weights[start : start + _BLOCK].cumsum(dtype=np.float64)
    before = blocks[block - 1] if block else 0.0
    # Two ways to sum may differ in the last bit: the last weight above 0 is where the block's sum is reached.
    return start + int(np.searchsorted(inner, min(point - before, inner[-1])))


def kept_tokens(weights: Floats, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Ids | None:
    """Ids, in ascending order, that pass top-k, top-p and min-p; None where all do.

    ``weights`` [V] float32 are probabilities scaled so that the largest is 1. See `Sampler` for the meaning.
    """
    ids = _largest(weights, top_k) if 0 < top_k < len(weights) else None
    cutoff = np.float32(min_p)
    if top_p < 1:
        total = float(weights.sum(dtype=np.float64))
        # Where top-k's tokens do not reach top_p, all of them pass.
        nucleus = (
            _nucleus_cutoff(weights, total, top_p) if ids is None else _weight_reaching(weights[ids], top_p * total)
        )
        cutoff = max(cutoff, nucleus)
    if cutoff == 0:
        return ids
    if ids is None:
        return np.flatnonzero(weights >= cutoff)
    return ids[weights[ids] >= cutoff]


def _largest(weights: Floats, k: int) -> Ids:
    """Ids of the ``k`` largest weights, ascending; of equal weights the lower ids."""
    pool = None
    columns = max(4 * k, 1024)
    if (rows := len(weights) // columns) > 1:
        # The k-th largest of the columns' maxima is a lower bound of the k-th largest weight, and few weights reach it:
        # 10 times faster than a partition of all 65536.
        maxima = weights[: rows * columns].reshape(rows, columns).max(axis=0)
        pool = np.flatnonzero(weights >= np.partition(maxima, -k)[-k])
    values = weights if pool is None else weights[pool]
    smallest = np.partition(values, -k)[-k]
    chosen = values > smallest
    equal = np.flatnonzero(values == smallest)
    chosen[equal[: k - np.count_nonzero(chosen)]] = True
    places = np.flatnonzero(chosen)
    return places if pool is None else pool[places]


def _nucleus_cutoff(weights: Floats, total: float, top_p: float) -> np.float32:
    """The weight with which the sum of ``weights`` [V], largest first, reaches ``top_p`` of their ``total``.

    Bisects on a log scale until few are left to sort: once for a model that is sure, a few times for flat logits.
    """
    # All weights below `lower` sum to less than V · lower = (1 - top_p) · total: the cutoff is above it.
    lower, upper = (1 - top_p) * total / len(weights), 1.0
    pool, target = weights, top_p * total
    for _ in range(_BISECTIONS):
        if len(pool) <= _SORTED_AT_ONCE:
            break
        middle = math.sqrt(lower * upper)
        top = pool[pool >= middle]
        mass = float(top.sum(dtype=np.float64))
        if mass >= target:
            pool, lower = top, middle
        else:
            pool, upper, target = pool[pool < middle], middle, target - mass
    return _weight_reaching(pool, target) if len(pool) else np.float32(upper)


def _weight_reaching(weights: Floats, target: float) -> np.float32:
    """The weight with which the sum of ``weights``, largest first, reaches ``target``; the smallest if none."""
    ordered = np.sort(weights)[::-1]
    reached = int(np.searchsorted(ordered.cumsum(dtype=np.float64), target))
    return np.float32(ordered[min(reached, len(ordered) - 1)])


def _is_unsound(logits: np.ndarray) -> bool:
    return bool(np.isnan(logits).any() or np.isposinf(logits).any())


def uncounted_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens of spaces, tabs and digits, and ``eos_ids``: `PIPELINE` of the `rwkv` package never raises their counts.

    They are the parts of the string ' \\t0123456789', the empty one included, as `PIPELINE.generate` tests for them.
    """
    run = " \t0123456789"
    parts = {run[start:end] for start in range(len(run)) for end in range(start + 1, len(run) + 1)}
    encoded = [tokenizer.encode(part) for part in sorted(parts)]
    return tokenizer.eos_ids | {tokens[0] for tokens in encoded if len(tokens) == 1}
