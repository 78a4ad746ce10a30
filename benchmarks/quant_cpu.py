"""Decode of one stream on the CPU by scheme: 12 x 768 RWKV-7, standard Q/DQ and the CPU form, against fp32."""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
from common import arguments, checkpoint_of, in_turns, report, seconds_per_call

from rwkv_edge.artifact import Artifact
from rwkv_edge.calibration.calibrate import CalibrateOptions, calibrate
from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
from rwkv_edge.calibration.schemes import SchemeOptions
from rwkv_edge.calibration.text import Text, WindowOptions
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.parity import SAMPLE_TEXT
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.runtime.session import open_session

THREADS = 2
STEPS = 30
SCHEMES = {
    "W8A8, standard Q/DQ": SchemeOptions("w8a8"),
    "W8, standard Q/DQ": SchemeOptions("w8"),
    "W4 in blocks of 32, int8 head, standard Q/DQ": SchemeOptions("w4"),
    "W4 in blocks of 32, int4 head, standard Q/DQ": SchemeOptions("w4", head="int4"),
    "W8, CPU form": SchemeOptions("w8", target="cpu"),
    "W4 in blocks of 32, int8 head, CPU form": SchemeOptions("w4", target="cpu"),
    "W4 in blocks of 128, int4 head, CPU form": SchemeOptions("w4", 128, "int4", target="cpu"),
}
WORST = {"w8a8": 0.2, "w8": 0.2, "w4": 0.6}  # relative error of logits of a random model, which has no redundancy
RWKV_CPP = {"published": 117 / 89, "12 x 768, 2 threads": 120 / 99}
"""Tokens/s of rwkv.cpp in Q8_0 over FP16: RWKV-4 1.5B on 4 AVX2 threads, by its README; and as once measured here."""


def main() -> None:
    """Quantize, check the logits, then measure in turns and report."""
    options = arguments(__doc__ or "")
    source = options.work / "quant-float"
    checkpoint = open_checkpoint(checkpoint_of("0.1B", options.work))
    export_checkpoint(checkpoint, source, ExportOptions(chunks=(16,), tokenizer="world"))
    calibration = options.work / "quant-calibration.json"
    windows = WindowOptions(samples=8, length=64, warmup=16)
    calibrate(source, [Text("sample", SAMPLE_TEXT * 20)], calibration, CalibrateOptions(windows, threads=THREADS))
    folders = {"fp32": source}
    for number, (name, scheme) in enumerate(SCHEMES.items()):
        folders[name] = options.work / f"quant-{number}"
        quantize_artifact(source, folders[name], QuantizeOptions(scheme), calibration)
    expected = logits_of(source)
    errors = {name: error(logits_of(folder), expected) for name, folder in folders.items()}
    for name, scheme in SCHEMES.items():
        if not errors[name] < WORST[scheme.scheme]:
            raise SystemExit(f"{name}: the logits are wrong by {errors[name]:.2g}")
    measures = {name: partial(step_seconds, folder) for name, folder in folders.items()}
    turns = in_turns(measures, options.runs)
    processor = in_turns({name: partial(processor_seconds, folder) for name, folder in folders.items()}, options.runs)
    figures = {
        name: {
            "tokens_per_second": 1 / turns.median(name),
            "ratio": turns.ratio("fp32", name),
            "processor_ms_one_thread": 1e3 * processor.median(name),
            "processor_ratio": processor.ratio("fp32", name),
            "weight_bytes": Artifact.open(folder).manifest.files["weights.bin"].nbytes,
            "relative_error": errors[name],
        }
        for name, folder in folders.items()
    }
    rows = [
        [
            name,
            f"{f['tokens_per_second']:.1f}",
            f"{f['ratio']:.2f} x",
            f"{f['processor_ms_one_thread']:.2f} ms",
            f"{f['processor_ratio']:.2f} x",
            f"{f['weight_bytes'] / 1e6:.0f} MB",
        ]
        for name, f in figures.items()
    ]
    rows += [
        [f"rwkv.cpp, Q8_0 over FP16, {where}", "", f"{ratio:.2f} x", "", "", ""] for where, ratio in RWKV_CPP.items()
    ]
    title = f"Decode, 12 x 768, {THREADS} threads, float embedding (201 MB of each file, of which a token reads 3 kB)"
    report(
        title, ("", "tokens/s", "over fp32", "CPU time, 1 thread", "over fp32", "weights"), rows, figures, options.json
    )


def logits_of(folder: Path) -> np.ndarray:
    """After 24 random tokens."""
    session = open_session(folder, threads=THREADS)
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, session.spec.vocab_size, 24)]
    logits: np.ndarray = session.prefill([tokens], session.initial_state())[0]
    session.close()
    return logits


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over that of the expected values."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def processor_seconds(folder: Path) -> float:
    """Median processor time of a step on one thread: what other programs take does not count."""
    session = open_session(folder, threads=1, check_content=False)
    state = session.initial_state()
    times = []
    for _ in range(STEPS):
        start = time.process_time()
        session.step([5], state)
        times.append(time.process_time() - start)
    session.close()
    return statistics.median(times[3:])


def step_seconds(folder: Path) -> float:
    """Median of a step, in a session of its own: threads of another would spin beside it."""
    session = open_session(folder, threads=THREADS, check_content=False)
    state = session.initial_state()
    for _ in range(3):
        session.step([0], state)
    seconds = seconds_per_call(lambda: session.step([5], state), STEPS)
    session.close()
    return seconds


if __name__ == "__main__":
    main()
