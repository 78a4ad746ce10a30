"""One stream, token by token, through ONNX Runtime on a GPU: RWKV-7 of the official shapes in fp16, random weights.

Needs torch with CUDA beside onnxruntime-gpu. Every size is compared with the CPU before it is timed. The state is
carried: every step reads what the one before it wrote. ``--provider cpu --sizes tiny`` tries the script out anywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, in_turns, relative, report

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.describe import describe
from rwkv_edge.evaluation.roofline import read_bandwidth
from rwkv_edge.evaluation.synthetic import OFFICIAL_7, Shape7, random_v7, save_pth
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.ort_device import DeviceState
from rwkv_edge.runtime.session import open_session

SHAPES = OFFICIAL_7 | {"tiny": Shape7(2, 64, 256, ranks=(8, 8, 8, 8))}
PROTOTYPE = {"0.1B": 2.05e-3, "0.4B": 4.34e-3, "1.5B": 5.22e-3}
"""Seconds of a step of the first prototype: a graph of 1125 or 2253 plain operators, same card, CUDA graph."""

PARITY_TOKENS = {"1.5B": 4}  # the CPU computes in fp32 with widened weights: 6 GB a token
TOLERANCE = 2e-2  # relative, fp16 on the GPU against fp16 widened to fp32 on the CPU
STEPS = 60
PROMPT = 512


def main() -> None:
    """Parity and times of every size, one table."""
    options = arguments(__doc__ or "", add_options)
    gpu = options.provider != "cpu"
    bandwidth = copy_bandwidth(options.runs) if gpu else read_bandwidth() * 1e9
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name() if gpu else "none", "copy_gb_s": bandwidth / 1e9}
    rows = []
    for size in options.sizes:
        found = figures[size] = measured(size, options, bandwidth)
        ratio = f"{found['ratio']:.2f} x" if "ratio" in found else ""
        times = (f"{1e3 * found[name]:.3f}" for name in ("limit_s", "graph_s", "step_s", "plain_s"))
        share = f"{100 * found['limit_s'] / found['graph_s']:.0f} %"
        rows.append((size, found["nodes"], *times, f"{1 / found['step_s']:.0f}", share, ratio))
        print(rows[-1], flush=True)
    title = f"Decode, RWKV-7 fp16, ONNX Runtime {options.provider}, {figures['gpu']}; copies {bandwidth / 1e9:.0f} GB/s"
    header = ("model", "nodes", "limit ms", "CUDA graph ms", "step with transfers ms", "without graph ms", "tokens/s")
    write = partial(report, title, (*header, "share of limit", "prototype / CUDA graph"), rows, figures, options.json)
    write()
    if options.kernels:
        for size in options.sizes:
            figures[size]["kernels"] = kernels(artifact_of(size, options), options.provider)
        write()


def add_options(parser: argparse.ArgumentParser) -> None:
    """--sizes, --provider, --layers, --kernels."""
    parser.add_argument("--sizes", nargs="+", default=list(PROTOTYPE), choices=SHAPES, help="shapes to measure")
    parser.add_argument("--provider", default="cuda", help="execution provider of ONNX Runtime")
    parser.add_argument("--layers", type=int, help="only so many layers, for a quick look")
    parser.add_argument("--kernels", action="store_true", help="also count the kernels of a step, by torch's profiler")


def measured(size: str, options: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """All figures of one size."""
    artifact = artifact_of(size, options)
    figures: dict[str, Any] = {}
    figures["nodes"], nbytes = facts(artifact)
    figures["limit_s"] = nbytes / bandwidth
    figures["relative_difference"] = parity(artifact, options.provider, PARITY_TOKENS.get(size, 16))
    before = used_memory()
    session = opened(artifact, options.provider)
    figures["memory_step"] = used_memory() - before
    plain = opened(artifact, f"{options.provider}:enable_cuda_graph=0" if options.provider == "cuda" else "cpu")
    figures |= times(session, plain, options.runs)
    if size in PROTOTYPE and not options.layers and options.provider == "cuda":
        figures["ratio"] = PROTOTYPE[size] / figures["graph_s"]
    plain.close()
    del plain
    gc.collect()
    before = used_memory()
    figures["prefill_tokens_per_second"] = prefill_speed(session, options.runs)
    figures["memory_of_prefill_graph"] = used_memory() - before
    session.close()
    return figures


def artifact_of(size: str, options: argparse.Namespace) -> Path:
    """The artifact, made once."""
    shape = SHAPES[size]
    if options.layers:
        shape = dataclasses.replace(shape, n_layer=options.layers)
    artifact: Path = options.work / f"step-gpu-{size}-{shape.n_layer}"
    if not artifact.exists():
        path = save_pth(random_v7(shape, dtype=torch.float16), options.work / f"{artifact.name}.pth")
        choices = ExportOptions(precision="fp16", chunks=(256,), tokenizer="none")
        export_checkpoint(open_checkpoint(path), artifact, choices)
        path.unlink()
    return artifact


def facts(artifact: Path) -> tuple[int, float]:
    """Nodes of the step, and the bytes that it moves, from `describe`'s bound at 1 GB/s."""
    found = describe(artifact, 1.0)
    return found["graphs"][0]["nodes"], 1e9 / float(found["tokens_per_second_bound"]["fp16"]["this machine"])


def opened(artifact: Path, provider: str) -> OrtSession:
    """A session, its files not hashed again."""
    session = open_session(artifact, providers=[provider], check_content=False)
    if not isinstance(session, OrtSession):
        raise SystemExit("the session is not ONNX Runtime's")
    return session


def parity(artifact: Path, provider: str, tokens: int) -> float:
    """Largest relative difference of the logits from the CPU's; no figure without it."""
    ids = np.random.default_rng(0).integers(0, 256, tokens)
    logits = []
    for name in ("cpu", provider):
        session = opened(artifact, name)
        state = session.initial_state()
        logits.append(np.concatenate([session.step([int(t)], state) for t in ids]))
        session.close()
    difference = relative(logits[1], logits[0])
    if not difference <= TOLERANCE:
        raise SystemExit(f"parity is not green: relative difference {difference:.2g}")
    return difference


def times(session: OrtSession, plain: OrtSession, runs: int) -> dict[str, float]:
    """Median seconds of a step: its CUDA graph alone, the same with transfers, and the run without a graph."""
    measures = {"graph_s": runner(session), "step_s": stepper(session), "plain_s": runner(plain)}
    for call in measures.values():
        for _ in range(4):
            call()
    turns = in_turns({name: lambda call=call: seconds(call) for name, call in measures.items()}, runs)  # type: ignore[misc]
    return {name: turns.median(name) for name in measures}


def stepper(session: OrtSession) -> Callable[[], object]:
    """`OrtSession.step` on a state of its own."""
    state = session.initial_state()
    return lambda: session.step([5], state)


def runner(session: OrtSession) -> Callable[[], object]:
    """The run alone: no token goes in, no logits come out."""
    state, graph = session.initial_state(), session._step
    if not isinstance(state, DeviceState):
        return stepper(session)
    session.step([5], state)
    session.step([5], state)

    def run() -> None:
        bound = state._memory.bound(state._room, graph, state.current, 1)
        graph.session.run_with_iobinding(bound.binding, bound.run_options)
        state.current = 1 - state.current

    return run


def seconds(call: Callable[[], object]) -> float:
    """Median of some calls, each of which waits for the GPU."""
    found = []
    for _ in range(STEPS):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def prefill_speed(session: OrtSession, runs: int) -> float:
    """Tokens a second of a prompt."""
    state, prompt = session.initial_state(), [[5] * PROMPT]
    session.prefill(prompt, state)
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        session.prefill(prompt, state)
        found.append(time.perf_counter() - start)
    return PROMPT / statistics.median(found)


def kernels(artifact: Path, provider: str) -> dict[str, Any]:
    """Kernels that one replay launches: how many, their time, and the names that take most of it."""
    session = opened(artifact, provider)
    run = runner(session)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    session.close()
    events = [e for e in profile.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    return {
        "count": sum(e.count for e in events),
        "busy_s": sum(e.self_device_time_total for e in events) / 1e6,
        "names": [(e.key[:120], e.count, round(e.self_device_time_total, 1)) for e in events[:40]],
    }


def used_memory() -> int:
    """Bytes of the GPU's memory that are taken, by anybody."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def copy_bandwidth(runs: int) -> float:
    """Bytes read plus bytes written each second by a copy of 1 GiB."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    event: Any = torch.cuda.Event  # untyped in torch
    found = []
    for _ in range(4 * runs):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        found.append(float(start.elapsed_time(end)) / 1e3)
    del source
    torch.cuda.empty_cache()
    return 2 * target.nbytes / statistics.median(found)


if __name__ == "__main__":
    main()
