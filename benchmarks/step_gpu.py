"""One stream, token by token, on a GPU: RWKV-7 of the official shapes in fp16, by ONNX Runtime and by our own kernels.

Needs torch with CUDA beside onnxruntime-gpu and cuda-bindings. The weights are random: two blocks are drawn and the
second is repeated (`tiled_v7`), each at a place of its own in the GPU's memory. With such weights half of the hidden
channels are zero behind relu²; the fused kernels skip their rows of ffn.value, but the limit counts them. Every engine
is compared with the CPU before it is timed, and the state is carried: every step reads what the one before it wrote.

``--provider cpu --onnxruntime tiny --fused --no-kernels`` (no size after --fused) tries the script out anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from typing import Any

import numpy as np
import torch
from common import arguments, in_turns, relative, report
from step_gpu_engines import (
    FUSED,
    ORT,
    Engine,
    copy_bandwidth,
    fused_engine,
    greedy_is_argmax,
    kernels_of,
    logits_of,
    onnxruntime_engine,
    prefill_speed,
    used_memory,
)
from step_gpu_models import SHAPES, Reference, artifact_of, facts

from rwkv_edge.evaluation.roofline import read_bandwidth
from rwkv_edge.runtime.cuda import CudaSession

PROTOTYPE = {"0.1B": 2.05e-3, "0.4B": 4.34e-3, "1.5B": 5.22e-3}
"""Seconds of a step of the first prototype: a graph of 1125 or 2253 plain operators, same card, CUDA graph."""

ALBATROSS = {"0.1B": 0.855e-3, "0.4B": 1.243e-3, "1.5B": 1.824e-3, "2.9B": 3.117e-3}
"""Seconds of a step of Albatross v3a (package rwkv-quant-nv) on an H100 80GB, measured in another run: CUDA graph, no
sampling, random weights of these shapes, the state in fp16."""

TOLERANCE = {ORT: 5e-2, FUSED: 5e-3}
"""Relative, against float32 on the CPU with the same rounded weights. ONNX Runtime's activations are fp16: the rounding
of every node to 11 bits goes through up to 24 random layers, and eager torch in fp16 is 1.2e-2 off at 0.4B as well.
The fused kernels keep activations in float32 and round the token-shift states alone: 4e-4 in torch at 0.4B."""

GREEN = "green"
PARITY_TOKENS = 16
HEADER = (
    "model", "engine", "kernels", "limit ms", "step ms", "call ms", "without graph ms", "tokens/s", "share of limit",
    "prototype / step", "Albatross v3a ms, another run",
)  # fmt: skip
"""'step' is the GPU alone: by the fused kernels with the greedy choice fed back, by ONNX Runtime without any choice.
'call' is `Session.step`, with the token and the logits; tokens/s are of that for ONNX Runtime, whose logits a host must
read to choose, and of the step for the fused kernels."""


def main() -> None:
    """Parity and times of every size, one table."""
    start = time.perf_counter()
    options = arguments(__doc__ or "", add_options)
    gpu = options.provider != "cpu"
    bandwidth = copy_bandwidth(options.runs) if gpu else read_bandwidth() * 1e9
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name() if gpu else "none", "copy_gb_s": bandwidth / 1e9}
    title = f"Decode of one stream, RWKV-7 fp16, random weights, {figures['gpu']}; copies {bandwidth / 1e9:.0f} GB/s"
    chosen = [size for size in SHAPES if size in (*options.onnxruntime, *options.fused)]

    def write() -> None:
        figures["seconds"] = time.perf_counter() - start
        report(title, HEADER, rows_of(figures, options), figures, options.json)

    for size in chosen:
        figures[size] = measured(size, options, bandwidth)
        gc.collect()
        write()
    if options.kernels:  # last: what was profiled may be slower from then on
        for size in chosen:
            count_kernels(size, options, figures[size])
        write()
    failed = [
        f"{size}, {n}: {figures[size][n]['parity']}"
        for size in chosen
        for n in (ORT, FUSED)
        if n in figures[size] and figures[size][n]["parity"] != GREEN
    ]
    if failed:
        raise SystemExit("parity is not green, so there are no figures of " + "; ".join(failed))


def add_options(parser: argparse.ArgumentParser) -> None:
    """--onnxruntime, --fused, --provider, --layers, --no-kernels."""
    parser.add_argument("--onnxruntime", nargs="*", default=list(PROTOTYPE), choices=SHAPES, help="sizes that it runs")
    parser.add_argument("--fused", nargs="*", default=list(ALBATROSS), choices=SHAPES, help="sizes our kernels run")
    parser.add_argument("--provider", default="cuda", help="execution provider of ONNX Runtime")
    parser.add_argument("--layers", type=int, help="only so many layers, for a quick look")
    parser.add_argument("--no-kernels", dest="kernels", action="store_false", help="do not count them with a profiler")


def engines_of(size: str, options: argparse.Namespace) -> list[tuple[str, contextlib.AbstractContextManager[Engine]]]:
    """The engines that run a size, not open yet."""
    artifact = artifact_of(size, options.layers, options.work)
    found: list[tuple[str, contextlib.AbstractContextManager[Engine]]] = []
    if size in options.onnxruntime:
        found.append((ORT, onnxruntime_engine(artifact, options.provider)))
    if size in options.fused:
        found.append((FUSED, fused_engine(artifact)))
    return found


def measured(size: str, options: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """All figures of one size; its engines are timed in turns."""
    start = time.perf_counter()
    artifact = artifact_of(size, options.layers, options.work)
    nodes, nbytes = facts(artifact)
    figures: dict[str, Any] = {"nodes": nodes, "limit_s": nbytes / bandwidth, "export_s": time.perf_counter() - start}
    tokens = np.random.default_rng(0).integers(0, SHAPES[size].vocab_size, PARITY_TOKENS)
    expected = Reference(artifact).logits(tokens)
    gc.collect()
    with contextlib.ExitStack() as stack:
        engines = {}
        for name, opening in engines_of(size, options):
            before = used_memory()
            engine = stack.enter_context(opening)
            figures[name] = {"relative_difference": relative(logits_of(engine.session, tokens), expected)}
            figures[name]["memory"] = used_memory() - before
            figures[name]["parity"] = parity(name, engine, figures[name]["relative_difference"], int(tokens[0]))
            if figures[name]["parity"] == GREEN:
                engines[name] = engine
        timed = {(name, m): call for name, engine in engines.items() for m, call in engine.measures.items()}
        for call in timed.values():
            call()
        turns = in_turns({"/".join(key): call for key, call in timed.items()}, options.runs)
        for name, measure in timed:
            figures[name][measure] = turns.median(f"{name}/{measure}")
        for name, engine in engines.items():
            figures[name]["prefill_tokens_per_second"] = prefill_speed(engine.session, options.runs)
    figures["seconds"] = time.perf_counter() - start
    return figures


def parity(name: str, engine: Engine, difference: float, token: int) -> str:
    """`GREEN`, or why there are no figures of this engine."""
    if not difference <= TOLERANCE[name]:
        return f"the relative difference is {difference:.2g}, at most {TOLERANCE[name]:g} is right"
    if isinstance(engine.session, CudaSession) and not greedy_is_argmax(engine.session, token, PARITY_TOKENS):
        return "the greedy choice on the GPU is not that of the logits"
    return GREEN


def count_kernels(size: str, options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Add what a profiler sees of one step of every engine."""
    for name, opening in engines_of(size, options):
        if figures[name]["parity"] != GREEN:
            continue
        with opening as engine:
            figures[name]["kernels"] = kernels_of(engine.once)
        gc.collect()


def rows_of(figures: dict[str, Any], options: argparse.Namespace) -> list[tuple[str, ...]]:
    """The table so far."""
    rows = []
    comparable = options.provider != "cpu" and not options.layers
    for size in SHAPES:
        for name in (ORT, FUSED):
            found = figures.get(size, {}).get(name)
            if found is None or found["parity"] != GREEN:
                continue
            limit, step = figures[size]["limit_s"], found["step_s"]
            rows.append((
                size, name, str(found["kernels"]["count"]) if "kernels" in found else "",
                *(f"{1e3 * t:.3f}" if t else "" for t in (limit, step, found["call_s"], found.get("plain_s"))),
                f"{1 / (step if name == FUSED else found['call_s']):.0f}", f"{100 * limit / step:.0f} %",
                f"{PROTOTYPE[size] / step:.2f} x" if size in PROTOTYPE and comparable else "",
                f"{1e3 * ALBATROSS[size]:.3f}" if size in ALBATROSS and comparable else "",
            ))  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
