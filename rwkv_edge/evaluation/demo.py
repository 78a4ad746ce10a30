"""The model that ships with the package: where it is, and its way from checkpoint to text."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkv_edge.artifact import Manifest
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.parity import ParityReport
from rwkv_edge.evaluation.verify import verify_artifact
from rwkv_edge.exporters.onnx import export_checkpoint
from rwkv_edge.exporters.weights import Progress
from rwkv_edge.runtime.loop import Generation, generate_text
from rwkv_edge.runtime.open import open_model
from rwkv_edge.runtime.sampling import Sampler, SamplerConfig

DEMO_CHECKPOINT = Path(__file__).parents[1] / "data" / "demo" / "rwkv7-shakespeare-3M.safetensors"
DEMO_PROMPT = "ROMEO:\n"
DEMO_BYTES = 300
DEMO_TEMPERATURE = 0.8


def export_demo(folder: Path, progress: Callable[[int], Progress] | None = None) -> tuple[Manifest, float]:
    """Export the demo model in fp32; returns the manifest and the seconds it took."""
    start = time.perf_counter()
    manifest = export_checkpoint(open_checkpoint(DEMO_CHECKPOINT), folder, progress=progress)
    return manifest, time.perf_counter() - start


def verify_demo(folder: Path) -> ParityReport:
    """Compare the exported demo model with its checkpoint over 128 tokens."""
    return verify_artifact(folder, DEMO_CHECKPOINT, length=128)


def generate_demo(folder: Path, seed: int) -> Generation[Any]:
    """300 bytes after ``ROMEO:``, piece by piece."""
    model = open_model(folder)
    sampler = Sampler(SamplerConfig(temperature=DEMO_TEMPERATURE, seed=seed))
    return generate_text(model.session, model.tokenizer, DEMO_PROMPT, sampler=sampler, max_tokens=DEMO_BYTES)
