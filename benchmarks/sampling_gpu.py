"""Drawing a token on a GPU: the kernels alone at the World vocabulary, and a step loop with and without the host.

Tokens are compared with those of `Sampler` first; no figure without that. Needs cuda-bindings and NVRTC; for the loop
(``--artifact FOLDER``, of RWKV-7) also whatever the backend 'cuda' needs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, report

from rwkv_edge.artifact import Artifact
from rwkv_edge.plugins.fused_spec import FusedKernel
from rwkv_edge.runtime.cuda import CudaSession
from rwkv_edge.runtime.cuda_chain import Outputs
from rwkv_edge.runtime.cuda_driver import Driver
from rwkv_edge.runtime.cuda_launch import Launch, Loaded
from rwkv_edge.runtime.cuda_sampling import Draws
from rwkv_edge.runtime.loop import generate_step
from rwkv_edge.runtime.sampling import Sampler, SamplerConfig

VOCABULARY, TILE = 65536, 128
CHECKED = 200  # tokens of each stream
REPEATED = 100  # draws in one graph
CONFIGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.9},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "top-k, top-p, temperature": {"top_k": 100, "top_p": 0.9, "temperature": 0.8},
    "penalties, top-p": {"presence_penalty": 0.4, "frequency_penalty": 0.4, "top_p": 0.85},
    "greedy, penalties": {"temperature": 0, "presence_penalty": 0.4, "frequency_penalty": 0.4},
}
LOGITS = {"sharp": 4.0, "flat": 0.5}
"""Standard deviations: with 4 some hundred tokens have nine tenths of the probability, with 0.5 nearly all have."""


class Streams:
    """Some streams whose logits are uploaded; the largest of each tile come along, as the head leaves them."""

    def __init__(self, driver: Driver, batch: int) -> None:
        self.driver, self.batch, self.draws = driver, batch, Draws(driver, batch, VOCABULARY)
        self.loaded = Loaded(driver)
        tops = VOCABULARY // TILE
        sizes = {"logits": VOCABULARY, "best": tops, "best_at": tops, "tokens": 1, "halted": 1}
        self.at = {name: driver.allocate(4 * batch * size) for name, size in sizes.items()}
        names = ("logits", "best", "best_at")
        self.head = Launch(
            FusedKernel("head", "head.cu", (), (), names, (tops, 1, 1), 256),
            tuple(self.at[n] for n in names),
            (tops, 1, 1),
        )

    def start(self, samplers: Sequence[Sampler]) -> None:
        """Take samplers over."""
        self.draws.load(samplers, ())
        outputs = Outputs(self.at["tokens"], self.at["logits"], self.at["halted"])
        self.launches = self.draws.launches(0, self.batch, self.head, outputs)

    def upload(self, logits: np.ndarray) -> None:
        """Those of the next draw [B, V]."""
        tiles = logits.reshape(self.batch, -1, TILE)
        first = np.arange(tiles.shape[1]) * TILE
        self.driver.upload(logits, self.at["logits"])
        self.driver.upload(np.ascontiguousarray(tiles.max(2)), self.at["best"])
        self.driver.upload((tiles.argmax(2) + first).astype(np.int32), self.at["best_at"])

    def draw(self) -> list[int]:
        """The tokens of one draw."""
        (turn,) = self.draws.enqueue(1, lambda: self.loaded.enqueue(self.launches))
        return [int(token) for token in self.draws.tokens(turn)]

    def microseconds(self, runs: int) -> float:
        """Of one draw among many in a graph, median."""
        graph = self.loaded.captured([self.launches * REPEATED])
        graph.launch()
        found = [self.driver.elapsed_ms(graph.launch) * 1e3 / REPEATED for _ in range(runs)]
        graph.close()
        return statistics.median(found)


def main() -> None:
    """One table of kernels, one of the loop."""
    options = arguments(__doc__ or "", add_options)
    driver = Driver()
    figures: dict[str, Any] = {"gpu": driver.name, "kernels": {}}
    rows = []
    for name, config in CONFIGS.items():
        found = figures["kernels"][name] = measured(driver, config, options.batch, options.runs)
        rows.append((name, found["launches"], found["equal"], *(f"{found[f'{kind}_us']:.1f}" for kind in LOGITS)))
        print(*rows[-1], flush=True)
    driver.close()
    header = ("sampler", "launches", "tokens equal to the host's", *(f"µs, {kind} logits" for kind in LOGITS))
    title = f"Drawing a token of {VOCABULARY}, {options.batch} streams, {figures['gpu']}"
    report(title, header, rows, figures, options.json)
    if options.artifact:
        figures["loop"] = loop_figures(options.artifact, options.tokens)
        loops = [(name, f"{1e3 * seconds:.3f}") for name, seconds in figures["loop"].items()]
        report(f"{title}; a step loop", ("loop", "ms a token"), loops, figures, options.json)
    wrong = [name for name, found in figures["kernels"].items() if found["differ"]]
    if wrong:
        raise SystemExit(f"tokens are not those of the host: {', '.join(wrong)}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """--batch, --artifact, --tokens."""
    parser.add_argument("--batch", type=int, default=1, help="streams")
    parser.add_argument("--artifact", type=Path, help="of RWKV-7, to time the step loop with")
    parser.add_argument("--tokens", type=int, default=400, help="of a loop")


def measured(driver: Driver, config: dict[str, Any], batch: int, runs: int) -> dict[str, Any]:
    """Tokens against the host's, then times."""
    hosts = [Sampler(SamplerConfig(seed=seed, **config)) for seed in range(batch)]
    streams = Streams(driver, batch)
    streams.start([host.copy() for host in hosts])
    random, differ = np.random.default_rng(0), 0
    base = random.normal(0, 3, (batch, VOCABULARY)).astype(np.float32)
    for _ in range(CHECKED):
        logits = base + random.normal(0, 1, base.shape).astype(np.float32)
        streams.upload(logits)
        expected = [host.sample(row) for host, row in zip(hosts, logits, strict=True)]
        differ += sum(a != b for a, b in zip(streams.draw(), expected, strict=True))
    found: dict[str, Any] = {"launches": len(streams.launches), "differ": differ}
    found["equal"] = f"{CHECKED * batch - differ} of {CHECKED * batch}"
    for kind, deviation in LOGITS.items():
        streams.upload(random.normal(0, deviation, base.shape).astype(np.float32))
        found[f"{kind}_us"] = streams.microseconds(runs)
    return found


def loop_figures(artifact: Path, count: int) -> dict[str, float]:
    """Seconds of a token: drawn by the host, ahead of the host, and without it."""
    session = CudaSession(Artifact.open(artifact), check_content=False)
    found = {}
    for name in ("greedy", "top-p 0.9", "penalties, top-p"):
        config = SamplerConfig(seed=0, **CONFIGS[name])
        loops: dict[str, Callable[[], list[int]]] = {
            "on the host": lambda config=config: by_hand(session, Sampler(config), count),  # type: ignore[misc]
            "ahead of the host": lambda config=config: ahead(session, Sampler(config), count),  # type: ignore[misc]
            "without the host": lambda config=config: alone(session, Sampler(config), count),  # type: ignore[misc]
        }
        tokens = {}
        for way, loop in loops.items():
            loop()
            start = time.perf_counter()
            tokens[way] = loop()
            found[f"{name}, {way}"] = (time.perf_counter() - start) / count
        if len({tuple(drawn) for drawn in tokens.values()}) != 1:
            raise SystemExit(f"the loops of {name} give different tokens")
    session.close()
    return found


def by_hand(session: CudaSession, sampler: Sampler, count: int) -> list[int]:
    """Step, download the logits, draw."""
    state, tokens = session.initial_state(), [5]
    for _ in range(count):
        tokens.append(sampler.sample(session.step(tokens[-1:], state)[0]))
    return tokens[1:]


def ahead(session: CudaSession, sampler: Sampler, count: int) -> list[int]:
    """`generate_step`."""
    steps = generate_step(session, sampler, session.initial_state(), [5], max_tokens=count)
    return [step.token for step in itertools.islice(steps, count)]


def alone(session: CudaSession, sampler: Sampler, count: int) -> list[int]:
    """`CudaSession.sample`."""
    drawn: list[int] = session.sample([5], session.initial_state(), [sampler], count)[0].tolist()
    return drawn


if __name__ == "__main__":
    main()
