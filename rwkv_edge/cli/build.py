"""``rwkv-edge build``."""

from __future__ import annotations

from pathlib import Path

import click

from rwkv_edge.cli.common import PATH, quiet_option
from rwkv_edge.cli.engines import add_engines, build_options, engine_options


@click.command("build")
@click.argument("artifact", type=PATH)
@click.option(
    "--wkv", type=click.Choice(["plugin", "fused", "function", "inline"]),
    help="How a step runs: plugin puts CUDA kernels in the place of the local functions of a graph exported with "
    "--wkv function or fused.  [default: as exported]",
)  # fmt: skip
@engine_options
@quiet_option
def command(artifact: Path, wkv: str | None, **options: object) -> None:
    """Build the TensorRT engines of ARTIFACT: step.engine, and prefill-T.engine for every chunk length.

    They are recorded in its manifest and replace those of an earlier build. TensorRT builds on the machine that runs
    them; TensorRT for RTX builds for other GPUs and without one. Nothing else is needed here, no torch and no onnx.

    Example: rwkv-edge build RWKV-x070-World-0.1B-fp16 --target sm86
    """
    add_engines(artifact, build_options(options, wkv))
