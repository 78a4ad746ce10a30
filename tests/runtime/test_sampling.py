"""Sampling against the `rwkv` package, naive twins and the distributions that it should give."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_edge.errors import InputError, SessionError
from rwkv_edge.runtime.sampling import Sampler, SamplerConfig, _drawn, kept_tokens, uncounted_tokens
from rwkv_edge.tokenizers import ByteTokenizer, WorldTokenizer


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def weights_of(logits):
    return np.exp(logits - logits.max())


def random_logits(seed, size, scale=2.0):
    return np.random.default_rng(seed).normal(scale=scale, size=size).astype(np.float32)


def draw(logits, count, **config):
    """How often each token comes, without history."""
    sampler = Sampler(SamplerConfig(seed=7, **config))
    return np.bincount([sampler.sample(logits) for _ in range(count)], minlength=len(logits))


def assert_distribution(counts, expected):
    """Pearson's chi-square below its mean plus five standard deviations, over tokens that are expected at all."""
    assert counts[expected == 0].sum() == 0
    expected = expected * counts.sum()
    used = expected > 0
    statistic = ((counts[used] - expected[used]) ** 2 / expected[used]).sum()
    freedom = used.sum() - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


# The distribution


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [2, 30, 600])  # 600: more than one block of the running sum
def test_distribution_at_a_temperature(size, temperature):
    logits = random_logits(1, size, scale=1.0)
    assert_distribution(draw(logits, 8000, temperature=temperature), softmax(logits / temperature))


def test_distribution_of_a_truncated_vocabulary():
    logits = random_logits(2, 50)
    expected = np.where(np.isin(np.arange(50), kept_tokens(weights_of(logits), 20, 0.9, 0.02)), softmax(logits), 0) ** 2
    assert np.count_nonzero(expected) in range(3, 20)
    counts = draw(logits, 8000, temperature=0.5, top_k=20, top_p=0.9, min_p=0.02)
    assert_distribution(counts, expected / expected.sum())


def test_distribution_of_a_large_vocabulary():
    logits = random_logits(3, 65536, scale=1.0)
    counts = draw(logits, 8000)
    order = np.argsort(-logits)  # in 64 groups from probable to improbable
    groups = np.add.reduceat(counts[order], np.arange(0, 65536, 1024))
    assert_distribution(groups, np.add.reduceat(softmax(logits)[order], np.arange(0, 65536, 1024)))


@pytest.mark.parametrize("size", [1, 255, 256, 257, 512, 1000])
def test_every_token_can_come_and_none_of_no_probability(size):
    logits = np.where(np.arange(size) % 3 == 0, 0.0, -np.inf).astype(np.float32)
    counts = draw(logits, 40 * size)
    assert set(np.flatnonzero(counts)) == set(range(0, size, 3))


@pytest.mark.parametrize("fraction", [2.0**-53, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 256, 257, 700])
def test_the_point_of_the_running_sum(size, fraction):
    weights = np.random.default_rng(size).random(size).astype(np.float32)
    weights = np.concatenate([np.zeros(300), weights, np.zeros(600)]).astype(np.float32)
    cumulative = weights.cumsum(dtype=np.float64)
    assert _drawn(weights, fraction) == np.searchsorted(cumulative, fraction * cumulative[-1])


# Against the rwkv package


@pytest.fixture(scope="module")
def pipeline():
    utils = pytest.importorskip("rwkv.utils")
    return object.__new__(utils.PIPELINE)


def rwkv_probabilities(pipeline, monkeypatch, logits, **arguments):
    """The distribution [V] from which the rwkv package would draw."""
    import torch

    seen = []
    monkeypatch.setattr(np.random, "choice", lambda a, p: seen.append(p.copy()) or 0)
    pipeline.sample_logits(torch.from_numpy(logits.copy()), **arguments)
    return seen[0]


def own_probabilities(logits, temperature=1.0, top_p=1.0, top_k=0):
    """The distribution [V] of the sampler: `kept_tokens`, and then the temperature."""
    ids = kept_tokens(weights_of(logits), top_k, top_p)
    ids = np.arange(len(logits)) if ids is None else ids
    probabilities = np.zeros(len(logits))
    probabilities[ids] = softmax(logits[ids] / temperature)
    return probabilities


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize(
    "arguments",
    [
        {"top_p": 0.85},
        {"top_p": 0.3},
        {"top_p": 0.99, "temperature": 0.7},
        {"top_p": 0.999, "top_k": 40},
        {"top_p": 0.5, "top_k": 40, "temperature": 1.5},
        {"top_p": 0.5, "top_k": 1},
        {"top_p": 1e-6},
    ],
)
@pytest.mark.parametrize("size", [500, 5000])
def test_same_distribution_as_the_rwkv_package(pipeline, monkeypatch, size, arguments, scale):
    for seed in range(5):
        logits = random_logits(seed, size, scale)
        expected = rwkv_probabilities(pipeline, monkeypatch, logits, **arguments)
        found = own_probabilities(logits, **arguments)
        assert np.array_equal(found > 0, expected > 0)
        assert np.abs(found - expected).max() < 1e-6


def test_same_penalties_as_the_rwkv_package(pipeline, monkeypatch):
    """`PIPELINE.generate` on a fake model, greedily, so that only the penalties decide."""
    import torch
    from rwkv.utils import PIPELINE_ARGS

    tokenizer = WorldTokenizer()
    rows = np.random.default_rng(5).normal(size=(60, 65536)).astype(np.float32)
    favourites = [33155, 49, 50, 262, 45, 261, 33]  # Hello, 0, 1, ...: some of them digits and spaces
    rows[:, favourites] += 6

    class Model:
        turn = -1

        def forward(self, tokens, state):
            self.turn += 1
            return torch.from_numpy(rows[self.turn].copy()), state

    monkeypatch.setattr(pipeline, "model", Model(), raising=False)
    for name in ("encode", "decode"):
        monkeypatch.setattr(pipeline, name, getattr(tokenizer, name))
    theirs = []
    sample = pipeline.sample_logits
    monkeypatch.setattr(pipeline, "sample_logits", lambda *a, **k: theirs.append(sample(*a, **k)) or theirs[-1])
    penalties = {"alpha_frequency": 0.9, "alpha_presence": 0.4, "alpha_decay": 0.9, "token_ban": [45]}
    pipeline.generate("Hi", token_count=60, args=PIPELINE_ARGS(temperature=0, **penalties))

    config = SamplerConfig(
        temperature=0, frequency_penalty=0.9, presence_penalty=0.4, penalty_decay=0.9, logit_bias={45: -math.inf}
    )
    spared = Sampler(config, uncounted_tokens(tokenizer))
    assert [spared.sample(row) for row in rows] == theirs
    counted = Sampler(config)
    assert [counted.sample(row) for row in rows] != theirs
    assert 49 in theirs
    assert 45 not in theirs


def test_uncounted_tokens_are_those_of_the_rwkv_package():
    tokenizer = WorldTokenizer()
    found = uncounted_tokens(tokenizer)
    assert found == {t for t in range(65530) if tokenizer.decode([t]) in " \t0123456789"}
    assert len(found) > 12
    assert uncounted_tokens(ByteTokenizer()) == set(b" \t0123456789")


# What is kept, against a naive twin


def naive_kept(weights, top_k, top_p, min_p):
    probabilities = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    order = np.lexsort((np.arange(len(weights)), -probabilities))
    passed = np.ones(len(weights), bool)
    if 0 < top_k < len(weights):
        passed[order[top_k:]] = False
    if top_p < 1:
        reached = np.flatnonzero(probabilities[order].cumsum() >= top_p)
        passed &= weights >= weights[order[reached[0] if len(reached) else -1]]
    passed &= weights >= np.float32(min_p)
    return np.flatnonzero(passed)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1, 2, 100, 2049, 3000, 10000, 65536]),
    scale=st.sampled_from([0.0, 0.01, 1.0, 5.0, 100.0]),
    grain=st.sampled_from([0.0, 0.5]),  # rounded logits tie
    top_k=st.sampled_from([0, 1, 2, 40, 300, 20000]),
    top_p=st.sampled_from([1.0, 0.9999999, 0.9, 0.5, 1e-9, 1e-310]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_kept_tokens_against_a_naive_twin(seed, size, scale, grain, top_k, top_p, min_p):
    logits = random_logits(seed, size, scale)
    if grain:
        logits = np.round(logits / grain) * np.float32(grain)
    weights = weights_of(logits)
    found = kept_tokens(weights, top_k, top_p, min_p)
    found = np.arange(size) if found is None else found
    expected = naive_kept(weights, top_k, top_p, min_p)
    if not np.array_equal(found, expected):  # the sum may reach top_p one weight earlier or later by rounding
        odd = np.setxor1d(found, expected)
        assert len(np.unique(weights[odd])) == 1
        kept = min(weights[found].sum(dtype=np.float64), weights[expected].sum(dtype=np.float64))
        assert abs(kept / weights.sum(dtype=np.float64) - top_p) < 1e-6


def test_ties():
    weights = np.array([0.5, 1, 0.5, 1, 0.5, 0.25], np.float32)
    assert kept_tokens(weights, top_k=3).tolist() == [0, 1, 3]
    assert kept_tokens(weights, top_k=1).tolist() == [1]
    assert kept_tokens(weights, top_p=0.6).tolist() == [0, 1, 2, 3, 4]
    assert kept_tokens(weights, top_p=0.5).tolist() == [1, 3]
    assert kept_tokens(weights, min_p=0.5).tolist() == [0, 1, 2, 3, 4]


def test_nothing_is_cut_when_all_is_off():
    weights = weights_of(random_logits(0, 100))
    assert kept_tokens(weights) is None
    assert kept_tokens(weights, top_k=100) is None
    assert kept_tokens(weights, top_k=10**9) is None


# Bias and penalties


def greedy(logits, **config):
    return Sampler(SamplerConfig(temperature=0, **config)).sample(np.array(logits, np.float32))


def test_greedy_takes_the_first_of_the_largest():
    assert greedy([0, 3, 1, 3]) == 1
    assert greedy([-np.inf, -5]) == 1
    assert greedy([0, 3, 1], logit_bias={0: 4, 1: -math.inf}) == 0
    assert draw(np.array([0, 3, 1, 3], np.float32), 200, top_k=1)[1] == 200


@pytest.mark.parametrize("temperature", [1e-300, 1e-5, 0.01])
def test_a_low_temperature_is_nearly_greedy(temperature):
    logits = np.array([1, 3, 2.5, -np.inf], np.float32)
    assert draw(logits, 100, temperature=temperature)[1] == 100


def test_a_high_temperature_is_nearly_uniform():
    logits = np.array([0, -200, -30, -np.inf], np.float32)
    assert_distribution(draw(logits, 6000, temperature=1e6), np.array([1, 1, 1, 0]) / 3)


def test_repetition_penalty_divides_and_multiplies():
    sampler = Sampler(SamplerConfig(temperature=0, repetition_penalty=2.0))
    sampler.observe([0, 2, 2])
    assert sampler.sample(np.array([4, 1.9, -3, -5], np.float32)) == 0  # 2.0 over 1.9
    sampler.observe([1])
    assert sampler.sample(np.array([4, 3.9, -3, 1.97], np.float32)) == 0  # 2.0, 1.95, -6, 1.97
    sampler.reset()
    assert sampler.copy().sample(np.array([1, 2, 0, 0], np.float32)) == 1
    sampler.observe(iter([0, 2]))
    assert sampler.sample(np.array([4, 2.1, -3, -5], np.float32)) == 1
    assert sampler.sample(np.array([-4, -5, -3, -6.5], np.float32)) == 2  # -8, -10, -6, -6.5
    assert sampler.sample(np.array([-4, -5, -3.5, -6.5], np.float32)) == 3  # -8, -10, -7, -6.5


def test_prompt_tokens_do_not_count_for_presence_and_frequency():
    sampler = Sampler(SamplerConfig(temperature=0, presence_penalty=1, frequency_penalty=1))
    sampler.observe([0])
    logits = np.array([1, 0.5], np.float32)
    assert [sampler.sample(logits) for _ in range(2)] == [0, 1]


def test_counts_decay():
    sampler = Sampler(SamplerConfig(temperature=0, frequency_penalty=1.0, penalty_decay=0.5))
    for token in (0, 1, 0):
        sampler.accept(token)
    # Counts are 1.25 and 0.5 here; the chosen token does not matter, its count does.
    assert sampler.copy().sample(np.array([1.0, 0.26], np.float32)) == 1
    assert sampler.copy().sample(np.array([1.0, 0.24], np.float32)) == 0


def test_order_of_bias_and_penalties():
    sampler = Sampler(SamplerConfig(temperature=0, repetition_penalty=2, presence_penalty=1, logit_bias={0: 4}))
    sampler.accept(0)
    # ((2 + 4) / 2) - 1 = 2, where penalties first would give 2 / 2 + 4 - 1 = 4 and repetition last (6 - 1) / 2 = 2.5
    assert sampler.copy().sample(np.array([2, 2.1], np.float32)) == 1
    assert sampler.copy().sample(np.array([2, 1.9], np.float32)) == 0


def test_logits_are_left_alone():
    logits = random_logits(0, 300)
    before = logits.copy()
    sampler = Sampler(SamplerConfig(temperature=0.5, top_k=5, logit_bias={3: 1}, presence_penalty=1, seed=0))
    sampler.accept(3)
    for _ in range(3):
        sampler.sample(logits)
    assert np.array_equal(logits, before)
    logits.setflags(write=False)
    sampler.sample(logits)


def test_other_dtypes_and_sizes_are_taken():
    sampler = Sampler(SamplerConfig(temperature=0))
    assert sampler.sample(np.array([1, 2], np.float16)) == 1
    assert sampler.sample(np.array([1, 2, 3], np.float64)) == 2
    assert sampler.sample([5.0, 2.0]) == 0


# The history and the random numbers


def test_same_seed_same_tokens():
    config = SamplerConfig(seed=3, presence_penalty=0.5, top_p=0.95)
    rows = random_logits(4, (30, 100))
    first, second = Sampler(config), Sampler(config)
    tokens = [first.sample(row) for row in rows]
    assert tokens == [second.sample(row) for row in rows]
    first.reset()
    assert tokens == [first.sample(row) for row in rows]
    other = Sampler(SamplerConfig(seed=4, presence_penalty=0.5, top_p=0.95))
    assert tokens != [other.sample(row) for row in rows]


def test_without_seed_tokens_differ():
    rows = random_logits(4, (50, 100))
    assert [Sampler(SamplerConfig()).sample(row) for row in rows] != [
        Sampler(SamplerConfig()).sample(row) for row in rows
    ]


def test_a_copy_goes_on_alone():
    sampler = Sampler(SamplerConfig(seed=3, frequency_penalty=1.0))
    rows = random_logits(4, (20, 50))
    for row in rows[:5]:
        sampler.sample(row)
    twin = sampler.copy()
    assert [sampler.sample(row) for row in rows] == [twin.sample(row) for row in rows]


# What is refused


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("temperature", [-0.1, math.nan, math.inf, "1", None, True], "temperature must be from 0 to 1e6"),
        ("top_k", [-1, 1.5, None, True], "top_k must be a whole number"),
        ("top_p", [0, -0.5, 1.01, math.nan, "x"], "top_p must be above 0 and at most 1"),
        ("min_p", [-0.1, 1.1, math.nan], "min_p must be from 0 to 1"),
        ("presence_penalty", [-1, math.nan, math.inf], "presence_penalty must be from 0"),
        ("frequency_penalty", [-1, math.nan, math.inf], "frequency_penalty must be from 0"),
        ("penalty_decay", [-0.1, 1.1, math.nan], "penalty_decay must be from 0 to 1"),
        ("repetition_penalty", [0, -1, math.nan, math.inf], "repetition_penalty must be from 1e-6"),
        ("logit_bias", [{1: math.nan}, {1: math.inf}, {1: 1e300}, {1: "x"}], "logit_bias must be -inf or"),
        ("logit_bias", [{-1: 0.0}, {"a": 0.0}, {1.5: 0.0}], "a token id in logit_bias must be a whole number"),
        ("seed", [-1, 1.5, "x"], "seed must be a whole number"),
    ],
)
def test_values_out_of_range_are_refused(name, values, text):
    for value in values:
        with pytest.raises(InputError, match=text):
            SamplerConfig(**{name: value})


def test_numpy_numbers_are_values():
    config = SamplerConfig(
        temperature=np.float32(0), top_k=np.int64(3), logit_bias={np.int64(1): np.float32(9)}, seed=np.int64(3)
    )
    assert Sampler(config).sample(np.zeros(3, np.float32)) == 1


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_are_refused(temperature, bad):
    sampler = Sampler(SamplerConfig(temperature=temperature, logit_bias={1: -math.inf}))
    with pytest.raises(SessionError, match=r"the model gave NaN or \+inf"):
        sampler.sample(np.array([1, bad, 2], np.float32))


@pytest.mark.parametrize("temperature", [0, 1])
def test_no_token_left(temperature):
    with pytest.raises(SessionError, match="no token has a finite logit"):
        Sampler(SamplerConfig(temperature=temperature)).sample(np.full(4, -np.inf, np.float32))
    banned = SamplerConfig(temperature=temperature, logit_bias={0: -math.inf, 1: -math.inf})
    with pytest.raises(SessionError, match="ban fewer"):
        Sampler(banned).sample(np.zeros(2, np.float32))


@pytest.mark.parametrize("shape", [(0,), (), (1, 5), (2, 5)])
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match="one row"):
        Sampler(SamplerConfig()).sample(np.zeros(shape, np.float32))


def test_tokens_outside_the_vocabulary_are_refused():
    logits = np.zeros(5, np.float32)
    with pytest.raises(InputError, match="logit_bias must be from 0 to 4"):
        Sampler(SamplerConfig(logit_bias={5: 1})).sample(logits)
    for config in (SamplerConfig(presence_penalty=1), SamplerConfig(repetition_penalty=2)):
        sampler = Sampler(config)
        sampler.accept(5)
        with pytest.raises(InputError, match="history must be from 0 to 4"):
            sampler.sample(logits)
