"""``rwkv-edge quantize``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rwkv_edge.cli.common import COUNT, PATH, byte_progress, needs, note, quiet_option, size
from rwkv_edge.cli.progress import Percentage, count_progress
from rwkv_edge.errors import CalibrationError

if TYPE_CHECKING:
    from rwkv_edge.artifact import Manifest
    from rwkv_edge.calibration.quantize import QuantizeOptions


@click.command("quantize")
@click.argument("artifact", type=PATH)
@click.option("--calibration", type=PATH, metavar="FILE", help="What 'rwkv-edge calibrate' wrote for ARTIFACT.")
@click.option(
    "--scheme", type=click.Choice(["w8a8", "w8", "w4", "mixed"]), default="w8", show_default=True,
    help="int8 weights and activations; int8 weights; int4 weights in blocks; the smallest mixture within --budget.",
)  # fmt: skip
@click.option("-o", "--output", type=PATH, help="Folder to create.  [default: ARTIFACT's name and the scheme]")
@click.option(
    "--block", type=click.Choice(["32", "64", "128"]), default="32", show_default=True,
    help="Inputs that share a scale in int4.",
)  # fmt: skip
@click.option(
    "--head", type=click.Choice(["int8", "int4", "float"]), default="int8", show_default=True,
    help="Format of the head, the linear that gives the logits.",
)  # fmt: skip
@click.option(
    "--embedding", type=click.Choice(["float", "int8"]), default="float", show_default=True,
    help="int8 makes the file smaller, not the step faster: a token reads one row.",
)  # fmt: skip
@click.option(
    "--target", type=click.Choice(["any", "cpu"]), default="any", show_default=True,
    help="any: standard ONNX, for ONNX Runtime and TensorRT; cpu: what ONNX Runtime's CPU provider runs fastest.",
)  # fmt: skip
@click.option(
    "--smoothing", type=click.FloatRange(0, 1), default=0.5, show_default=True, metavar="ALPHA",
    help="How much of the outliers of activations moves into weights, in w8a8; 0 for nothing.",
)  # fmt: skip
@click.option(
    "--budget", type=Percentage(), default="0.5%", show_default=True, metavar="P",
    help="Increase of perplexity on the calibration text that the scheme mixed may cost.",
)  # fmt: skip
@click.option(
    "--threads", default=0, show_default="automatic", metavar=COUNT, help="Compute threads of mixed's measurements."
)
@quiet_option
def command(
    artifact: Path,
    calibration: Path | None,
    scheme: str,
    output: Path | None,
    block: str,
    head: str,
    embedding: str,
    target: str,
    smoothing: float,
    budget: float,
    threads: int,
) -> None:
    """Write the quantized form of ARTIFACT, an fp32 or fp16 one.

    Norms, the recurrence and what feeds it stay in float; 'rwkv-edge info' tells which linears have which format.

    Example: rwkv-edge quantize rwkv-edge-demo --calibration calibration.json --scheme w8a8
    """
    with needs("quantize", "quantizing"):
        from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact, summary
        from rwkv_edge.calibration.schemes import SchemeOptions

    folder = output or Path(f"{artifact.resolve().name}-{scheme}")
    options = QuantizeOptions(SchemeOptions(scheme, int(block), head, embedding, target), smoothing)
    if scheme == "mixed":
        options = _mixed(artifact, calibration, options, budget, threads)
    with byte_progress("weights") as progress:
        manifest = quantize_artifact(artifact, folder, options, calibration, progress)
    if manifest.quantization and "w4" in manifest.quantization["formats"].values() and not _by_gptq(manifest):
        click.echo("Warning: int4 is rounded to nearest; a calibration with --hessian loses up to 3 x less", err=True)
    total = sum(entry.nbytes for entry in manifest.files.values())
    note(f"{folder}: RWKV-{manifest.spec.version}, {summary(manifest)}, {size(total)}", err=False)


def _by_gptq(manifest: Manifest) -> bool:
    return manifest.quantization is not None and manifest.quantization["int4_rounding"] == "GPTQ"


def _mixed(
    artifact: Path, calibration: Path | None, options: QuantizeOptions, budget: float, threads: int
) -> QuantizeOptions:
    """The formats that the budget allows."""
    from rwkv_edge.calibration.mixed import mixed_formats

    if calibration is None:
        raise CalibrationError("the scheme mixed needs a calibration; run 'rwkv-edge calibrate' first")
    with count_progress() as report:
        plan = mixed_formats(artifact, calibration, budget, options.scheme.block, threads=threads, report=report)
    note(
        f"perplexity on the calibration text {plan.change.percent:+.3f} % ± {plan.change.error_percent:.3f}, of "
        f"{100 * budget:g} % allowed"
    )
    return replace(options, formats=plan.formats, notes=plan.notes())
