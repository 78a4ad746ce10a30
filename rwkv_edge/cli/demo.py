"""``rwkv-edge demo``."""

from __future__ import annotations

from pathlib import Path

import click

from rwkv_edge.cli.common import PATH, byte_progress, needs, size
from rwkv_edge.errors import VerificationError


@click.command("demo")
@click.option("-o", "--output", type=PATH, default="rwkv-edge-demo", show_default=True, help="Folder to create.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of the text.")
def command(output: Path, seed: int) -> None:
    """Export, verify and run the small model that ships with the package.

    It is a byte-level RWKV-7 of 3 million parameters that was trained on Shakespeare.

    Example: rwkv-edge demo
    """
    with needs("all", "the demo"):
        from rwkv_edge.evaluation.demo import DEMO_CHECKPOINT, DEMO_PROMPT, export_demo, generate_demo, verify_demo

    click.echo(f"exporting {DEMO_CHECKPOINT.name}")
    with byte_progress("weights") as progress:
        manifest, seconds = export_demo(output, progress)
    weights = manifest.files["weights.bin"].nbytes
    click.echo(f"  {manifest.graphs[0].nodes} nodes, {size(weights)} of weights, {seconds:.1f} s, in {output}")
    click.echo("verifying against eager torch")
    report = verify_demo(output)
    click.echo("  " + report.to_text().replace("\n", "\n  "))
    if not report.passed:
        raise VerificationError(f"{output} differs from {DEMO_CHECKPOINT.name} by more than {report.tolerance:g}")
    click.echo("generating\n")
    click.echo(DEMO_PROMPT, nl=False)
    pieces = generate_demo(output, seed)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo(
        f"\n\n{len(pieces.tokens)} bytes at {pieces.tokens_per_second:.0f} tokens/s; "
        f"state {size(manifest.spec.state_nbytes)}, whatever the length"
    )
    click.echo(f'next: rwkv-edge generate {output} "To be, or not to be" --temperature 0.8')
