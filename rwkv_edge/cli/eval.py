"""``rwkv-edge eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rwkv_edge.cli.common import (
    PATH,
    json_option,
    print_json,
    printable,
    quiet_option,
    read_text,
    session_options,
    tokenizer_option,
)
from rwkv_edge.cli.progress import count_progress

if TYPE_CHECKING:
    from rwkv_edge.artifact import Artifact

CALIBRATION = "calibration.json"  # in a quantized artifact, a copy of what it was calibrated with
FLATTERS = 0.01  # share of a text that may be common with the calibration's by chance: quotations, headers


@click.command("eval")
@click.argument("artifact", type=PATH)
@click.option("--text", type=PATH, metavar="FILE", help="UTF-8 text to predict.")
@click.option("--lambada", type=PATH, metavar="FILE", help='LAMBADA as JSON lines of {"text": "…"}, OpenAI\'s variant.')
@click.option(
    "--compare", type=PATH, metavar="REFERENCE", help="Artifact to compare ARTIFACT with, on the same tokens."
)
@click.option(
    "--window", type=click.IntRange(0), default=1024, show_default=True, metavar="N",
    help="Most tokens fed before the state starts anew; 0 carries it through the whole text.",
)  # fmt: skip
@click.option(
    "--warm-up", type=click.IntRange(0), default=0, show_default=True, metavar="N",
    help="Tokens at the beginning of every window that are fed but not scored.",
)  # fmt: skip
@click.option(
    "--batch",
    type=click.IntRange(1, 4096),
    metavar="N",
    help="Windows fed at once.  [default: the artifact's, or by memory]",
)
@click.option("--max-tokens", type=click.IntRange(2), metavar="N", help="Score only so many tokens of the text.")
@click.option("--samples", type=click.IntRange(1), metavar="N", help="Score only so many passages of LAMBADA.")
@click.option("--begin", is_flag=True, help="Feed the end-of-text token before every passage of LAMBADA.")
@tokenizer_option
@session_options
@json_option
@quiet_option
def command(
    artifact: Path,
    text: Path | None,
    lambada: Path | None,
    as_json: bool,
    providers: tuple[str, ...],
    **options: object,
) -> None:
    """Measure how well ARTIFACT predicts a text, and how far it is from another artifact.

    --text gives perplexity and bits per byte, --lambada accuracy and perplexity of last words. With --compare: KL
    divergence from the reference, how often both expect the same token most, and the change of perplexity with its
    standard error. An artifact with --all-logits is scored in chunks, any other in single steps; with --batch dynamic,
    several windows at once.

    Example: rwkv-edge eval RWKV-x070-World-0.1B-fp16 --text book.txt --compare RWKV-x070-World-0.1B-fp32
    """
    from rwkv_edge.evaluation.eval_run import EvalOptions, evaluate

    choices = EvalOptions(
        text=read_text(text) if text else None,
        text_name=text.name if text else "",
        lambada=read_text(lambada) if lambada else None,
        lambada_name=lambada.name if lambada else "",
        providers=list(providers),
        **options,  # type: ignore[arg-type]  # click's, by the names of the fields
    )
    with count_progress() as start:
        report = evaluate(artifact, choices, start, calibrated_on)
    if as_json:
        print_json(report.to_json())
    else:
        click.echo("\n".join(map(printable, report.to_text().splitlines())))


def calibrated_on(artifact: Artifact, text: bytes) -> list[str]:
    """A sentence where an artifact was calibrated on what it shall be measured on."""
    from rwkv_edge.calibration.record import load_calibration

    if CALIBRATION not in artifact.manifest.files:
        return []
    share = load_calibration(artifact.path / CALIBRATION).fingerprint.share_of(text)
    if share <= FLATTERS:
        return []
    return [
        f"{100 * share:.0f} % of the text is in what {artifact.path.name} was calibrated on, which flatters it; "
        "measure on another text"
    ]
