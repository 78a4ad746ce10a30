"""Prompts and many streams at once through our wide kernels: RWKV-7 of the official shapes in fp16, on a GPU.

The weights are random (see `step_gpu_models.py`). Before anything is timed, a prompt and steps of many streams are
compared with single steps of few, which `step_gpu.py` compares with the CPU. With ``--kernels`` each kernel is timed by
itself: those of all layers in a row, so that every one finds its weights in memory and not in the cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from common import arguments, relative, report
from step_gpu_models import SHAPES, float_artifact

from rwkv_edge.artifact import Artifact
from rwkv_edge.plugins.fused_spec import Dimensions
from rwkv_edge.runtime.cuda import CudaSession
from rwkv_edge.runtime.cuda_chain import Launch
from rwkv_edge.runtime.cuda_wide import Rows

OFFICIAL = ("0.1B", "0.4B", "1.5B", "2.9B")
BATCHES = (8, 16, 32, 64, 128)
PROMPTS = (128, 512, 2048)
STEPS = 20  # of a measure
TOLERANCE = 5e-3
PROFILED = {"prompt of 512": (1, 512), "64 streams": (64, 1)}
ROUNDS = 3  # of all layers, in the measure of a kernel
HEADER = ("model", *(f"prompt of {n}" for n in PROMPTS), *(f"{n} streams" for n in BATCHES))
KERNEL_HEADER = ("model", "rows", "kernel", "µs", "TFLOP/s", "GB/s", "share")


def main() -> None:
    """Parity and tokens/s of every size, one table; then the kernels."""
    start = time.perf_counter()
    options = arguments(__doc__ or "", add_options)
    figures: dict[str, Any] = {}
    for size in options.sizes:
        session = CudaSession(Artifact.open(float_artifact(size, options.layers, options.work)), check_content=False)
        figures["gpu"] = session._driver.name
        figures[size] = {"parity": parity(session)}
        if not max(figures[size]["parity"].values()) <= TOLERANCE:
            raise SystemExit(f"parity of {size} is not green, so there are no figures: {figures[size]['parity']}")
        figures[size]["prompt"] = {n: n / prompt_seconds(session, n, options.runs) for n in PROMPTS}
        figures[size]["streams"] = {n: n / step_seconds(session, n, options.runs) for n in BATCHES}
        if options.kernels:
            figures[size]["kernels"] = {name: kernels_of(session, *rows) for name, rows in PROFILED.items()}
        session.close()
        figures["seconds"] = time.perf_counter() - start
        title = f"RWKV-7 fp16, random weights, tokens/s of all streams together, {figures['gpu']}"
        report(title, HEADER, rows_of(figures), figures, options.json)
    if options.kernels:
        report("Kernels of a layer", KERNEL_HEADER, kernel_rows(figures), figures, options.json)


def add_options(parser: argparse.ArgumentParser) -> None:
    """--sizes, --layers, --kernels."""
    parser.add_argument("--sizes", nargs="*", default=OFFICIAL, choices=SHAPES, help="models")
    parser.add_argument("--layers", type=int, help="only so many layers, for a quick look")
    parser.add_argument("--kernels", action="store_true", help="time each kernel by itself too")


def parity(session: CudaSession) -> dict[str, float]:
    """How far a prompt, and steps of many streams, are from single steps of few."""
    tokens = np.random.default_rng(0).integers(0, session.spec.vocab_size, (40, 64))
    few, chunked = session.initial_state(8), session.initial_state(8)
    for row in tokens[:, :8]:
        expected = session.step(row, few)
    many = session.initial_state(64)
    for row in tokens:
        found = session.step(row, many)
    return {
        "prompt": relative(session.prefill(tokens[:, :8].T, chunked), expected),
        "streams": relative(found[:8], expected),
    }


def prompt_seconds(session: CudaSession, count: int, runs: int) -> float:
    """Of `Session.prefill` with one stream, tokens in and the last logits out."""
    prompt, state = [[5] * count], session.initial_state()
    found = []
    for _ in range(4 + runs):  # the first four compile and capture
        start = time.perf_counter()
        session.prefill(prompt, state)
        found.append(time.perf_counter() - start)
    return statistics.median(found[4:])


def step_seconds(session: CudaSession, batch: int, runs: int) -> float:
    """Of a step of so many streams on the GPU, the greedy choice fed back."""
    state = session.initial_state(batch)
    return statistics.median(session.step_seconds(state, STEPS) for _ in range(min(runs, 5)))


def kernels_of(session: CudaSession, batch: int, tokens: int) -> list[dict[str, Any]]:
    """Each kernel of a layer: its name, seconds, floating-point operations and bytes of weights and states."""
    state = session.initial_state(batch)
    chain = session._pieces.chain(batch * tokens)
    rows = Rows(batch, tokens, chain.ids, state.places(0), state.side, state.halted)
    launches, layers = chain.launches(rows), session.spec.n_layer
    each = len(launches) // layers
    found = []
    for place, (what, flops, nbytes) in enumerate(work_of(session._dimensions, batch, tokens)):
        same = launches[place::each][1:]
        seconds = launch_seconds(session, same)
        name = f"{launches[each + place].kernel.source.removesuffix('.cu')}: {what}"
        found.append({"kernel": name, "s": seconds, "flops": flops, "bytes": nbytes})
    return found


def launch_seconds(session: CudaSession, launches: Sequence[Launch]) -> float:
    """Of one of the launches, in a graph of several rounds of all of them."""
    driver = session._driver
    with driver.capture() as graph:
        for _ in range(ROUNDS):
            for launch in launches:
                kernel = launch.kernel
                driver.launch(launch.function, kernel.grid, kernel.threads, kernel.shared, launch.pointers, early=False)
    graph.launch()
    seconds = min(driver.elapsed_ms(graph.launch) for _ in range(5)) / 1e3
    graph.close()
    return seconds / (ROUNDS * len(launches))


def work_of(d: Dimensions, batch: int, tokens: int) -> list[tuple[str, float, float]]:
    """What, floating-point operations, and bytes of weights and states, of each kernel of a layer but the first."""
    rows, ranks = batch * tokens, d.rank_w + d.rank_a + d.rank_g + d.rank_v
    first, second = d.width * (3 * d.inner + ranks), d.inner * ranks
    state = batch * d.inner * d.head_size
    recurrence = [("wkv", 0.0 if tokens == 1 else 10.0 * rows * d.inner * d.head_size, 8.0 * state)]
    if tokens > 1:
        recurrence.append(("gate", 0.0, 16.0 * rows * d.inner))
    return [
        ("six mixes", 0.0, rows * d.width * (8.0 + 12.0)),
        ("r k v, first halves", 2.0 * rows * first, 2.0 * first),
        ("second halves", 2.0 * rows * second, 2.0 * second),
        *recurrence,
        ("output", 2.0 * rows * d.inner * d.width, 2.0 * d.inner * d.width),
        ("mix", 0.0, rows * d.width * (8.0 + 2.0)),
        ("key", 2.0 * rows * d.width * d.hidden, 2.0 * d.width * d.hidden),
        ("value", 2.0 * rows * d.width * d.hidden, 2.0 * d.width * d.hidden),
    ]


def rows_of(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table so far."""
    return [
        (size, *(f"{n:,.0f}" for kind in ("prompt", "streams") for n in figures[size][kind].values()))
        for size in SHAPES
        if size in figures
    ]


def kernel_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each kernel; the share is of a layer."""
    found: list[tuple[str, ...]] = []
    for size in (size for size in SHAPES if size in figures):
        for rows, kernels in figures[size]["kernels"].items():
            whole = sum(kernel["s"] for kernel in kernels)
            for k in kernels:
                rates = (f"{k['flops'] / k['s'] / 1e12:.0f}" if k["flops"] else "", f"{k['bytes'] / k['s'] / 1e9:.0f}")
                found.append((size, rows, k["kernel"], f"{1e6 * k['s']:.1f}", *rates, f"{100 * k['s'] / whole:.0f} %"))
            found.append((size, rows, "layer", f"{1e6 * whole:.1f}", "", "", ""))
    return found


if __name__ == "__main__":
    main()
