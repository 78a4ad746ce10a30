"""The latencies of a benchmark as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_edge.errors import InputError, MissingDependencyError
from rwkv_edge.runtime.atomic import require_writable, write_file

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Whether a plot can be written there, before an hour of measuring.

    Raises:
        InputError: another kind of file.
        FileError: a place that cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"a plot is a file ending in {', '.join(FORMATS)}, not '{path.name}'")
    require_writable(path)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "report", "a plot") from error


def write_plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw every step's latency in order, and how many steps took at most how long.

    Args:
        report: `rwkv_edge.evaluation.bench_report.BenchReport.to_json`.
        path: a .png, .svg or .pdf.

    Raises:
        FileError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    order, shares = figure.subplots(1, 2, width_ratios=(3, 2))
    for contender in report["contenders"]:
        milliseconds = [1000 * seconds for turn in contender["turns"] for seconds in turn["latencies"]]
        rate = contender["decode_tokens_per_second"]
        label = f"{contender['name']} ({contender['precision']}): {rate:,.1f} tokens/s"
        (line,) = order.plot(range(1, len(milliseconds) + 1), milliseconds, linewidth=0.8, label=label)
        percent = [100 * (i + 1) / len(milliseconds) for i in range(len(milliseconds))]
        shares.step(sorted(milliseconds), percent, where="post", color=line.get_color())
        for mark in contender["latency_ms"].values():
            shares.axvline(mark, color=line.get_color(), linewidth=0.5, linestyle=":")
    order.set(xlabel="step, all turns", ylabel="ms a step")
    shares.set(xlabel="ms a step", ylabel="% of steps at most", ylim=(0, 100))
    for axes in (order, shares):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    order.set_ylim(bottom=0)
    figure.suptitle(_title(report), fontsize=9)
    figure.legend(*order.get_legend_handles_labels(), loc="outside lower left", frameon=False, fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=150)
    write_file(path, drawn.getvalue())


def _title(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    name = machine.get("gpu") or machine.get("board") or machine.get("cpu") or "unknown machine"
    return f"{name}, batch {report['batch']}, {report['turns']} turns of {report['tokens']} steps, {report['date']}"
