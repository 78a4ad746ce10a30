"""A prompt of 512 tokens on the CPU, 12 × 768 RWKV-7 in fp32: chunks, steps and the `rwkv` package's sequence mode.

Also the resident memory with all graphs open, over that with the step graph alone, both while decoding.
"""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
from common import arguments, checkpoint_of, in_turns, relative, report, rwkv_package

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.exporters.onnx import DEFAULT_CHUNKS, ExportOptions, export_checkpoint
from rwkv_edge.runtime.session import open_session

THREADS = 2
PROMPT = 512
STEPS = 24

MEMORY = """
import sys
from pathlib import Path
from rwkv_edge.runtime.session import open_session
session = open_session(sys.argv[1], threads=2, check_content=False)
state = session.initial_state()
if sys.argv[2] == "all":
    session.prefill([list(range(16 + 64 + 256 + 3))], state)
for token in range(20):
    session.step([token], state)
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line for line in lines if line.startswith("VmRSS")).split()[1])
"""


def resident_mb(artifact: object, graphs: str) -> float:
    """VmRSS of a process that decodes, in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(artifact), graphs], capture_output=True, text=True, check=True
    )
    return int(done.stdout) / 1024


def main() -> None:
    """Check parity, then measure in turns and report."""
    options = arguments(__doc__ or "")
    path, artifact = checkpoint_of("0.1B", options.work), options.work / "prefill-0.1B"
    export_checkpoint(open_checkpoint(path), artifact, ExportOptions(tokenizer="none"))
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 65536, PROMPT)]
    model = rwkv_package(path, THREADS)
    session = open_session(artifact, threads=THREADS)
    expected, _ = model.forward(list(tokens), None)
    difference = relative(session.prefill([tokens], session.initial_state())[0], expected.numpy())
    if difference > 1e-4:
        raise SystemExit(f"parity is not green: relative difference {difference:.2g}")
    session.close()

    def chunks() -> float:
        session = open_session(artifact, threads=THREADS, check_content=False)
        state = session.initial_state()
        session.prefill([tokens[: sum(DEFAULT_CHUNKS)]], state)  # opens all graphs
        start = time.perf_counter()
        session.prefill([tokens], state)
        seconds = time.perf_counter() - start
        session.close()
        return seconds

    def steps() -> float:
        session = open_session(artifact, threads=THREADS, check_content=False)
        state = session.initial_state()
        session.step([0], state)
        start = time.perf_counter()
        for token in tokens[:STEPS]:
            session.step([token], state)
        seconds = (time.perf_counter() - start) * PROMPT / STEPS
        session.close()
        return seconds

    def theirs() -> float:
        start = time.perf_counter()
        model.forward(list(tokens), None)
        return time.perf_counter() - start

    turns = in_turns({"chunks": chunks, "steps": steps, "rwkv": theirs}, options.runs)
    memory = {graphs: resident_mb(artifact, graphs) for graphs in ("step", "all")}
    speed = {name: PROMPT / turns.median(name) for name in turns.seconds}
    figures = {
        "tokens_per_second": speed,
        "over_rwkv": turns.ratio("rwkv", "chunks"),
        "over_steps": turns.ratio("steps", "chunks"),
        "resident_mb": memory,
        "resident_ratio": memory["all"] / memory["step"],
        "relative_difference": difference,
    }
    rows = [
        ["rwkv-edge, chunks", f"{speed['chunks']:.0f}", f"{figures['over_rwkv']:.2f} x"],
        ["rwkv 0.8.32, sequence mode", f"{speed['rwkv']:.0f}", "1 x"],
        ["rwkv-edge, single steps", f"{speed['steps']:.0f}", f"{turns.ratio('rwkv', 'steps'):.2f} x"],
    ]
    title = (
        f"Prefill of {PROMPT} tokens, 12 x 768 fp32, {THREADS} threads; resident memory with all graphs "
        f"{figures['resident_ratio']:.2f} x that with the step graph"
    )
    report(title, ("", "tokens/s", "over rwkv"), rows, figures, options.json)


if __name__ == "__main__":
    main()
