"""Perplexity by scheme on a held-out text: the demo model, and a small RWKV-5.2 where it is at hand."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from common import RESULTS, report

from rwkv_edge.artifact import Artifact
from rwkv_edge.calibration.calibrate import CalibrateOptions, calibrate
from rwkv_edge.calibration.mixed import mixed_formats
from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
from rwkv_edge.calibration.schemes import SchemeOptions
from rwkv_edge.calibration.text import Text
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.perplexity import scored_likelihood
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.runtime.open import open_model

THREADS = 2
BUDGET = 0.005
DEMO = Path("rwkv_edge/data/demo/rwkv7-shakespeare-3M.safetensors")
TRAINED = 1_003_854  # characters of tinyshakespeare that the demo model was trained on; the rest is held out
WIKI_CALIBRATION = 600_000  # characters; the rest of the text is measured


@dataclass(frozen=True)
class Case:
    """A model with the text that tunes it and the one that decides."""

    checkpoint: Path
    calibration: str
    measured: str


def cases(shared: Path) -> dict[str, Case]:
    """Those whose files are there."""
    play = (shared / "text/tinyshakespeare.txt").read_text(encoding="utf-8")
    wiki = (shared / "text/wikitext2-valid.txt").read_text(encoding="utf-8")
    return {
        "rwkv7-shakespeare-3M": Case(DEMO, play[:TRAINED], play[TRAINED:]),
        "tiny-rwkv-5v2-730K": Case(
            shared / "models/tiny-rwkv-5v2-730K.pth", wiki[:WIKI_CALIBRATION], wiki[WIKI_CALIBRATION:]
        ),
    }


def main() -> None:
    """Quantize each model in every way, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("artifacts/bench"), help="folder for artifacts")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of models and texts")
    parser.add_argument("--tokens", type=int, default=40_000, help="tokens to measure on, at most")
    parser.add_argument("--json", type=Path, default=RESULTS / "quant_quality.json", help="where to write the figures")
    options = parser.parse_args()
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name, case in cases(options.shared).items():
        folder = options.work / f"quality-{name}"
        figures[name] = measured(case, folder, options.tokens)
    rows = [
        [name, scheme, f"{f['perplexity']:.4f}", f"{f['percent']:+.3f} %", f"{f['weight_bytes'] / 1e6:.2f} MB"]
        for name, schemes in figures.items()
        for scheme, f in schemes.items()
    ]
    title = f"Perplexity per byte on held-out text, up to {options.tokens:,} tokens, state carried"
    report(title, ("model", "scheme", "perplexity", "over fp32", "weights"), rows, figures, options.json)


def measured(case: Case, folder: Path, tokens: int) -> dict[str, dict[str, float]]:
    """Scheme → figures."""
    source, plain, hessian = folder / "float", folder / "calibration.json", folder / "with-hessian.json"
    export_checkpoint(open_checkpoint(case.checkpoint), source, ExportOptions(chunks=(64,), all_logits=True))
    text = [Text("calibration", case.calibration)]
    calibrate(source, text, plain, CalibrateOptions(threads=THREADS))
    calibrate(source, text, hessian, CalibrateOptions(threads=THREADS, hessian=True))
    plan = mixed_formats(source, plain, BUDGET, threads=THREADS)
    ways = {
        "W8A8": (QuantizeOptions(SchemeOptions("w8a8")), plain),
        "W8A8 without smoothing": (QuantizeOptions(SchemeOptions("w8a8"), 0.0), plain),
        "W8": (QuantizeOptions(SchemeOptions("w8")), plain),
        "W8, CPU form": (QuantizeOptions(SchemeOptions("w8", target="cpu")), plain),
        "W4, block 32": (QuantizeOptions(SchemeOptions("w4")), plain),
        "W4, block 32, GPTQ": (QuantizeOptions(SchemeOptions("w4")), hessian),
        "W4, block 32, no calibration": (QuantizeOptions(SchemeOptions("w4")), None),
        "W4, block 32, CPU form": (QuantizeOptions(SchemeOptions("w4", target="cpu")), plain),
        "W4, block 32, int4 head, GPTQ": (QuantizeOptions(SchemeOptions("w4", head="int4")), hessian),
        f"mixed, budget {100 * BUDGET:g} %": (
            QuantizeOptions(SchemeOptions("mixed"), formats=plan.formats, notes=plan.notes()),
            plain,
        ),
    }
    base = perplexity(source, case.measured, tokens)
    found = {"fp32": figures_of(source, base, base)}
    for number, (name, (options, calibration)) in enumerate(ways.items()):
        target = folder / f"quantized-{number}"
        quantize_artifact(source, target, options, calibration)
        found[name] = figures_of(target, perplexity(target, case.measured, tokens), base)
    return found


def perplexity(folder: Path, text: str, tokens: int) -> float:
    """Per token, one pass with carried state."""
    model = open_model(folder, threads=THREADS)
    ids = model.tokenizer.encode(text)[:tokens]
    found = scored_likelihood(model.session, ids, len(ids) - 1).perplexity
    model.session.close()
    return found


def figures_of(folder: Path, value: float, base: float) -> dict[str, float]:
    """What the report says of one artifact."""
    nbytes = Artifact.open(folder).manifest.files["weights.bin"].nbytes
    return {"perplexity": value, "percent": 100 * (value / base - 1), "weight_bytes": nbytes}


if __name__ == "__main__":
    main()
