"""The sensitivity of a model as a picture."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from rwkv_edge.calibration.sensitivity import Sensitivity
from rwkv_edge.errors import CalibrationError, InputError
from rwkv_edge.runtime.atomic import check_writable, reason_of

SUFFIXES = (".svg", ".png", ".pdf")
COLOURS = {"w4": "#d95f02", "w8": "#1b9e77"}  # ColorBrewer's Dark2: told apart by colour-blind readers too


def check_plot(path: Path) -> None:
    """Whether a picture can be written there.

    Raises:
        InputError: another kind of file.
        CalibrationError: the folder is missing or not writable.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"a plot is a file {', '.join(SUFFIXES)}, not {path.name}")
    problem = check_writable(path)
    if problem:
        raise CalibrationError(f"{path} cannot be written: {problem}")


def plot_sensitivity(found: Sensitivity, path: Path) -> None:
    """A pair of bars for each group, with standard errors.

    Raises:
        CalibrationError: it cannot be written.
    """
    groups = list(dict.fromkeys(entry.group for entry in found.groups))
    figure = Figure(figsize=(7, 1 + 0.28 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for offset, (form, colour) in zip((-0.2, 0.2), COLOURS.items(), strict=True):
        entries = [entry for entry in found.groups if entry.form == form]
        axes.barh(
            [groups.index(entry.group) + offset for entry in entries],
            [100 * math.expm1(entry.nats) for entry in entries],
            0.38,
            xerr=[100 * entry.error for entry in entries],
            color=colour,
            label=form,
            error_kw={"linewidth": 0.8},
        )
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.set_xlabel(f"increase of perplexity in %, each group alone, {found.tokens:,} tokens")
    axes.legend()
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise CalibrationError(f"{path} cannot be written: {reason_of(error)}") from error
