"""RWKV-7 of the official shapes on a GPU: our fused kernels with fp16, int8 and int4 weights, Albatross, ONNX Runtime.

One stream token by token, 64 streams token by token, and a prompt of 512 tokens. Needs torch with CUDA and
cuda-bindings; ``--albatross`` names the wheel of rwkv-quant-nv; ONNX Runtime takes part where it has the provider. The
weights are random: two blocks are drawn and the second is repeated, each at a place of its own in the GPU's memory.
With such weights half of the hidden channels are zero behind relu²; Albatross and the fused kernels skip their rows of
ffn.value, but the limit counts them. Every engine is compared with a reference in float64 before it is timed, and the
state is carried: every step reads what the one before it wrote.

``--provider cpu --sizes tiny --forms --onnxruntime tiny --workers 0`` tries the script out anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import albatross
import numpy as np
import onnxruntime
import torch
from common import arguments, in_turns, report
from step_gpu_engines import (
    ALBATROSS,
    FUSED,
    ORT,
    PROMPT,
    STREAMS,
    WORST,
    Engine,
    Expected,
    albatross_engine,
    copy_bandwidth,
    differences,
    fused_engine,
    greedy_is_argmax,
    onnxruntime_engine,
    used_memory,
    warmed,
)
from step_gpu_models import (
    FLOAT,
    SCHEMES,
    SHAPES,
    Reference,
    artifact_with_graphs,
    checkpoint_place,
    moved_bytes,
    place_of,
    prepared,
)

from rwkv_edge.evaluation.roofline import read_bandwidth, usable_cores

OFFICIAL = ("0.1B", "0.4B", "1.5B", "2.9B")
TARGETS = {
    FLOAT: {"0.1B": 0.25e-3, "0.4B": 0.50e-3, "1.5B": 1.30e-3, "2.9B": 2.40e-3},
    "W8": {"0.1B": 0.21e-3, "0.4B": 0.38e-3, "1.5B": 0.85e-3, "2.9B": 1.45e-3},
}
"""Seconds of a step that the fused kernels were made for, on an H100: the floor, not the aim."""

TOLERANCE = {ORT: 5e-2, ALBATROSS: 1e-1, FUSED: 5e-3}
"""Relative, against float64 with the same rounded weights. Activations of ONNX Runtime and Albatross are fp16: the
rounding of every node to 11 bits goes through up to 32 random layers, and eager torch in fp16 is 1.2e-2 off at 0.4B as
well; Albatross keeps the state in fp16 too, with dithered decays. The fused kernels keep activations and the state's
matrices in float32 and round the token-shift states alone: 4e-4 in torch at 0.4B."""

WIDE_TOLERANCE = 1e-2
"""Of the fused kernels in prompts and batches, where tensor cores take activations in fp16 as well."""

WORST_TOLERANCE = 0.25
"""Of the worst of many streams, in every engine; see `step_gpu_engines.differences`."""

GREEN = "green"
PARITY_TOKENS, PARITY_STREAM_TOKENS = 16, 5
SLOW_RUNS = 3  # turns of batches and prompts
HEADER = (
    "model", "engine", "limit ms", "step ms", "share of limit", "tokens/s", "sampled ms", "call ms", "Albatross / step",
    f"{STREAMS} streams, tokens/s", f"prompt of {PROMPT}, tokens/s", "memory MB", "note",
)  # fmt: skip
"""'step' is the GPU alone: by the fused kernels and Albatross with the greedy choice fed back, by ONNX Runtime without
any choice. 'sampled' draws on the GPU, by temperature, top-k, top-p and penalties, with all of the host's part. 'call'
is `Session.step`, with the token and the logits. 'Albatross / step' takes Albatross's time without
embedding and choice, as its own benchmark does."""

Opening = Callable[[], contextlib.AbstractContextManager[Engine]]


def main() -> None:
    """Parity and times of every size, one table."""
    start = time.perf_counter()
    options = arguments(__doc__ or "", add_options)
    gpu = options.provider != "cpu"
    folder = albatross.unpacked(options.albatross, options.work) if options.albatross else None
    builds = albatross.start_builds(folder, options.work) if folder else []
    sizes = [size for size in SHAPES if size in options.sizes]
    options.onnxruntime = onnxruntime_sizes(options)
    prepared(sizes, options.layers, options.forms, options.work, options.workers, warmed if gpu else None)
    albatross.finish_builds(builds)
    bandwidth = copy_bandwidth(options.runs) if gpu else read_bandwidth() * 1e9
    figures: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if gpu else "none",
        "copy_gb_s": bandwidth / 1e9,
        "albatross": f"rwkv-quant-nv {albatross.version_of(folder)}" if folder else None,
        "prepared_s": time.perf_counter() - start,
    }
    figures["tuned"] = f"{' and '.join(options.tune)}, {options.tune_seconds:g} s each" if options.tune else "none"
    title = f"RWKV-7 decode and prefill, random weights, {figures['gpu']}; copies {bandwidth / 1e9:.0f} GB/s"
    for size in sizes:
        figures[size] = measured(size, options, folder, bandwidth)
        release_memory()
        figures["seconds"] = time.perf_counter() - start
        report(title, HEADER, rows_of(figures), figures, options.json)
    refuse_red(figures)


def add_options(parser: argparse.ArgumentParser) -> None:
    """--sizes, --forms, --tune, --tune-seconds, --albatross, --onnxruntime, --provider, --layers, --workers."""
    forms = (FLOAT, *SCHEMES)
    parser.add_argument("--sizes", nargs="*", default=OFFICIAL, choices=SHAPES, help="models")
    parser.add_argument("--forms", nargs="*", default=forms, choices=forms, help="weights that our kernels run")
    parser.add_argument(
        "--tune", nargs="*", default=(), choices=forms, help="forms that are tuned before they are timed"
    )
    parser.add_argument("--tune-seconds", type=float, default=60, help="of the search for each size and form")
    parser.add_argument("--albatross", type=Path, help="wheel of rwkv-quant-nv, or the folder it was unpacked into")
    parser.add_argument("--onnxruntime", nargs="*", default=OFFICIAL[:3], choices=SHAPES, help="sizes that it runs")
    parser.add_argument("--provider", default="cuda", help="execution provider of ONNX Runtime; cpu: no GPU at all")
    parser.add_argument("--layers", type=int, help="only so many layers, for a quick look")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes that make artifacts; 0: none")


def onnxruntime_sizes(options: argparse.Namespace) -> list[str]:
    """Those that ONNX Runtime runs here: none without its CUDA provider, which is said."""
    if options.provider == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        print(f"ONNX Runtime {onnxruntime.__version__} has no CUDA provider here, so it is left out")
        return []
    return [size for size in options.sizes if size in options.onnxruntime]


def refuse_red(figures: dict[str, Any]) -> None:
    """End with an error where the parity of an engine is not green."""
    failed = [f"{size}, {name}: {found['parity']}" for size, name, found in engines_in(figures) if not is_green(found)]
    if failed:
        raise SystemExit("parity is not green, so there are no figures of " + "; ".join(failed))


def form_name(form: str) -> str:
    """Of our engine with these weights."""
    return FUSED if form == FLOAT else f"{FUSED} {form}"


def openings(size: str, options: argparse.Namespace, folder: Path | None) -> Iterator[tuple[str, str, Opening]]:
    """Name, form of the weights and how to open it, of every engine that runs a size."""
    for form in options.forms:
        artifact = place_of(size, options.layers, form, options.work)
        seconds = options.tune_seconds if form in options.tune else 0
        yield form_name(form), form, functools.partial(fused_engine, artifact, seconds)
    if folder is not None:
        checkpoint = checkpoint_place(size, options.layers, options.work)
        yield ALBATROSS, FLOAT, functools.partial(albatross_engine, folder, checkpoint)
    if size in options.onnxruntime:
        artifact = artifact_with_graphs(size, options.layers, options.work)
        yield ORT, FLOAT, functools.partial(onnxruntime_engine, artifact, options.provider)


def measured(size: str, options: argparse.Namespace, folder: Path | None, bandwidth: float) -> dict[str, Any]:
    """All figures of one size; its engines are timed in turns."""
    start = time.perf_counter()
    limits = {
        form: moved_bytes(place_of(size, options.layers, form, options.work)) / bandwidth
        for form in {FLOAT, *options.forms}
    }
    expected = {form: expected_of(size, form, options) for form in limits}
    figures: dict[str, Any] = {"limit_s": limits[FLOAT]}
    with contextlib.ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for name, form, opening in openings(size, options, folder):
            before = used_memory()
            engine = stack.enter_context(opening())
            figures[name] = checked(name, engine, expected[form])
            figures[name] |= {"memory": used_memory() - before, "limit_s": limits[form]}
            if engine.tuning:
                figures[name]["tuning"] = engine.tuning
            if is_green(figures[name]):
                engines[name] = engine
        timed(engines, figures, options)
    for form in options.forms:
        found, target = figures[form_name(form)], TARGETS.get(form, {}).get(size)
        if target and "step_s" in found and not options.layers:
            found |= {"target_s": target, "meets_target": found["step_s"] <= target}
    figures["seconds"] = time.perf_counter() - start
    return figures


def expected_of(size: str, form: str, options: argparse.Namespace) -> Expected:
    """Logits of the reference for random tokens."""
    reference = Reference(place_of(size, options.layers, form, options.work))
    draw, vocabulary = np.random.default_rng(0), SHAPES[size].vocab_size
    one = draw.integers(0, vocabulary, (PARITY_TOKENS, 1))
    streams = draw.integers(0, vocabulary, (PARITY_STREAM_TOKENS, STREAMS))
    found = Expected((one, reference.logits(one)), (streams, reference.logits(streams)))
    del reference
    release_memory()
    return found


def release_memory() -> None:
    """Give what torch holds for later back to the GPU, where others need it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def checked(name: str, engine: Engine, expected: Expected) -> dict[str, Any]:
    """Differences from the reference, and 'parity': `GREEN`, or why there are no figures of this engine."""
    fused, found = name.startswith(FUSED), differences(engine, expected)
    most = dict.fromkeys(found, WIDE_TOLERANCE if fused else TOLERANCE[name]) | {WORST: WORST_TOLERANCE}
    if fused:
        most["steps"] = TOLERANCE[FUSED]
    wrong = [f"{kind} {found[kind]:.2g}, at most {most[kind]:g}" for kind in found if not found[kind] <= most[kind]]
    parity = GREEN
    if wrong:
        parity = f"the relative difference is wrong: {'; '.join(wrong)}"
    elif not greedy_is_argmax(engine, int(expected.one[0][0, 0]), PARITY_TOKENS):
        parity = "the greedy choice on the GPU is not that of the logits"
    return {"parity": parity, **{f"difference_{kind.replace(' ', '_')}": value for kind, value in found.items()}}


def timed(engines: dict[str, Engine], figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Add the medians of every engine's measures, taken in turns."""
    quick = {(name, m): call for name, engine in engines.items() for m, call in engine.measures.items()}
    slow = {(name, m): call for name, engine in engines.items() for m, call in engine.slow.items()}
    for measures, runs in ((quick, options.runs), (slow, min(SLOW_RUNS, options.runs))):
        for call in measures.values():
            call()
        turns = in_turns({"/".join(key): call for key, call in measures.items()}, runs)
        for name, measure in measures:
            figures[name][measure] = turns.median(f"{name}/{measure}")
    for name in engines:
        found = figures[name]
        found["prefill_tokens_per_second"] = PROMPT / found["prefill_s"]
        if "batch_s" in found:
            found["batch_tokens_per_second"] = STREAMS / found["batch_s"]


def engines_in(figures: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Size, engine and figures of all that is there."""
    for size in SHAPES:
        for name, found in figures.get(size, {}).items():
            if isinstance(found, dict):
                yield size, name, found


def is_green(found: dict[str, Any]) -> bool:
    """Whether an engine's parity is."""
    return bool(found["parity"] == GREEN)


def rows_of(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table so far."""
    rows = []
    for size, name, found in engines_in(figures):
        if not is_green(found):
            continue
        other, step = figures[size].get(ALBATROSS, {}).get("bare_s"), found["step_s"]
        rows.append((
            size, name, milliseconds(found["limit_s"]), milliseconds(step), f"{100 * found['limit_s'] / step:.0f} %",
            f"{1 / step:.0f}", milliseconds(found.get("sample_s")), milliseconds(found.get("call_s")),
            f"{other / step:.2f} x" if other and name.startswith(FUSED) else "",
            *(f"{found[key]:.0f}" if key in found else ""
              for key in ("batch_tokens_per_second", "prefill_tokens_per_second")),
            f"{found['memory'] / 1e6:.0f}", note_of(figures[size], name),
        ))  # fmt: skip
    return rows


def milliseconds(seconds: float | None) -> str:
    """0.0012345 → 1.234."""
    return "" if seconds is None else f"{1e3 * seconds:.3f}"


def note_of(found: dict[str, Any], name: str) -> str:
    """Targets met and missed, and what Albatross does faster."""
    engine, other, notes = found[name], found.get(ALBATROSS, {}), []
    if "target_s" in engine:
        verdict = "met" if engine["meets_target"] else "MISSED"
        notes.append(f"target {milliseconds(engine['target_s'])} ms {verdict}")
    if "bare_s" in engine:
        notes.append(f"without embedding and choice {milliseconds(engine['bare_s'])} ms")
    if name.startswith(FUSED) and "batch_s" in other:
        slower = [key[:-2] for key in ("batch_s", "prefill_s") if engine[key] > other[key]]
        notes += [f"{key} BEHIND Albatross" for key in slower]
    return ", ".join(notes)


if __name__ == "__main__":
    main()
