"""INT8: record ranges over a text, write weights and activations in 8 bits, and see what that costs on another text.

    python examples/int8.py ARTIFACT CORPUS.txt BOOK.txt ARTIFACT-w8a8

ARTIFACT is a float one. What is measured is measured on BOOK.txt, which the calibration has not seen.
"""

import math
import sys
from pathlib import Path

import numpy as np

from rwkv_edge import open_model
from rwkv_edge.calibration.calibrate import CalibrateOptions, calibrate
from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
from rwkv_edge.calibration.schemes import SchemeOptions
from rwkv_edge.calibration.text import Text, WindowOptions


def main(artifact: str, corpus: str, book: str, target: str) -> None:
    """Calibrate, quantize, and compare the two artifacts token by token."""
    calibration = Path(f"{target}.calibration.json")
    text = Text(Path(corpus).name, Path(corpus).read_text(encoding="utf-8"))
    calibrate(artifact, [text], calibration, CalibrateOptions(WindowOptions(length=128, warmup=32)))
    quantize_artifact(artifact, target, QuantizeOptions(SchemeOptions("w8a8")), calibration)

    losses, choices = {}, {}
    for folder in (artifact, target):
        model = open_model(folder)
        tokens = model.tokenizer.encode(Path(book).read_text(encoding="utf-8"))[:1024]
        logits = model.session.score([tokens[:-1]], model.session.initial_state())[0].astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        chosen = shifted[np.arange(len(tokens) - 1), tokens[1:]] - np.log(np.exp(shifted).sum(-1))
        losses[folder], choices[folder] = -chosen.mean(), logits.argmax(-1)
        size = (Path(folder) / "weights.bin").stat().st_size
        print(f"{folder}: {size / 1e6:.1f} MB of weights, perplexity {math.exp(losses[folder]):.3f}")
    same = (choices[artifact] == choices[target]).mean()
    change = math.expm1(losses[target] - losses[artifact])
    print(f"perplexity {change:+.2%}; both expect the same token at {same:.1%} of {len(tokens) - 1} places")


if __name__ == "__main__":
    main(*sys.argv[1:5]) if len(sys.argv) == 5 else sys.exit(__doc__)
