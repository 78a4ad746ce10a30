"""``rwkv-edge demo``."""

from __future__ import annotations

from pathlib import Path

import click

from rwkv_edge.cli.common import PATH, byte_progress, needs, note, program, quiet_option, size
from rwkv_edge.errors import VerificationError


@click.command("demo")
@click.option("-o", "--output", type=PATH, default="rwkv-edge-demo", show_default=True, help="Folder to create.")
@click.option(
    "--seed", type=click.IntRange(0), default=1, show_default=True, metavar="N", help="Another one, another text."
)
@quiet_option
def command(output: Path, seed: int) -> None:
    """Export, verify and run the small model that ships with the package.

    It is a byte-level RWKV-7 of 3 million parameters that was trained on Shakespeare.

    Example: rwkv-edge demo
    """
    with needs("all", "the demo"):
        from rwkv_edge.evaluation.demo import DEMO_CHECKPOINT, DEMO_PROMPT, export_demo, generate_demo, verify_demo

    note(f"exporting {DEMO_CHECKPOINT.name}", err=False)
    with byte_progress("weights") as progress:
        manifest, seconds = export_demo(output, progress)
    weights = manifest.files["weights.bin"].nbytes
    note(f"  {manifest.graphs[0].nodes} nodes, {size(weights)} of weights, {seconds:.1f} s, in {output}", err=False)
    note("verifying against eager torch", err=False)
    report = verify_demo(output)
    note("  " + report.to_text().replace("\n", "\n  "), err=False)
    if not report.passed:
        raise VerificationError(f"{output} differs from {DEMO_CHECKPOINT.name} by more than {report.tolerance:g}")
    note("generating\n", err=False)
    click.echo(DEMO_PROMPT, nl=False)
    pieces = generate_demo(output, seed)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()
    note(
        f"\n{len(pieces.tokens)} bytes at {pieces.tokens_per_second:.0f} tokens/s; "
        f"state {size(manifest.spec.state_nbytes)}, whatever the length\n"
        f'next: {program()} generate {output} "To be, or not to be" --temperature 0.8',
        err=False,
    )
