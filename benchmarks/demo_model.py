"""Bits per byte of the demo model on the last 10 % of tinyshakespeare, by the runtime, in each precision.

The text is fed from an empty state that is carried to the end, the first byte unscored; ../shared/text must be there.
Logits come from the graphs of chunks, which tests prove equal to steps; --all feeds single steps as well.
"""

from __future__ import annotations

from pathlib import Path

from common import arguments, report

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.demo import DEMO_CHECKPOINT
from rwkv_edge.evaluation.perplexity import likelihood, scored_likelihood
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.runtime.session import open_session

TEXT = Path(__file__).parents[2] / "shared" / "text" / "tinyshakespeare.txt"


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__ or "")
    text = TEXT.read_bytes()
    held_out = list(text[len(text) * 9 // 10 :])
    figures: dict[str, dict[str, float]] = {}
    for precision in ("fp32", "fp16", "bf16"):
        artifact = options.work / f"demo-{precision}"
        choices = ExportOptions(precision=precision, tokenizer="bytes", all_logits=True)
        export_checkpoint(open_checkpoint(DEMO_CHECKPOINT), artifact, choices)
        session = open_session(artifact, threads=1)
        count = len(held_out) - 1
        figures[precision] = {"bits_per_byte": scored_likelihood(session, held_out, count).bits_per_byte}
        if options.all:
            figures[precision]["bits_per_byte_steps"] = likelihood(session, held_out, count).bits_per_byte
        session.close()
    rows = [[precision, *(f"{value:.4f}" for value in found.values())] for precision, found in figures.items()]
    header = ("precision", "bits per byte", *(["by single steps"] if options.all else []))
    report(f"Demo model, {len(held_out)} bytes held out", header, rows, figures, options.json)


if __name__ == "__main__":
    main()
