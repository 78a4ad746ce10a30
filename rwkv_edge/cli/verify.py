"""``rwkv-edge verify``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from rwkv_edge.cli.common import (
    PATH,
    adapter_options,
    json_option,
    needs,
    print_json,
    quiet_option,
    read_text,
    session_options,
)


@click.command("verify")
@click.argument("artifact", type=PATH)
@click.argument("checkpoint", type=PATH)
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(1), metavar="N", help="Tokens to compare.")
@click.option("--text", type=PATH, metavar="FILE", help="UTF-8 text to feed.  [default: a sample in several scripts]")
@click.option(
    "--tolerance", type=click.FloatRange(0, min_open=True), metavar="X",
    help="Largest relative difference that passes.  [default: by precision; a quantized artifact passes by its mean KL "
    "divergence]",
)  # fmt: skip
@adapter_options
@session_options
@json_option
@quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    artifact: Path,
    checkpoint: Path,
    tokens: int,
    text: Path | None,
    tolerance: float | None,
    lora: Path | None,
    lora_alpha: float | None,
    backend: str,
    providers: Sequence[str],
    threads: int,
    as_json: bool,
) -> None:
    """Compare ARTIFACT with eager torch in float32 on CHECKPOINT, token by token.

    Prints the largest difference of the logits, KL divergence, top-1 agreement and the worst state tensor; exits with 1
    where a difference is larger than the tolerance. A quantized artifact differs by rounding: it passes where its mean
    KL divergence is small; how good it is, `rwkv-edge eval` says.

    Example: rwkv-edge verify RWKV-x070-World-0.1B-fp16 RWKV-x070-World-0.1B.pth
    """
    with needs("export", "verifying against a checkpoint"):
        from rwkv_edge.evaluation.verify import verify_artifact

    report = verify_artifact(
        artifact, checkpoint, tokens, read_text(text) if text else None, tolerance, list(providers), threads, lora,
        lora_alpha, backend,
    )  # fmt: skip
    if as_json:
        print_json(report.to_json())
    else:
        click.echo(report.to_text())
    ctx.exit(0 if report.passed else 1)
