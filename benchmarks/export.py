"""Export of a 24-layer × 1024 RWKV-7 in fp32 (1.8 GB): seconds from the open checkpoint to the artifact, and peak RSS.

Each export runs in a process of its own; its peak is the kernel's VmHWM, all imports included (ru_maxrss would begin
with the parent's). With --all, a
smaller model of every version, and of every layout of RWKV-7.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import arguments, checkpoint_of, report

from rwkv_edge.evaluation.synthetic import (
    Shape,
    Shape7,
    random_v4,
    random_v5,
    random_v6,
    random_v7,
    save_pth,
)

CHILD = """
import json, sys, time
from pathlib import Path
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
chunks = () if sys.argv[3] == "step" else (16, 64)
checkpoint = open_checkpoint(sys.argv[1])
start = time.perf_counter()
export_checkpoint(checkpoint, Path(sys.argv[2]), ExportOptions(chunks=chunks))
seconds = time.perf_counter() - start
lines = Path("/proc/self/status").read_text().splitlines()
peak = int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
print(json.dumps({"seconds": seconds, "peak_mb": peak / 1024}))
"""
WIDE = Shape(8, 1024, vocab_size=65536)


def exported(checkpoint: Path, target: Path, graphs: str) -> dict[str, float]:
    """One export in a fresh process, from a disk that has nothing left to write."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    command = [sys.executable, "-c", CHILD, str(checkpoint), str(target), graphs]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def best(checkpoint: Path, work: Path, graphs: str, runs: int) -> dict[str, float]:
    """The fastest of several runs, and the largest peak."""
    found = [exported(checkpoint, work / "exported", graphs) for _ in range(runs)]
    return {"seconds": min(f["seconds"] for f in found), "peak_mb": max(f["peak_mb"] for f in found)}


def every_version(work: Path) -> dict[str, Path]:
    """8 × 1024 checkpoints of every version (7a has 8 tables of a matrix per token)."""
    makers: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "4": lambda: random_v4(WIDE),
        "5.0": lambda: random_v5(WIDE, "5.0"),
        "5.1": lambda: random_v5(WIDE, "5.1"),
        "5.2": lambda: random_v5(WIDE, "5.2"),
        "6": lambda: random_v6(WIDE),
        "7": lambda: random_v7(Shape7(8, 1024, 65536)),
        "7a": lambda: random_v7(Shape7(8, 1024, 65536), deep_embed=32),
    }
    return {f"version {name}": save_pth(make(), work / f"version-{name}.pth") for name, make in makers.items()}


def every_layout(work: Path) -> dict[str, Path]:
    """The 8 × 1024 RWKV-7 model in every layout that tests write."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from layout_writers import fla_7, save_sharded, save_st, web_rwkv  # those of the tests

    weights = random_v7(Shape7(8, 1024, 65536))
    for name in ("official", "fla", "web-rwkv"):
        (work / f"layout-{name}").mkdir(exist_ok=True)
    return {
        "layout official safetensors": save_st(weights, work / "layout-official" / "model.safetensors"),
        "layout fla, 3 shards": save_sharded(fla_7(weights), work / "layout-fla"),
        "layout web-rwkv": save_st(web_rwkv(weights), work / "layout-web-rwkv" / "model.st"),
    }


def size_mb(path: Path) -> float:
    """Bytes of a file or of a folder's files, in MiB."""
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.is_file()]
    return sum(f.stat().st_size for f in files) / 2**20


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__ or "")
    cases = {"7, 24 x 1024, step graph": (checkpoint_of("0.4B", options.work), "step")}
    cases["7, 24 x 1024, step and chunks"] = (checkpoint_of("0.4B", options.work), "all")
    if options.all:
        small = every_version(options.work) | every_layout(options.work)
        cases |= {name: (path, "all") for name, path in small.items()}
    figures, rows = {}, []
    for name, (path, graphs) in cases.items():
        megabytes = size_mb(path)
        found = best(path, options.work, graphs, options.runs if graphs == "step" else 2)
        share = found["peak_mb"] / megabytes
        figures[name] = {**found, "checkpoint_mb": megabytes, "peak_share": share}
        rows.append([name, f"{megabytes:.0f}", f"{found['seconds']:.1f}", f"{found['peak_mb']:.0f}", f"{share:.2f}"])
    header = ("checkpoint", "MiB", "seconds", "peak RSS, MiB", "share of the checkpoint")
    report("Export to ONNX, fp32", header, rows, figures, options.json)


if __name__ == "__main__":
    main()
