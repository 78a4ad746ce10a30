"""``rwkv-edge bench``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rwkv_edge.cli.common import PATH, printable, quiet_option, session_options
from rwkv_edge.cli.progress import count_progress


@click.command("bench")
@click.argument("artifact", type=PATH)
@click.option(
    "--tokens", type=click.IntRange(1), default=64, show_default=True, metavar="N", help="Steps timed in every turn."
)
@click.option(
    "--batch", type=click.IntRange(1, 4096), metavar="B", help="Streams fed at once.  [default: the artifact's]"
)
@click.option(
    "--prompt", type=click.IntRange(1), default=256, show_default=True, metavar="T", help="Tokens of the timed prompt."
)
@click.option(
    "--runs", type=click.IntRange(1), default=5, show_default=True, metavar="R",
    help="Turns, of which medians are taken.",
)  # fmt: skip
@click.option("--checkpoint", type=PATH, metavar="FILE", help="Compare ARTIFACT with its checkpoint first.")
@click.option("--compare", metavar="ARTIFACT|rwkv", help="Another artifact, or the rwkv package on the checkpoint.")
@click.option(
    "--tolerance", type=click.FloatRange(0, min_open=True), metavar="X",
    help="Largest relative difference with which the check passes.  [default: by precision]",
)  # fmt: skip
@click.option("--prepack", is_flag=True, help="Let ONNX Runtime keep its own copy of the weights: faster, more memory.")
@session_options
@click.option(
    "--json", "json_file", type=PATH, is_flag=False, flag_value=Path("-"), metavar="[FILE]",
    help="Write all figures there; without FILE, or with -, print JSON instead of text.",
)  # fmt: skip
@click.option("--plot", type=PATH, metavar="FILE", help="Draw the latencies: .png, .svg or .pdf.")
@quiet_option
def command(
    artifact: Path, json_file: Path | None, plot: Path | None, providers: tuple[str, ...], **options: object
) -> None:
    """Measure the speed of ARTIFACT, after a check that it runs right.

    ARTIFACT is held against itself, in steps, chunks and batches; with --checkpoint, it is also compared with that, as
    `verify` does. Then prompt and steps are timed in turns, of all contenders in one run, each in a process of its own;
    ratios are medians of the turns' ratios. No speed is told of what is not right.

    Example: rwkv-edge bench RWKV-x070-World-0.1B-fp16 --checkpoint RWKV-x070-World-0.1B.pth --compare rwkv
    """
    from rwkv_edge.evaluation.bench_plot import check_plot, write_plot
    from rwkv_edge.evaluation.bench_run import BenchOptions, bench, write_json
    from rwkv_edge.runtime.atomic import require_writable

    choices = BenchOptions(providers=list(providers), **options)  # type: ignore[arg-type]  # click's, by the fields
    to_file = json_file if json_file and str(json_file) != "-" else None
    if to_file:
        require_writable(to_file)
    if plot:
        check_plot(plot)
    with count_progress() as start:
        report = bench(artifact, choices, start)
    figures = report.to_json()
    if plot:
        write_plot(figures, plot)
    if to_file:
        write_json(figures, to_file)
    if json_file and not to_file:
        click.echo(json.dumps(figures, indent=2, ensure_ascii=False))
    else:
        click.echo("\n".join(map(printable, report.to_text().splitlines())))
