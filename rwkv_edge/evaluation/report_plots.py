"""The pictures of a report: SVG whose lines and letters take the colour of the page around them."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rwkv_edge.evaluation.report_data import Row

INK = "#010203"  # stands for the page's own colour until the SVG is written
COLOURS = (
    "#1b9e77",
    "#d95f02",
    "#7570b3",
)  # ColorBrewer's Dark2: told apart by colour-blind readers, on light and dark
WIDTH = 3.9  # inches: about a phone's, so that letters are not scaled down there
BINS = 80
TALLEST = 12.0  # inches of a row of colours for every input

Ranges = Mapping[str, tuple[np.ndarray, float, float]]
"""Input of linears → counts of |x| in equal bins [N], their upper end, and the threshold of 8 bits."""

_STYLE: Any = {  # keys of matplotlib's own type
    "svg.fonttype": "none",  # letters stay letters
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def size_and_loss(rows: Sequence[Row]) -> str | None:
    """Megabytes against the change of perplexity, with standard errors; None without two that were compared."""
    references = {row.evaluation["reference"]["model_hash"] for row in rows if row.evaluation and _compared(row)}
    points = []
    for row in rows:
        change = 0.0 if row.model_hash in references else row.number("eval", "comparison", "perplexity_change")
        if row.nbytes and change is not None:
            error = row.number("eval", "comparison", "perplexity_change_error")
            points.append((row, row.nbytes / 1e6, change, None if error is None else abs(error)))
    if not points:
        return None
    with _style("size"):
        figure, axes = _axes(3.0)
        points.sort(key=lambda point: point[2])  # names of the lower ones below, of the higher ones above
        for i, (row, size, change, error) in enumerate(points):
            axes.errorbar(size, change, yerr=error, fmt="o", color=COLOURS[i % 3], capsize=3)
            axes.annotate(
                row.name, (size, change), xytext=(6, -11 if i < len(points) / 2 else 4), textcoords="offset points"
            )
        axes.axhline(0, color=INK, linewidth=0.6)
        axes.margins(0.25)
        axes.set(xlabel="MB of weights", ylabel="change of perplexity, %")
        return _svg(figure)


def speeds(rows: Sequence[Row]) -> str | None:
    """Tokens per second of steps; None without any."""
    known = [(row, rate) for row in rows if (rate := row.number("bench", "decode_tokens_per_second")) is not None]
    if not known:
        return None
    with _style("speed"):
        figure, axes = _axes(0.7 + 0.32 * len(known))
        places = range(len(known))
        bars = axes.barh(places, [rate for _, rate in known], 0.6, color=COLOURS[0])
        axes.bar_label(bars, [f"{rate:,.0f}" for _, rate in known], padding=4, color=INK)
        axes.set_yticks(places, [row.name for row, _ in known])
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel("decode, tokens/s")
        return _svg(figure)


def sensitivities(found: Mapping[str, Any] | None) -> str | None:
    """A pair of bars for each group, with standard errors."""
    if not found or not found["groups"]:
        return None
    groups = list(dict.fromkeys(entry["group"] for entry in found["groups"]))
    forms = list(dict.fromkeys(entry["form"] for entry in found["groups"]))
    with _style("sensitivity"):
        figure, axes = _axes(1 + 0.24 * len(groups))
        for i, form in enumerate(forms):
            entries = [entry for entry in found["groups"] if entry["form"] == form]
            axes.barh(
                [groups.index(entry["group"]) + (i - (len(forms) - 1) / 2) * 0.4 for entry in entries],
                [100 * entry["nats"] for entry in entries],
                0.38,
                xerr=[100 * entry["error"] for entry in entries],
                color=COLOURS[i % 3],
                label=form,
                error_kw={"linewidth": 0.8, "ecolor": INK},
            )
        axes.axvline(0, color=INK, linewidth=0.6)
        axes.set_yticks(range(len(groups)), groups)
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.set_xlabel("change of perplexity, %, each group alone")
        axes.legend(frameon=False)
        return _svg(figure)


def ranges_of_inputs(ranges: Ranges) -> str | None:
    """Every input of linears as a row of colours: how often it takes on which magnitude, and where 8 bits end."""
    known = {name: entry for name, entry in ranges.items() if entry[1] > 0 and entry[0].sum() > 0}
    if not known:
        return None
    top = max(end for _, end, _ in known.values())
    edges = np.geomspace(top / 2**14, top, BINS + 1)
    image = np.array([_rebinned(counts, end, edges) for counts, end, _ in known.values()])
    with _style("ranges"):
        height = min(TALLEST, 0.115 * len(known))
        figure, axes = _axes(1 + height)
        shares = np.ma.masked_less_equal(image, 0)
        drawn = axes.imshow(np.ma.log10(shares), aspect="auto", cmap="viridis", interpolation="nearest")
        ticks = [2.0**k for k in range(int(np.log2(top)) - 12, int(np.log2(top)) + 1, 3)]
        axes.set_xticks([_place(tick, edges) for tick in ticks], [f"{tick:g}" for tick in ticks])
        every = max(1, round(0.1 * len(known) / height))  # as many names as there is room for
        axes.set_yticks(range(0, len(known), every), list(known)[::every], fontsize=6)
        for row, (_, _, threshold) in enumerate(known.values()):
            axes.plot([_place(threshold, edges)] * 2, [row - 0.5, row + 0.5], color=COLOURS[1], linewidth=1.5)
        axes.set_xlabel("magnitude of the input; the mark: where 8 bits end")
        bar = figure.colorbar(drawn, ax=axes, orientation="horizontal", location="top", aspect=40, pad=0.01)
        bar.set_label("log10 of the share of values")
        return _svg(figure)


def _rebinned(counts: np.ndarray, end: float, edges: np.ndarray) -> np.ndarray:
    """Shares in other bins, [BINS]; what is below the first goes into it."""
    sums = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
    at = np.interp(edges, np.linspace(0, end, len(counts) + 1), sums)
    at[0] = 0
    return np.diff(at)


def _place(value: float, edges: np.ndarray) -> float:
    """Where a magnitude is on the axis of bins."""
    return float(np.interp(np.log(max(value, edges[0])), np.log(edges), np.arange(len(edges)) - 0.5))


def _compared(row: Row) -> bool:
    return row.number("eval", "comparison", "perplexity_change") is not None


def _style(name: str) -> Any:
    """A context; ``name`` tells the ids of one picture from those of another on the same page."""
    return mpl.rc_context({**_STYLE, "svg.hashsalt": name})


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure) -> str:
    """An SVG to stand inside a page: no prologue, no metadata, the page's colour for ink, ids where they are used."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    text = drawn.getvalue()
    text = re.sub(r"(?s)<metadata>.*?</metadata>", "", text[text.index("<svg") :])
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    return text.replace(INK, "currentColor")
