"""A device's candidates give the tokens that all logits give, for every setting, or all logits are asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_edge.errors import SessionError
from rwkv_edge.runtime.candidates import Candidates, candidate_step, decides
from rwkv_edge.runtime.sampling import Sampler, SamplerConfig


def candidates_of(logits: np.ndarray, count: int, full: Callable[[], np.ndarray], shuffle: int = 0) -> Candidates:
    """What a device says: values in float32, equal ones in an order of its own, the sum in float32."""
    rng = np.random.default_rng(shuffle)
    order = rng.permutation(len(logits))
    order = order[np.argsort(-logits[order], kind="stable")][:count]
    with np.errstate(all="ignore"):
        peak = logits.max()
        norm = np.log(np.exp(logits - peak).sum(dtype=np.float32)) + peak
    return Candidates(order.astype(np.int32), logits[order], float(norm), len(logits), full)


def logits_of(kind: str, size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(size)
    if kind == "sharp":
        logits *= 8
    elif kind == "ties":
        logits = np.round(logits * 2) / 2
    elif kind == "equal":
        logits[:] = 1.5
    elif kind == "far":
        logits = logits * 300 - 900
    elif kind == "one":
        logits[rng.integers(size)] = 60
    elif kind == "banned":
        logits[rng.random(size) < 0.9] = -np.inf
        logits[0] = 1
    return logits.astype(np.float32)


CONFIGS = st.builds(
    SamplerConfig,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 20, 64, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.05, 0.999]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.4, 3.0]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    logit_bias=st.dictionaries(st.integers(0, 99), st.sampled_from([-np.inf, -2.0, 0.0, 1.5]), max_size=4),
    seed=st.integers(0, 1000),
)
KINDS = st.sampled_from(["plain", "sharp", "ties", "equal", "far", "one", "banned"])


@settings(max_examples=400, deadline=None)
@given(CONFIGS, KINDS, st.sampled_from([1, 8, 64, 99]), st.sampled_from([100, 700]), st.integers(0, 1 << 30))
def test_the_tokens_are_those_of_all_logits(config: SamplerConfig, kind: str, count: int, size: int, seed: int) -> None:
    whole, few = Sampler(config), Sampler(config)
    for sampler in (whole, few):
        sampler.observe([1, 2, 3])
    for step in range(12):
        logits = logits_of(kind, size, seed + step)
        try:
            expected = whole.sample(logits)
        except SessionError:  # everything banned
            with pytest.raises(SessionError):
                few.sample_from(candidates_of(logits, count, lambda: logits, step))  # noqa: B023  # called at once
            return
        assert few.sample_from(candidates_of(logits, count, lambda: logits, step)) == expected  # noqa: B023


@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig(temperature=0),
        SamplerConfig(temperature=0, presence_penalty=0.5, frequency_penalty=0.5),
        SamplerConfig(temperature=0.7, top_k=40, seed=1),
        SamplerConfig(top_k=64, top_p=0.9, seed=1),
        SamplerConfig(top_p=0.5, seed=2, repetition_penalty=1.1),
        SamplerConfig(min_p=0.05, seed=3, logit_bias={5: -1.0}),
    ],
    ids=["greedy", "greedy with penalties", "top-k", "top-k and top-p", "top-p", "min-p"],
)
def test_a_sharp_model_rarely_needs_other_logits(config: SamplerConfig) -> None:
    """Only a share of the sum can be too close to call."""
    whole, few = Sampler(config), Sampler(config)
    rng = np.random.default_rng(7)
    logits, fetched = np.empty(0), []

    def full() -> np.ndarray:
        fetched.append(1)
        return logits

    for _ in range(100):
        logits = (rng.standard_normal(65536) * 6).astype(np.float32)
        assert few.sample_from(candidates_of(logits, 256, full)) == whole.sample(logits)
    assert len(fetched) <= (3 if config.top_p < 1 else 0)


def test_what_candidates_cannot_decide_is_fetched() -> None:
    logits = np.zeros(500, np.float32)  # equal: nobody knows which tokens were left out
    fetched: list[int] = []

    def full() -> np.ndarray:
        fetched.append(1)
        return logits

    for config in (SamplerConfig(temperature=0), SamplerConfig(top_k=3, seed=0), SamplerConfig(top_p=0.5, seed=0)):
        assert Sampler(config).sample_from(candidates_of(logits, 64, full)) == Sampler(config).sample(logits)
    assert len(fetched) == 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_overflows_is_noticed(value: float) -> None:
    logits = np.linspace(0, 1, 500).astype(np.float32)
    logits[7] = value
    with pytest.raises(SessionError, match="the model gave NaN or"):
        Sampler(SamplerConfig(temperature=0)).sample_from(candidates_of(logits, 8, lambda: logits))


def test_settings_that_candidates_never_decide() -> None:
    for config in (
        SamplerConfig(),
        SamplerConfig(temperature=0.5),
        SamplerConfig(top_k=65),
        SamplerConfig(top_k=8, repetition_penalty=0.9),
        SamplerConfig(temperature=0, logit_bias={4: 0.1}),
    ):
        assert not decides(config, 64)
    assert decides(SamplerConfig(top_k=64), 64)
    assert decides(SamplerConfig(top_p=0.9), 64)
    assert not decides(SamplerConfig(temperature=0), 0)


def test_a_session_without_candidates_steps_as_ever() -> None:
    class Plain:
        candidates = 0

        def step_candidates(self) -> None: ...

    assert candidate_step(object(), SamplerConfig(temperature=0)) is None
    assert candidate_step(Plain(), SamplerConfig(temperature=0)) is None
    Plain.candidates = 64
    assert candidate_step(Plain(), SamplerConfig(temperature=0)) is not None
    assert candidate_step(Plain(), SamplerConfig()) is None
