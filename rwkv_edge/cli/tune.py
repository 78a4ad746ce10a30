"""``rwkv-edge tune``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rwkv_edge.cli.common import PATH, json_option, note, print_json, quiet_option

if TYPE_CHECKING:
    from rwkv_edge.evaluation.tune import Tuned


@click.command("tune")
@click.argument("artifact", type=PATH)
@click.option(
    "--seconds", type=click.FloatRange(1), default=120, show_default=True, metavar="S", help="Look no longer than this."
)
@json_option
@quiet_option
def command(artifact: Path, seconds: float, as_json: bool) -> None:
    """Find the fastest choices of the backend cuda's kernels for ARTIFACT on this GPU.

    Tiles, splits and loads in flight are tried kernel by kernel, by the time of whole steps of one stream. What is
    found is kept in the cache folder ($RWKV_EDGE_CACHE), by GPU and shapes; sessions take it from there. Results stay
    the same within rounding.

    Example: rwkv-edge tune RWKV-x070-World-0.1B-fp16
    """
    from rwkv_edge.evaluation.tune import tune_artifact

    found, file = tune_artifact(artifact, seconds, lambda name, s: note(f"{1e6 * s:.1f} us a step; trying {name}"))
    if as_json:
        print_json({**dataclasses.asdict(found), "file": str(file)})
    else:
        click.echo("\n".join(_lines(found, file)))


def _lines(found: Tuned, file: Path) -> list[str]:
    return [
        f"a step of one stream: {1e6 * found.before:.1f} us before, {1e6 * found.after:.1f} us now "
        f"({found.tried} choices in {found.seconds:.0f} s)",
        *(f"  {name}: {value}" for name, value in vars(found.tuning).items()),
        f"kept in {file}",
    ]
