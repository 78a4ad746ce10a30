"""One stream, token by token, on a GPU: RWKV-4, 5.2, 6 and 7a of released widths through our own kernels.

The weights are random, and of the wide models there are six layers, which is enough for the time of one. Before
anything is timed, the logits are compared with float64 over the same weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, relative, report
from step_gpu import release_memory
from step_gpu_engines import copy_bandwidth
from step_gpu_models import Reference

from rwkv_edge.artifact import Artifact
from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
from rwkv_edge.calibration.schemes import SchemeOptions
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.roofline import bytes_per_token, read_bandwidth
from rwkv_edge.evaluation.synthetic import Shape, Shape7, random_v4, random_v5, random_v6, random_v7, save_pth
from rwkv_edge.exporters.layout import INDEX_FILE
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.runtime.cuda import CudaSession

HALF = torch.float16
MODELS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "4, 12 x 768": lambda: random_v4(Shape(12, 768, 50277, ffn_mult=4), dtype=HALF),
    "5.2, 6 x 2048": lambda: random_v5(Shape(6, 2048, 65536), "5.2", dtype=HALF),
    "6, 6 x 2048": lambda: random_v6(Shape(6, 2048, 65536), dtype=HALF),
    "7a, 12 x 768": lambda: random_v7(Shape7(12, 768, 8192, ranks=(64, 64, 32, 128)), dtype=HALF, deep_embed=32),
    "tiny": lambda: random_v6(Shape(2, 64, 277), dtype=HALF),
}
"""Version, layers and width; the vocabulary of 7a is small because every token has a matrix in every layer."""
FORMS = {"fp16": None, "W8": SchemeOptions("w8"), "W4": SchemeOptions("w4")}
TABLES = ("emb", "s_emb")  # of which a step reads a row
TOLERANCE = 5e-3
TOKENS, STEPS = 8, 200
HEADER = ("model", "form", "relative difference", "µs a step", "limit, µs", "share of the limit")


def main() -> None:
    """Parity and step time of every model in every form."""
    options = arguments(__doc__ or "", add_options)
    gpu = torch.cuda.is_available()
    bandwidth = copy_bandwidth(options.runs) if gpu else read_bandwidth() * 1e9
    figures: dict[str, Any] = {"copy_gb_s": bandwidth / 1e9}
    rows = []
    for name in options.models:
        for form, scheme in FORMS.items():
            folder = made(name, form, scheme, options.work)
            found = measured(folder, bandwidth, options.runs)
            figures[f"{name} {form}"] = found
            rows.append(
                (
                    name, form, f"{found['relative_difference']:.1e}", f"{found['step_us']:.0f}",
                    f"{found['limit_us']:.0f}", f"{found['limit_us'] / found['step_us']:.0%}",
                )
            )  # fmt: skip
    report(f"Steps of one stream, copies {bandwidth / 1e9:.0f} GB/s", HEADER, rows, figures, options.json)


def add_options(parser: argparse.ArgumentParser) -> None:
    """--models."""
    released = [name for name in MODELS if name != "tiny"]
    parser.add_argument("--models", nargs="*", default=released, choices=MODELS, help="which")


def made(name: str, form: str, scheme: SchemeOptions | None, work: Path) -> Path:
    """The artifact, made once."""
    folder = work / f"versions-gpu-{name}-{form}"
    if folder.exists():
        return folder
    if scheme is not None:
        quantize_artifact(made(name, "fp16", None, work), folder, QuantizeOptions(scheme))
        return folder
    checkpoint = save_pth(MODELS[name](), folder.with_suffix(".pth"))
    options = ExportOptions(precision="fp16", chunks=(), batch=None, tokenizer="none")
    export_checkpoint(open_checkpoint(checkpoint), folder, options)
    return folder


def measured(folder: Path, bandwidth: float, runs: int) -> dict[str, float]:
    """Figures of an artifact, once its logits are right."""
    spec = Artifact.open(folder).manifest.spec
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (TOKENS, 1))
    expected = Reference(folder).logits(tokens)
    release_memory()
    session = CudaSession(Artifact.open(folder), check_content=False)
    state = session.initial_state()
    difference = relative(np.stack([session.step(row, state) for row in tokens]), expected)
    if not difference <= TOLERANCE:
        raise SystemExit(f"{folder.name}: the logits are wrong by {difference:.2g}, so there are no figures")
    seconds = sorted(session.step_seconds(state, STEPS) for _ in range(runs))[runs // 2]
    session.close()
    limit = moved_bytes(folder) / bandwidth
    return {"relative_difference": difference, "step_us": 1e6 * seconds, "limit_us": 1e6 * limit}


def moved_bytes(folder: Path) -> int:
    """What a step of one stream moves: all weights but the tables, a row of those, and the state twice."""
    entries = json.loads((folder / INDEX_FILE).read_bytes())
    tables = sum(e["nbytes"] for e in entries if TABLES.count(e["name"].removesuffix(".q").rpartition(".")[2]))
    spec = Artifact.open(folder).manifest.spec
    return bytes_per_token(sum(e["nbytes"] for e in entries), tables, spec.vocab_size, spec.state_nbytes)


if __name__ == "__main__":
    main()
