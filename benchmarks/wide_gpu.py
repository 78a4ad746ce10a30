"""Prompts and many streams at once through our wide kernels: RWKV-7 of the official shapes on a GPU.

The weights are random (see `step_gpu_models.py`). Before anything is timed, a prompt and steps of many streams are
compared with single steps of few, which `step_gpu.py` compares with the CPU. With ``--kernels`` each kernel is timed by
itself: those of all layers in a row, so that every one finds its weights in memory and not in the cache. With
``--few`` steps of a few streams run both ways, through the wide kernels and through matrix-vector products.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, relative, report
from step_gpu_models import FLOAT, SCHEMES, SHAPES, float_artifact, quantized_artifact

from rwkv_edge.artifact import Artifact
from rwkv_edge.plugins.fused_spec import MAX_BATCH, Dimensions
from rwkv_edge.runtime.cuda import CudaSession
from rwkv_edge.runtime.cuda_launch import Launch
from rwkv_edge.runtime.cuda_wide import Rows

OFFICIAL = ("0.1B", "0.4B", "1.5B", "2.9B")
BATCHES = (8, 16, 32, 64, 128)
FEW = (2, 3, 4, 5, 6, 8)
PROMPTS = (128, 512, 2048)
STEPS = 20  # of a measure
TOLERANCE = 5e-3
PROFILED = {"prompt of 512": (1, 512), "64 streams": (64, 1)}
TITLE = "RWKV-7, random weights, tokens/s of all streams together"
ROUNDS = 3  # of all layers, in the measure of a kernel
HEADER = ("model", *(f"prompt of {n}" for n in PROMPTS), *(f"{n} streams" for n in BATCHES))
FEW_HEADER = ("model", "streams", "wide, µs a step", "matrix-vector products, µs a step")
KERNEL_HEADER = ("model", "rows", "kernel", "µs", "TFLOP/s", "GB/s", "share")


def main() -> None:
    """Parity and tokens/s of every size, one table; then the kernels."""
    start = time.perf_counter()
    options = arguments(__doc__ or "", add_options)
    figures: dict[str, Any] = {}
    for size in options.sizes:
        for form in options.forms:
            session = CudaSession(Artifact.open(artifact_of(size, form, options)), check_content=False)
            figures["gpu"] = session._driver.name
            figures[f"{size} {form}"] = figures_of(session, f"{size} {form}", options)
            session.close()
            figures["seconds"] = time.perf_counter() - start
            report(TITLE, HEADER, rows_of(figures), figures, options.json)
    if options.few:
        report(TITLE, FEW_HEADER, few_rows(figures), figures, options.json)
    if options.kernels:
        report(TITLE, KERNEL_HEADER, kernel_rows(figures), figures, options.json)


def figures_of(session: CudaSession, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All that is measured of a model, once its parity is green."""
    found: dict[str, Any] = {"parity": parity(session)}
    if not max(found["parity"].values()) <= TOLERANCE:
        raise SystemExit(f"parity of {name} is not green, so there are no figures: {found['parity']}")
    found["prompt"] = {n: n / prompt_seconds(session, n, options.runs) for n in PROMPTS}
    found["streams"] = {n: n / step_seconds(session, n, options.runs) for n in BATCHES}
    if options.few:
        found["few"] = {n: both_ways(session, n, options.runs) for n in FEW}
    if options.kernels:
        found["kernels"] = {rows: kernels_of(session, *counts) for rows, counts in PROFILED.items()}
    return found


def artifact_of(size: str, form: str, options: argparse.Namespace) -> Path:
    """Made once; a quantized one of the float one."""
    plain = float_artifact(size, options.layers, options.work)
    return plain if form == FLOAT else quantized_artifact(size, options.layers, form, options.work)


def add_options(parser: argparse.ArgumentParser) -> None:
    """--sizes, --forms, --layers, --kernels, --few."""
    parser.add_argument("--sizes", nargs="*", default=OFFICIAL, choices=SHAPES, help="models")
    parser.add_argument("--forms", nargs="*", default=(FLOAT,), choices=(FLOAT, *SCHEMES), help="of the weights")
    parser.add_argument("--few", action="store_true", help="time steps of a few streams both ways")
    parser.add_argument("--layers", type=int, help="only so many layers, for a quick look")
    parser.add_argument("--kernels", action="store_true", help="time each kernel by itself too")


def parity(session: CudaSession) -> dict[str, float]:
    """How far a prompt, and steps of many streams, are from single steps of few by matrix-vector products."""
    tuning = session.tuning
    session.retune(replace(tuning, wide_from=MAX_BATCH + 1))
    tokens = np.random.default_rng(0).integers(0, session.spec.vocab_size, (40, 64))
    few, chunked = session.initial_state(8), session.initial_state(8)
    for row in tokens[:, :8]:
        expected = session.step(row, few)
    session.retune(tuning)
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


def both_ways(session: CudaSession, batch: int, runs: int) -> dict[str, float]:
    """Microseconds of a step through the wide kernels, and through a chain of matrix-vector products."""
    tuning, found = session.tuning, {}
    for name, wide_from in (("wide_us", batch), ("narrow_us", MAX_BATCH + 1)):
        session.retune(replace(tuning, wide_from=wide_from))
        found[name] = 1e6 * step_seconds(session, batch, runs)
    session.retune(tuning)
    return found


def kernels_of(session: CudaSession, batch: int, tokens: int) -> dict[str, dict[str, float]]:
    """Each kernel of a layer by name: microseconds, TFLOP/s, GB/s of fp16 weights and states, and its share."""
    state = session.initial_state(batch)
    chain = session._pieces.chain(batch * tokens)
    rows = Rows(batch, tokens, chain.ids, state.places(0), state.side, state.halted)
    launches, layers = chain.launches(rows), session.spec.n_layer
    each = len(launches) // layers
    found = {}
    for place, (what, flops, nbytes) in enumerate(work_of(session._dimensions, batch, tokens)):
        same = launches[place::each][1:]
        seconds = launch_seconds(session, same)
        name = f"{launches[each + place].kernel.source.removesuffix('.cu')}: {what}"
        found[name] = {"us": 1e6 * seconds, "tflops": flops / seconds / 1e12, "gbs": nbytes / seconds / 1e9}
    whole = sum(kernel["us"] for kernel in found.values())
    return {name: {**kernel, "share": kernel["us"] / whole} for name, kernel in found.items()}


def launch_seconds(session: CudaSession, launches: Sequence[Launch]) -> float:
    """Of one of the launches, in a graph of several rounds of all of them."""
    driver = session._driver
    graph = session._loaded.captured([[launch] for _ in range(ROUNDS) for launch in launches])
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
        (model, *(f"{n:,.0f}" for kind in ("prompt", "streams") for n in found[kind].values()))
        for model, found in models_of(figures)
    ]


def few_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each number of streams."""
    return [
        (model, str(n), f"{ways['wide_us']:.0f}", f"{ways['narrow_us']:.0f}")
        for model, found in models_of(figures)
        for n, ways in found["few"].items()
    ]


def models_of(figures: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What was measured of each."""
    return ((name, found) for name, found in figures.items() if isinstance(found, dict))


def kernel_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each kernel; the share is of a layer."""
    return [
        (
            model, rows, name, f"{k['us']:.1f}", f"{k['tflops']:.0f}" if k["tflops"] else "", f"{k['gbs']:.0f}",
            f"{100 * k['share']:.0f} %",
        )
        for model, measured in models_of(figures)
        for rows, kernels in measured["kernels"].items()
        for name, k in kernels.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
