"""What quantization costs in perplexity: calibrated on one text, measured on another."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv_edge.calibration.calibrate import CalibrateOptions, calibrate
from rwkv_edge.calibration.mixed import mixed_formats
from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
from rwkv_edge.calibration.record import overlap
from rwkv_edge.calibration.schemes import SchemeOptions
from rwkv_edge.calibration.text import Text, WindowOptions
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.perplexity import scored_likelihood
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.runtime.open import open_model

DEMO = Path(__file__).parents[2] / "rwkv_edge/data/demo/rwkv7-shakespeare-3M.safetensors"
MOST = {"w8a8": 0.010, "w8": 0.003, "w4": 0.03, "mixed": 0.01}
"""Scheme → part by which perplexity may grow; of mixed, its budget."""
SCHEMES = {"demo": ("w8a8", "w8", "w4", "mixed"), "tiny-rwkv-5v2-730K": ("w8a8", "w4")}
"""By model; mixed measures matrix by matrix, which takes a minute for 12 layers."""
TOKENS = 2048
TRAINED = 1_003_854  # characters of tinyshakespeare that the demo model was trained on


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_perplexity_on_another_text(name: str, shared_models: Path, shared_text: Path, tmp_path: Path) -> None:
    checkpoint = DEMO if name == "demo" else shared_models / f"{name}.pth"
    file, split = ("tinyshakespeare.txt", TRAINED) if name == "demo" else ("wikitext2-valid.txt", 600_000)
    content = (shared_text / file).read_text(encoding="utf-8")
    seen, measured = content[:split], content[split:]
    source, calibration = tmp_path / "float", tmp_path / "calibration.json"
    export_checkpoint(open_checkpoint(checkpoint), source, ExportOptions(chunks=(64,), all_logits=True))
    options = CalibrateOptions(WindowOptions(samples=12), hessian=True, threads=1)
    assert overlap(calibrate(source, [Text("seen", seen)], calibration, options), measured) < 0.01
    base = perplexity(source, measured)
    for scheme in SCHEMES[name]:
        formats = None
        if scheme == "mixed":
            formats = mixed_formats(source, calibration, MOST["mixed"], tokens=512, threads=1).formats
        choice = QuantizeOptions(SchemeOptions(scheme), formats=formats)
        quantize_artifact(source, tmp_path / scheme, choice, calibration)
        assert perplexity(tmp_path / scheme, measured) < base * (1 + MOST[scheme]), scheme


def perplexity(folder: Path, text: str) -> float:
    """Per byte, one pass with carried state."""
    model = open_model(folder, threads=1)
    found = scored_likelihood(model.session, model.tokenizer.encode(text)[:TOKENS], TOKENS - 1).perplexity
    model.session.close()
    return found
