"""Many streams in one batch on the CPU: total tokens/s of 1, 4 and 16 streams, 12 × 768 RWKV-7 in fp32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from common import arguments, checkpoint_of, in_turns, relative, report, seconds_per_call

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.runtime.session import open_session

THREADS = 2
STREAMS = (1, 4, 16)
STEPS = 10


def main() -> None:
    """Check that streams do not mix, then measure in turns and report."""
    options = arguments(__doc__ or "")
    artifact = options.work / "batch-0.1B"
    checkpoint = open_checkpoint(checkpoint_of("0.1B", options.work))
    export_checkpoint(checkpoint, artifact, ExportOptions(batch=None, chunks=(), tokenizer="none"))
    session = open_session(artifact, threads=THREADS)
    tokens = np.random.default_rng(0).integers(0, 65536, (16, 8))
    alone = session.initial_state(1)
    for token in tokens[3]:
        expected = session.step([token], alone)
    together = session.initial_state(16)
    for column in tokens.T:
        found = session.step(column, together)
    difference = relative(found[3], expected[0])
    if difference > 1e-5:
        raise SystemExit(f"a stream is disturbed by its neighbours: relative difference {difference:.2g}")
    states = {count: session.initial_state(count) for count in STREAMS}
    feeds = {count: np.arange(count) + 5 for count in STREAMS}

    def measure(count: int) -> Callable[[], float]:
        return lambda: seconds_per_call(lambda: session.step(feeds[count], states[count]), STEPS)

    measures = {str(count): measure(count) for count in STREAMS}
    turns = in_turns(measures, options.runs)
    total = {name: int(name) / turns.median(name) for name in measures}
    ratios = {name: int(name) * turns.ratio("1", name) for name in measures}
    rows = [[name, f"{total[name]:.1f}", f"{ratios[name]:.2f} x"] for name in total]
    figures = {"total_tokens_per_second": total, "over_one_stream": ratios, "relative_difference": difference}
    title = f"Batch decode, 12 x 768 fp32, {THREADS} threads"
    report(title, ("streams", "tokens/s in all", "over one stream"), rows, figures, options.json)


if __name__ == "__main__":
    main()
