"""Parity of the fused kernels on a GPU with ONNX Runtime on the CPU: trained models, 256 tokens of text, greedy text.

fp32 and fp16 are compared with the CPU in fp32, quantized weights with the CPU and the same quantized artifact, whose
products stay in float. The demo model takes part, and every .pth of ``--models``; their tokens are bytes.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
from common import arguments, relative, report

from rwkv_edge.artifact import Artifact
from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
from rwkv_edge.calibration.schemes import SchemeOptions
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.errors import SessionError
from rwkv_edge.evaluation.demo import DEMO_CHECKPOINT, DEMO_PROMPT
from rwkv_edge.evaluation.parity import SAMPLE_TEXT
from rwkv_edge.evaluation.roofline import usable_cores
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.runtime.cuda import CudaSession
from rwkv_edge.runtime.cuda_driver import Driver
from rwkv_edge.runtime.loop import generate_text
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.sampling import Sampler, SamplerConfig
from rwkv_edge.runtime.session import Session
from rwkv_edge.tokenizers import Tokenizer, tokenizer_for_vocabulary

TOKENS, GREEDY = 256, 1000
SCHEMES: dict[str, SchemeOptions | None] = {
    "": None,
    "W8": SchemeOptions("w8"),
    **{f"W4, blocks of {block}": SchemeOptions("w4", block) for block in (32, 64, 128)},
    "W4, blocks of 32, int4 head": SchemeOptions("w4", 32, "int4"),
}
RELATIVE = {"fp32": 1e-4, "fp16": 5e-3}
"""Of logits by precision, largest |difference| over the largest |logit|."""

TOP1 = 0.99
GREEN = "green"

Figures = dict[str, Any]


def main() -> None:
    """Compare, report, and end with an error where a bound is not kept."""
    options = arguments(__doc__ or "", add_options)
    checkpoints = [DEMO_CHECKPOINT, *(sorted(options.models.glob("*.pth")) if options.models else [])]
    text = options.text.read_bytes() if options.text else (SAMPLE_TEXT * 2).encode()
    figures: dict[str, Any] = {"gpu": gpu_name(), "tokens": TOKENS, "greedy_tokens": GREEDY}
    figures |= compared(checkpoints, list(text[:TOKENS]), options)
    models = {path.stem: figures[path.stem] for path in checkpoints}
    found = [(model, form, f) for model, forms in models.items() for form, f in forms.items()]
    rows = [(model, form, *cells(f)) for model, form, f in found]
    title = f"Parity of the fused kernels with ONNX Runtime on the CPU, {TOKENS} tokens, {figures['gpu']}"
    report(title, ("model", "form", "relative difference", "top-1", "parity"), rows, figures, options.json)
    failed = [f"{model}, {form}: {f['parity']}" for model, form, f in found if f["parity"] != GREEN]
    if failed:
        raise SystemExit("not equal: " + "; ".join(failed))


def add_options(parser: argparse.ArgumentParser) -> None:
    """--models, --text, --workers."""
    parser.add_argument("--models", type=Path, help="folder of checkpoints (.pth) whose tokens are bytes")
    parser.add_argument("--text", type=Path, help=f"what is fed: its first {TOKENS} bytes")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes side by side; 0: none")


def gpu_name() -> str:
    """Of the GPU that runs."""
    driver = Driver()
    try:
        return str(driver.name)
    finally:
        driver.close()


def cells(found: Figures) -> tuple[str, str, str]:
    """Of the table."""
    if "relative_difference" not in found:
        return "", "", found["parity"]
    return f"{found['relative_difference']:.2g}", f"{100 * found['top1']:.1f} %", found["parity"]


def compared(checkpoints: Sequence[Path], tokens: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Model → precision and scheme → figures."""
    cases = [(path, precision, name) for path in checkpoints for precision in RELATIVE for name in SCHEMES]
    found: dict[str, Any] = {path.stem: {} for path in checkpoints}
    with contextlib.ExitStack() as stack:
        if options.workers:
            pool = stack.enter_context(ProcessPoolExecutor(options.workers, get_context("spawn")))
            waiting = [pool.submit(case, *one, tokens, options.work) for one in cases]
            results: Iterator[Figures] = (future.result() for future in waiting)
        else:
            results = (case(*one, tokens, options.work) for one in cases)
        for (path, precision, name), figures in zip(cases, results, strict=True):
            found[path.stem][f"{precision} {name}".strip()] = figures
    return found


def case(checkpoint: Path, precision: str, name: str, tokens: list[int], work: Path) -> Figures:
    """Figures of one form of a model; that the fused kernels refuse it is a result like any other."""
    place = work / f"parity-{checkpoint.stem}-{precision}-{list(SCHEMES).index(name)}"
    folder, scheme = exported(checkpoint, precision, place), SCHEMES[name]
    if scheme is not None:
        source, folder = folder, place / "quantized"
        quantize_artifact(source, folder, QuantizeOptions(scheme))
    oracle = folder if scheme is not None else exported(checkpoint, "fp32", place)
    try:
        session = CudaSession(Artifact.open(folder))
    except SessionError as error:
        return {"parity": f"not run: {error}"}
    with on_cpu(oracle) as expected:
        found = difference(session, expected, tokens, RELATIVE[precision])
        if found["parity"] == GREEN and precision == "fp32" and scheme is None:
            found |= greedy(session, expected)
    session.close()
    return found


def exported(checkpoint: Path, precision: str, place: Path) -> Path:
    """An artifact of the checkpoint, of any number of streams."""
    choices = ExportOptions(precision=precision, tokenizer="bytes", chunks=(16,), batch=None)
    export_checkpoint(open_checkpoint(checkpoint), place / precision, choices)
    return place / precision


@contextlib.contextmanager
def on_cpu(folder: Path) -> Iterator[OrtSession]:
    """ONNX Runtime, whose products of quantized weights stay in float: it would round activations to int8."""
    add = onnxruntime.SessionOptions.add_session_config_entry

    def exact(self: Any, name: str, value: str) -> None:
        add(self, name, "0" if name == "session.qdq_matmulnbits_accuracy_level" else value)

    with mock.patch.object(onnxruntime.SessionOptions, "add_session_config_entry", exact):
        session = OrtSession(Artifact.open(folder), threads=1)
        yield session
    session.close()


def difference(session: CudaSession, oracle: OrtSession, tokens: list[int], most: float) -> Figures:
    """Of the logits of every token: by steps, and by chunks of the same tokens."""
    expected = stepped(oracle, tokens)
    found, scored = stepped(session, tokens), session.score([tokens], session.initial_state())[0]
    worst = max(relative(found, expected), relative(scored, expected))
    top1 = min(float((logits.argmax(1) == expected.argmax(1)).mean()) for logits in (found, scored))
    parity = GREEN
    if not worst <= most:
        parity = f"the relative difference is {worst:.2g}, at most {most:g} is right"
    elif top1 < TOP1:
        parity = f"{100 * top1:.1f} % of the largest logits are the same, at least {100 * TOP1:g} are right"
    return {"relative_difference": worst, "top1": top1, "parity": parity}


def stepped(session: Session[Any], tokens: list[int]) -> np.ndarray:
    """[T] → [T, V]."""
    state = session.initial_state()
    return np.concatenate([session.step([token], state) for token in tokens])


def greedy(session: CudaSession, oracle: OrtSession) -> Figures:
    """Whether the largest logits' tokens are the same: fed back on the GPU, and as `generate` gives the text."""
    tokenizer = tokenizer_for_vocabulary(session.spec.vocab_size, "bytes")
    prompt = tokenizer.encode(DEMO_PROMPT)
    state, expected_state = session.initial_state(), oracle.initial_state()
    session.prefill([prompt[:-1]], state)
    chosen = session.greedy(prompt[-1:], state, GREEDY)[0]
    logits, expected = oracle.prefill([prompt], expected_state), []
    for _ in range(GREEDY):
        expected.append(int(logits[0].argmax()))
        logits = oracle.step(expected[-1:], expected_state)
    same = int((chosen == expected).cumprod().sum())
    text = generated(session, tokenizer) == generated(oracle, tokenizer)
    parity = GREEN if same == GREEDY and text else f"the same {same} of {GREEDY} tokens; texts equal: {text}"
    return {"same_tokens": same, "same_text": text, "parity": parity}


def generated(session: Session[Any], tokenizer: Tokenizer) -> str:
    """Text of `GREEDY` tokens after the prompt."""
    sampler = Sampler(SamplerConfig(temperature=0))
    return "".join(generate_text(session, tokenizer, DEMO_PROMPT, sampler=sampler, max_tokens=GREEDY))


if __name__ == "__main__":
    main()
