"""``rwkv-edge sensitivity``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rwkv_edge.cli.common import COUNT, PATH, json_option, needs, print_json, quiet_option
from rwkv_edge.cli.progress import count_progress


@click.command("sensitivity")
@click.argument("artifact", type=PATH)
@click.option("--calibration", type=PATH, required=True, metavar="FILE", help="What 'rwkv-edge calibrate' wrote.")
@click.option(
    "--block", type=click.Choice(["32", "64", "128"]), default="32", show_default=True,
    help="Inputs that share a scale in int4.",
)  # fmt: skip
@click.option(
    "--tokens", type=click.IntRange(1), default=8192, show_default=True, metavar=COUNT,
    help="About how many tokens of the calibration text to measure on.",
)  # fmt: skip
@click.option("--plot", type=PATH, metavar="FILE", help="Also draw it: .svg, .png or .pdf.")
@click.option("--threads", default=0, show_default="automatic", metavar=COUNT, help="Compute threads.")
@json_option
@quiet_option
def command(
    artifact: Path, calibration: Path, block: str, tokens: int, plot: Path | None, threads: int, as_json: bool
) -> None:
    """Round one part of ARTIFACT after the other, and tell how much worse it predicts the calibration text.

    The increase of perplexity is that of the part alone, all others in float; ± is its standard error.

    Example: rwkv-edge sensitivity rwkv-edge-demo --calibration calibration.json
    """
    with needs("quantize", "measuring the sensitivity"):
        from rwkv_edge.calibration.sensitivity import sensitivity
    if plot is not None:
        with needs("report", "drawing the sensitivity"):
            from rwkv_edge.calibration.plot import check_plot, plot_sensitivity
        check_plot(plot)
    with count_progress() as report:
        found = sensitivity(artifact, calibration, int(block), tokens, threads, report)
    if plot is not None:
        plot_sensitivity(found, plot)
    if as_json:
        print_json(json.loads(json.dumps(found.to_json())))
    else:
        click.echo(found.to_text())
