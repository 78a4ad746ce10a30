"""One stream, token by token, on the CPU: 12 × 768 RWKV-7 in fp32, the `rwkv` package and the memory's speed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from common import arguments, checkpoint_of, in_turns, relative, report, rwkv_package, seconds_per_call

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.describe import describe
from rwkv_edge.evaluation.roofline import read_bandwidth
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.runtime.session import open_session

THREADS = 2
STEPS = 20


def main() -> None:
    """Check parity, then measure in turns and report."""
    options = arguments(__doc__ or "")
    path = checkpoint_of("0.1B", options.work)
    artifact = options.work / "step-0.1B"
    manifest = export_checkpoint(open_checkpoint(path), artifact, ExportOptions(chunks=(), tokenizer="none"))
    nbytes = bytes_of_a_step(artifact)
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, manifest.spec.vocab_size, 16)]
    session = open_session(artifact, threads=THREADS)
    state = session.initial_state()
    found = session.prefill([tokens], state)[0]
    model = rwkv_package(path, THREADS)
    logits, theirs = model.forward(tokens, None)
    difference = relative(found, logits.numpy())
    if difference > 1e-4:
        raise SystemExit(f"parity is not green: relative difference {difference:.2g}")
    session.close()

    def ours(prepack: bool = False) -> float:
        # opened anew: ONNX Runtime's threads spin between runs and would slow the others down
        session = open_session(artifact, threads=THREADS, check_content=False, prepack=prepack)
        state = session.initial_state()
        session.step([0], state)
        seconds = seconds_per_call(lambda: session.step([5], state), STEPS)
        session.close()
        return seconds

    turns = in_turns(
        {
            "ours": ours,
            "packed": lambda: ours(prepack=True),
            "rwkv": lambda: seconds_per_call(lambda: model.forward([5], theirs), STEPS),
            "read": lambda: 1 / read_bandwidth(THREADS),
        },
        options.runs,
    )
    bandwidth = 1 / turns.median("read")
    share = nbytes / 1e9 * turns.ratio("read", "ours")
    figures = {
        "tokens_per_second": 1 / turns.median("ours"),
        "rwkv_tokens_per_second": 1 / turns.median("rwkv"),
        "ratio": turns.ratio("rwkv", "ours"),
        "packed_tokens_per_second": 1 / turns.median("packed"),
        "packed_ratio": turns.ratio("rwkv", "packed"),
        "packed_share_of_bandwidth": nbytes / 1e9 * turns.ratio("read", "packed"),
        "bandwidth_gb_s": bandwidth,
        "share_of_bandwidth": share,
        "nodes": manifest.graphs[0].nodes,
        "relative_difference": difference,
    }
    packed = (f"{figures['packed_ratio']:.2f} x", f"{100 * figures['packed_share_of_bandwidth']:.0f} %")
    rows = [
        ["rwkv-edge, prepack=True", f"{1 / turns.median('packed'):.1f}", *packed],
        [
            "rwkv-edge, weights mapped",
            f"{1 / turns.median('ours'):.1f}",
            f"{figures['ratio']:.2f} x",
            f"{100 * share:.0f} %",
        ],
        ["rwkv 0.8.32, cpu fp32", f"{1 / turns.median('rwkv'):.1f}", "1 x", f"{100 * share / figures['ratio']:.0f} %"],
    ]
    title = f"Decode, 12 x 768 fp32, {THREADS} threads; memory reads {bandwidth:.1f} GB/s; {figures['nodes']} nodes"
    report(title, ("", "tokens/s", "ratio", "share of bandwidth"), rows, figures, options.json)


def bytes_of_a_step(artifact: Path) -> float:
    """Bytes that one step moves, from `describe`'s bound at 1 GB/s."""
    bounds = describe(artifact, 1.0)["tokens_per_second_bound"]["fp32"]
    return 1e9 / float(bounds["this machine"])


if __name__ == "__main__":
    main()
