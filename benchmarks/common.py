"""What the benchmark scripts share: tables, JSON, timing in turns, checkpoints of the official shapes."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rwkv_edge.evaluation.roofline import usable_cores
from rwkv_edge.evaluation.synthetic import OFFICIAL_7, random_v7, save_pth

RESULTS = Path(__file__).parent / "results"


def arguments(description: str, add: Callable[[argparse.ArgumentParser], object] | None = None) -> argparse.Namespace:
    """--work DIR (large files), --json FILE, --runs N, and what ``add`` adds."""
    parser = argparse.ArgumentParser(description=description)
    if add is not None:
        add(parser)
    name = Path(sys.argv[0]).stem
    parser.add_argument("--work", type=Path, default=Path("artifacts/bench"), help="folder for checkpoints and exports")
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json", help="where to write the figures")
    parser.add_argument("--runs", type=int, default=9, help="turns that the medians are taken over")
    parser.add_argument("--all", action="store_true", help="every version and layout, where the script knows more")
    parsed = parser.parse_args()
    parsed.work.mkdir(parents=True, exist_ok=True)
    return parsed


def checkpoint_of(size: str, work: Path) -> Path:
    """A random fp32 checkpoint of a released RWKV-7 shape, made once."""
    path = work / f"random-{size}.pth"
    return path if path.exists() else save_pth(random_v7(OFFICIAL_7[size]), path)


@dataclass(frozen=True)
class Turns:
    """Seconds of several measures, taken in turns so that a change of the machine's speed meets all of them."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Of one measure."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, over: str) -> float:
        """Median of the ratios of two measures, turn by turn."""
        pairs = zip(self.seconds[name], self.seconds[over], strict=True)
        return statistics.median(a / b for a, b in pairs)


def in_turns(measures: Mapping[str, Callable[[], float]], runs: int) -> Turns:
    """Take each measure once a turn, for ``runs`` turns."""
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(runs):
        for name, measure in measures.items():
            seconds[name].append(measure())
    return Turns(seconds)


def seconds_per_call(call: Callable[[], object], count: int) -> float:
    """Median seconds of one of ``count`` calls."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rwkv_package(checkpoint: Path, threads: int) -> Any:
    """The checkpoint in the `rwkv` package, cpu fp32."""
    os.environ.update({"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"})
    torch.set_num_threads(threads)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from rwkv.model import RWKV

        return RWKV(str(checkpoint.with_suffix("")), "cpu fp32")


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest |difference| over the largest |expected|."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def report(title: str, header: Sequence[str], rows: Sequence[Sequence[object]], figures: Any, path: Path) -> None:
    """Print one Markdown table and write the figures as JSON with where and when they were taken."""
    print(f"\n{title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "title": title,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": {"cpu": _cpu_name(), "cores": usable_cores(), "python": platform.python_version()},
        "torch": torch.__version__,
        "figures": figures,
    }
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor()
