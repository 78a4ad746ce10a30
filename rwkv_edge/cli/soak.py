"""``rwkv-edge soak``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from rwkv_edge.cli.common import (
    COUNT,
    PATH,
    adapter_options,
    json_option,
    note,
    print_json,
    quiet_option,
    read_text,
    session_options,
)


@click.command("soak")
@click.argument("artifact", type=PATH)
@click.option(
    "--tokens", default=1_000_000, show_default=True, type=click.IntRange(1), metavar=COUNT, help="Tokens to feed."
)
@click.option(
    "--text", type=PATH, metavar="FILE", help="UTF-8 text to feed, over and over.  [default: what the model draws]"
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), metavar=COUNT,
    help="Decides which tokens are drawn.",
)  # fmt: skip
@click.option(
    "--checkpoint-every", "every", default=10_000, show_default=True, type=click.IntRange(1), metavar="N",
    help="Tokens between checkpoints.",
)  # fmt: skip
@click.option(
    "--state", type=PATH, metavar="FILE",
    help="Snapshot written at every checkpoint; where it exists, the soak goes on from there.",
)  # fmt: skip
@click.option(
    "--reference", type=PATH, metavar="CHECKPOINT", help="Run these weights in float64 beside it, and compare."
)
@click.option(
    "--tolerance", type=click.FloatRange(0, min_open=True), metavar="X",
    help="Largest relative drift that passes.  [default: by precision]",
)  # fmt: skip
@adapter_options
@session_options
@json_option
@quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    artifact: Path,
    tokens: int,
    text: Path | None,
    seed: int,
    every: int,
    state: Path | None,
    reference: Path | None,
    tolerance: float | None,
    lora: Path | None,
    lora_alpha: float | None,
    backend: str,
    providers: Sequence[str],
    threads: int,
    as_json: bool,
) -> None:
    """Run ARTIFACT for very many tokens and watch speed, memory, the state and its drift from float64.

    Exits with 1 where NaN appears or the drift is past the tolerance. Checkpoints are printed on standard error.

    Example: rwkv-edge soak rwkv-edge-demo --reference rwkv7-shakespeare-3M.safetensors --state soak.state
    """
    from rwkv_edge.evaluation.soak import SoakOptions, soak
    from rwkv_edge.evaluation.soak_reference import ReferenceSource

    source = ReferenceSource(reference, lora, lora_alpha) if reference else None
    options = SoakOptions(
        tokens,
        every,
        read_text(text) if text else None,
        seed,
        state,
        source,
        tolerance,
        list(providers),
        threads,
        backend,
    )
    report = soak(artifact, options, lambda point: note(point.to_text()))
    if as_json:
        print_json(report.to_json())
    else:
        click.echo(report.to_text())
    ctx.exit(0 if report.passed else 1)
