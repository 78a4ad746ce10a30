"""The kernels that draw tokens, against `Sampler` with the same seed: on a GPU where there is one, else numpy twins.

Logits are uploaded in the place of a model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import cuda_double
import numpy as np
import pytest
from ptxas import BETWEEN, report

from rwkv_edge.errors import InputError, SessionError
from rwkv_edge.plugins.fused_spec import FusedKernel
from rwkv_edge.plugins.sampling import NO_TOKEN, NONE_LEFT, NOT_A_NUMBER, Features, SamplingKernels
from rwkv_edge.runtime.cuda_chain import Outputs
from rwkv_edge.runtime.cuda_driver import Driver
from rwkv_edge.runtime.cuda_launch import Launch, Loaded
from rwkv_edge.runtime.cuda_sampling import Draws, checked_token, take_all
from rwkv_edge.runtime.sampling import NONE_LEFT as NONE_LEFT_MESSAGE
from rwkv_edge.runtime.sampling import NOT_FINITE, Sampler, SamplerConfig

TILE = 128  # logits of which the head leaves the largest
WORLD = 65536

CONFIGS = {
    "greedy": {"temperature": 0},
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.3},
    "freezing": {"temperature": 1e-25},
    "top-k": {"top_k": 40},
    "top-1": {"top_k": 1},
    "top-p": {"top_p": 0.8},
    "small top-p": {"top_p": 0.01},
    "large top-p": {"top_p": 0.9999},
    "min-p": {"min_p": 0.05},
    "all": {"top_k": 300, "top_p": 0.9, "min_p": 0.001, "temperature": 0.8},
    "presence": {"presence_penalty": 0.7, "top_p": 0.6},
    "frequency": {"presence_penalty": 0.3, "frequency_penalty": 0.4, "penalty_decay": 0.97, "top_p": 0.5},
    "greedy with penalties": {"temperature": 0, "presence_penalty": 2.5, "frequency_penalty": 1.5},
    "repetition": {"repetition_penalty": 1.3, "top_k": 20},
    "bias": {"logit_bias": {3: 4.0, 5: -np.inf, 90: -2.5}, "temperature": 0.9},
    "everything": {
        "temperature": 1.2, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "presence_penalty": 0.4,
        "frequency_penalty": 0.2, "penalty_decay": 0.9, "repetition_penalty": 1.1, "logit_bias": {7: 3.0},
    },
}  # fmt: skip


class Rig:
    """Streams whose logits are uploaded; the head's largest values come along where it leaves any."""

    def __init__(self, driver: Any, batch: int, vocabulary: int, with_tops: bool) -> None:
        self.driver, self.batch, self.vocabulary = driver, batch, vocabulary
        self.draws, self.loaded = Draws(driver, batch, vocabulary), Loaded(driver)
        self.tops = -(-vocabulary // TILE) if with_tops else 0
        sizes = {"logits": batch * vocabulary, "best": batch * max(1, self.tops), "best_at": batch * max(1, self.tops)}
        self.at = {name: driver.allocate(4 * size) for name, size in sizes.items()}
        self.tokens, self.halted = driver.allocate(4 * batch), driver.allocate(4 * batch)

    def start(self, samplers: Sequence[Sampler], stop_tokens: Sequence[int] = ()) -> None:
        self.draws.load(samplers, stop_tokens)
        self.driver.upload(np.zeros(self.batch, np.int32), self.halted)

    def draw(self, logits: np.ndarray) -> list[int]:
        """The tokens of one step, from logits [B, V]."""
        self.driver.upload(np.ascontiguousarray(logits), self.at["logits"])
        if self.tops:
            padded = np.full((self.batch, self.tops * TILE), -np.inf, np.float32)
            padded[:, : self.vocabulary] = logits
            tiles = padded.reshape(self.batch, self.tops, TILE)
            self.driver.upload(np.fmax.reduce(tiles, 2), self.at["best"])
            self.driver.upload((tiles.argmax(2) + np.arange(self.tops) * TILE).astype(np.int32), self.at["best_at"])
        outputs = ("logits", "best", "best_at") if self.tops else ("logits",)
        head = FusedKernel("head", "head.cu", (), (), outputs, (self.tops, 1, 1), 256)
        launched = Launch(head, tuple(self.at[name] for name in outputs), head.grid)
        launches = self.draws.launches(0, self.batch, launched, Outputs(self.tokens, self.at["logits"], self.halted))

        (turn,) = self.draws.enqueue(1, lambda: self.loaded.enqueue(launches))
        return self.draws.tokens(turn).tolist()


@pytest.fixture(params=["numpy", pytest.param("gpu", marks=pytest.mark.gpu)])
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if request.param == "gpu":
        request.getfixturevalue("gpu")
        found: Any = Driver()
    else:
        monkeypatch.setattr(FusedKernel, "ptx", cuda_double.described)
        found = cuda_double.Driver()
    yield found
    found.close()


def random_logits(draw: np.random.Generator, batch: int, vocabulary: int) -> np.ndarray:
    """Sharp and flat ones, some rounded so that there are many ties."""
    logits = draw.normal(0, draw.choice([0.01, 0.5, 2.0, 6.0]), (batch, vocabulary)).astype(np.float32)
    return logits.astype(np.float16).astype(np.float32) if draw.random() < 0.5 else logits


def compare(driver: Any, config: dict[str, Any], batch: int, vocabulary: int, count: int, with_tops: bool) -> None:
    """Draw on both sides from the same logits; the device's samplers end like the host's."""
    draw = np.random.default_rng(0)
    uncounted = {1, 2, 3, int(vocabulary) - 1}
    hosts = [Sampler(SamplerConfig(**config, seed=seed), uncounted) for seed in range(batch)]
    for sampler in hosts:
        sampler.observe([1, 2, 30, 40])
        sampler.accept(3)
    devices = [sampler.copy() for sampler in hosts]
    rig = Rig(driver, batch, vocabulary, with_tops)
    rig.start(devices)
    found, expected = [], []
    base = random_logits(draw, batch, vocabulary)  # near ones again and again, so that penalties have their part
    for _ in range(count):
        logits = base + random_logits(draw, batch, vocabulary) * np.float32(0.05)
        found.append(rig.draw(logits))
        expected.append([sampler.sample(row) for sampler, row in zip(hosts, logits, strict=True)])
    assert found == expected
    take_all(np.array(found).T, devices)
    for host, device in zip(hosts, devices, strict=True):
        assert vars(host.past(vocabulary)).keys() == vars(device.past(vocabulary)).keys()
        for name, value in vars(host.past(vocabulary)).items():
            np.testing.assert_array_equal(value, getattr(device.past(vocabulary), name))
        assert host.numbers().random() == device.numbers().random()


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_the_sampler(driver: Any, name: str) -> None:
    compare(driver, CONFIGS[name], 3, 1000, 60, with_tops=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_with_the_largest_of_the_head(driver: Any, name: str) -> None:
    compare(driver, CONFIGS[name], 2, 5000, 20, with_tops=True)


def test_ties(driver: Any) -> None:
    """Of equal weights top-k keeps the lower ids, top-p all; a greedy stream takes the first."""
    logits = np.zeros((4, 3000), np.float32)
    logits[:, 1500:] = -1
    configs = [{"top_k": 700}, {"top_p": 0.3}, {"top_k": 1600, "temperature": 3.0}, {"temperature": 0}]
    hosts = [Sampler(SamplerConfig(seed=i, **config)) for i, config in enumerate(configs)]
    rig = Rig(driver, 4, 3000, with_tops=False)
    rig.start([host.copy() for host in hosts])
    for _ in range(30):
        drawn = rig.draw(logits)
        assert drawn == [host.sample(row) for host, row in zip(hosts, logits, strict=True)]
        assert drawn[0] < 700
        assert drawn[3] == 0


@pytest.mark.parametrize("config", [{"top_k": 7}, {"top_p": 0.01}, {"top_k": 40, "temperature": 0.01}])
def test_a_cut_just_below_the_largest(driver: Any, config: dict[str, Any]) -> None:
    """The weight 1 is the smallest of its bin, and the cut lies in the next one: both sums must have it."""
    logits = np.linspace(-0.03, -0.001, 2048, dtype=np.float32)[None].copy()
    logits[0, 700] = 0
    host = Sampler(SamplerConfig(seed=4, **config))
    rig = Rig(driver, 1, 2048, with_tops=False)
    rig.start([host.copy()])
    assert [rig.draw(logits) for _ in range(40)] == [[host.sample(logits[0])] for _ in range(40)]


@pytest.mark.parametrize("config", [{"top_k": 5}, {"top_k": 3, "top_p": 0.999}, {"top_p": 1 - 1e-12}, {"min_p": 1e-30}])
def test_far_below_the_largest(driver: Any, config: dict[str, Any]) -> None:
    """What has no weight at temperature 1 is kept by top-k all the same, and drawn when it is hot."""
    logits = np.full((1, 1024), -np.inf, np.float32)
    logits[0, [3, 90, 500, 501, 900]] = [0, -60, -90, -200, -150]
    host = Sampler(SamplerConfig(seed=2, temperature=300.0, **config))
    rig = Rig(driver, 1, 1024, with_tops=False)
    rig.start([host.copy()])
    for _ in range(50):
        assert rig.draw(logits) == [host.sample(logits[0])]


@pytest.mark.parametrize("with_tops", [False, True])
@pytest.mark.parametrize("config", [{}, {"temperature": 0}, {"top_p": 0.9}, {"presence_penalty": 1.0, "top_k": 3}])
def test_scores_that_give_no_token(driver: Any, config: dict[str, Any], with_tops: bool) -> None:
    """NaN, +inf, nothing but -inf: the codes; the stream is halted, the others go on, and a new start clears it all."""
    logits = np.random.default_rng(1).normal(0, 1, (4, 1024)).astype(np.float32)
    logits[0, 700], logits[1, 3], logits[2] = np.nan, np.inf, -np.inf
    samplers = [Sampler(SamplerConfig(seed=i, **config)) for i in range(4)]
    rig = Rig(driver, 4, 1024, with_tops)
    rig.start(samplers)
    first, second = rig.draw(logits), rig.draw(logits)
    assert first[:3] == [NOT_A_NUMBER, NOT_A_NUMBER, NONE_LEFT]
    assert second[:3] == [NO_TOKEN] * 3
    for row, error in enumerate((NOT_FINITE, NOT_FINITE, NONE_LEFT_MESSAGE)):
        with pytest.raises(SessionError, match=re.escape(error)):
            samplers[row].sample(logits[row])
        with pytest.raises(SessionError, match=re.escape(error)):
            checked_token(first[row])
    twin = samplers[3].copy()
    assert [first[3], second[3]] == [twin.sample(logits[3]), twin.sample(logits[3])]
    rig.start(samplers)
    logits[:3] = logits[3]
    assert min(rig.draw(logits)) >= 0


def test_settings_of_streams_differ(driver: Any) -> None:
    """Each stream has its own, whatever the others need."""
    configs = list(CONFIGS.values())
    hosts = [Sampler(SamplerConfig(seed=i, **config)) for i, config in enumerate(configs)]
    rig = Rig(driver, len(hosts), 1000, with_tops=True)
    rig.start([host.copy() for host in hosts])
    draw = np.random.default_rng(5)
    for _ in range(12):
        logits = random_logits(draw, len(hosts), 1000)
        assert rig.draw(logits) == [host.sample(row) for host, row in zip(hosts, logits, strict=True)]


def test_shares_are_those_of_the_distribution(driver: Any) -> None:
    """χ² of 4,000 draws from eight tokens under top-p and temperature."""
    logits = np.full((40, 128), -30, np.float32)
    logits[:, 100:108] = np.linspace(0, 2, 8)
    rig = Rig(driver, 40, 128, with_tops=False)
    rig.start([Sampler(SamplerConfig(seed=seed, top_p=0.95, temperature=1.5)) for seed in range(40)])
    drawn = np.array([rig.draw(logits) for _ in range(100)]).reshape(-1)
    kept = logits[0, 101:108].astype(np.float64)  # the first has less than 5 %
    expected = np.exp(kept / 1.5) / np.exp(kept / 1.5).sum() * len(drawn)
    counts = np.bincount(drawn, minlength=128)[101:108]
    assert counts.sum() == len(drawn)
    assert ((counts - expected) ** 2 / expected).sum() < 22.5  # 6 degrees of freedom: one in a thousand seeds is above


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_whole_vocabularies(name: str, gpu: str) -> None:
    """65,536 tokens: what a World model draws from."""
    driver = Driver()
    compare(driver, CONFIGS[name], 4, WORLD, 200, with_tops=True)
    driver.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "all", "frequency"])
def test_whole_vocabularies_in_numpy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedKernel, "ptx", cuda_double.described)
    compare(cuda_double.Driver(), CONFIGS[name], 1, WORLD, 10, with_tops=True)


@pytest.mark.parametrize("vocabulary", [1002, 1 << 18])
def test_vocabularies_are_checked(vocabulary: int) -> None:
    features = Features(greedy=True, cut=False, penalties=False, bias=False)
    with pytest.raises(InputError, match=f"a multiple of 4 up to 131072; found {vocabulary}"):
        SamplingKernels(vocabulary, 1, 1, features, 0)
    with pytest.raises(SessionError, match=f"not {vocabulary}; use Sampler on the logits"):
        Draws(cuda_double.Driver(), 1, vocabulary)


def variants(every: bool) -> list[FusedKernel]:
    """Of the kernels: all, or those that do the most."""
    chosen = [(greedy, cut, adjust) for greedy in (0, 1) for cut in (0, 1) for adjust in (0, 1)]
    features = [Features(greedy, cut, adjust, adjust) for greedy, cut, adjust in (chosen if every else [(0, 1, 1)])]
    sets = [SamplingKernels(WORLD, 1, 1, f, tops) for f in features for tops in (0, 512)]
    return sorted({kernel for found in sets for kernel in found.all()}, key=lambda kernel: kernel.defines)


@pytest.mark.parametrize("capability", [75, 80, 87, 90, 120])
def test_all_compile(capability: int, nvrtc_architectures: tuple[int, ...]) -> None:
    if capability not in nvrtc_architectures:
        pytest.skip(f"this NVRTC does not know compute_{capability}")
    for kernel in variants(every=capability == 80):  # which spills first
        log = report(kernel, capability)
        assert "warning" not in log, log
        if "spill" in log:
            # a few words, by which it reaches a round number of registers
            assert max(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill)", log)) <= 16, log


@pytest.mark.parametrize("capability", BETWEEN)
def test_other_devices(capability: int, nvrtc_architectures: tuple[int, ...]) -> None:
    if capability not in nvrtc_architectures:
        pytest.skip(f"this NVRTC does not know compute_{capability}")
    assert f".target sm_{capability}" in variants(every=False)[0].ptx(capability)
