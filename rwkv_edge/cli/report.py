"""``rwkv-edge report``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rwkv_edge.cli.common import PATH, needs, note, printable, quiet_option

if TYPE_CHECKING:
    from rwkv_edge.evaluation.report_plots import Ranges


@click.command("report")
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("-o", "--output", type=PATH, metavar="FILE", help="The page.  [default: DIR/report.html]")
@quiet_option
def command(folder: Path, output: Path | None) -> None:
    """Write one HTML page about what is in DIR: sizes, loss, sensitivity, ranges, speed, what was kept in float.

    DIR holds artifacts in subfolders and, as .json files, what `eval --json`, `bench --json`, `sensitivity --json` and
    `calibrate` wrote; each is optional. The page loads nothing from outside.

    Example: rwkv-edge report measured -o report.html
    """
    with needs("report", "drawing a report"):
        from rwkv_edge.evaluation.report_page import write_report

    target, found = write_report(folder, output, histograms_of)
    for name in found.ignored:
        click.echo(f"Warning: {printable(name)} is left out, since it is nothing that rwkv-edge wrote", err=True)
    note(printable(f"{target}: {len(found.rows)} artifacts, made of {len(found.used)} files"), err=False)


def histograms_of(path: Path) -> Ranges:
    """The histograms beside a calibration, see `rwkv_edge.calibration.histogram.Histogram`; none if they are gone."""
    from rwkv_edge.calibration.record import load_calibration
    from rwkv_edge.errors import CalibrationError

    calibration = load_calibration(path)
    found: Ranges = {}
    for name, entry in calibration.inputs.items():
        peak = entry.thresholds["minmax"]
        end = 2.0 ** (math.floor(math.log2(peak)) + 1) if peak else 0.0
        try:
            counts = calibration.statistic("histogram", name)
        except CalibrationError as error:
            click.echo(f"Warning: the ranges are left out: {printable(str(error))}", err=True)
            return {}
        found = {**found, name: (counts, end, calibration.threshold(name))}
    return found
