"""``rwkv-edge calibrate``."""

from __future__ import annotations

from pathlib import Path

import click

from rwkv_edge.cli.common import COUNT, PATH, needs, note, quiet_option, read_text, tokenizer_option
from rwkv_edge.cli.progress import count_progress


@click.command("calibrate")
@click.argument("artifact", type=PATH)
@click.option(
    "--text", "texts", type=PATH, multiple=True, required=True, metavar="FILE", help="UTF-8 text; repeatable."
)
@click.option(
    "-o", "--output", type=PATH, default=Path("calibration.json"), show_default=True, metavar="FILE",
    help="File to write.",
)  # fmt: skip
@click.option(
    "--samples", type=click.IntRange(1), metavar="N",
    help="Windows of text, from all over it.  [default: 64, or as many as there are]",
)  # fmt: skip
@click.option(
    "--length", type=click.IntRange(2), default=512, show_default=True, metavar=COUNT, help="Tokens recorded in each."
)
@click.option(
    "--warmup", type=click.IntRange(0), default=64, show_default=True, metavar=COUNT,
    help="Tokens before them that only build up the state.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, metavar=COUNT,
    help="Chooses the places of the windows.",
)  # fmt: skip
@click.option(
    "--method", type=click.Choice(["minmax", "percentile", "entropy", "mse"]), default="mse", show_default=True,
    help="How the largest magnitude that 8 bits can hold is chosen for an activation; 'quantize' reads the choice.",
)  # fmt: skip
@click.option("--percentile", default=99.99, show_default=True, metavar="P", help="Of the method percentile.")
@click.option("--hessian", is_flag=True, help="Also write the second moments that GPTQ needs: K² floats per input.")
@click.option(
    "--checkpoint-every", "every", type=click.IntRange(1), default=8, show_default=True, metavar="N",
    help="Windows between checkpoints; called again, a calibration that was stopped goes on from the last.",
)  # fmt: skip
@tokenizer_option
@click.option("--threads", default=0, show_default="automatic", metavar=COUNT, help="Compute threads.")
@quiet_option
def command(
    artifact: Path,
    texts: tuple[Path, ...],
    output: Path,
    samples: int | None,
    length: int,
    warmup: int,
    seed: int,
    method: str,
    percentile: float,
    hessian: bool,
    every: int,
    tokenizer: str | None,
    threads: int,
) -> None:
    """Feed text to ARTIFACT and write the ranges of its activations, for 'rwkv-edge quantize'.

    ARTIFACT is a float one, fp32 or fp16. Choose a text like those that the model will see, and none that a quality is
    measured on: the file holds fingerprints, so that 'rwkv-edge eval' can say if one is.

    Example: rwkv-edge calibrate rwkv-edge-demo --text corpus.txt -o calibration.json
    """
    with needs("quantize", "calibrating"):
        from rwkv_edge.calibration.calibrate import CalibrateOptions, calibrate
        from rwkv_edge.calibration.text import Text, WindowOptions

    options = CalibrateOptions(
        WindowOptions(samples, length, warmup, seed), method, percentile, hessian, threads=threads, every=every,
        tokenizer=tokenizer,
    )  # fmt: skip
    contents = [Text(path.name, read_text(path)) for path in texts]
    with count_progress() as report:
        found = calibrate(artifact, contents, output, options, report)
    extra = f" and {', '.join(found.files)}" if found.files else ""
    note(
        f"{output}{extra}: {len(found.inputs)} inputs of linears over {found.settings['tokens']:,} tokens in "
        f"{found.settings['samples']} windows, method {found.method}",
        err=False,
    )
