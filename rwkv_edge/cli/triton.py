"""``rwkv-edge triton``."""

from __future__ import annotations

from pathlib import Path

import click

from rwkv_edge.cli.common import COUNT, PATH, note, quiet_option


@click.command("triton")
@click.argument("artifact", type=PATH)
@click.option("-o", "--output", "repository", type=PATH, required=True, metavar="REPO", help="The model repository.")
@click.option("--name", help="Name of the model on the server.  [default: ARTIFACT's]")
@click.option(
    "--backend", type=click.Choice(["onnxruntime", "tensorrt"]), default="onnxruntime", show_default=True,
    help="Runs the step graph, or the step engine that `build --backend tensorrt` made.",
)  # fmt: skip
@click.option("--device", type=click.Choice(["gpu", "cpu"]), default="gpu", show_default=True, help="Where it runs.")
@click.option(
    "--max-batch", default=8, show_default=True, type=click.IntRange(1), metavar=COUNT,
    help="Sequences in a step at most.",
)  # fmt: skip
@click.option(
    "--max-sequences", default=64, show_default=True, type=click.IntRange(1), metavar=COUNT,
    help="Sequences open at once; more of them wait.",
)  # fmt: skip
@click.option(
    "--idle", "idle_seconds", default=3600.0, show_default=True, metavar="SECONDS",
    help="A sequence without a request for so long is forgotten.",
)  # fmt: skip
@quiet_option
def command(artifact: Path, repository: Path, **options: object) -> None:
    """Add ARTIFACT to the model repository REPO of a Triton Inference Server.

    The server keeps the state of every sequence: a request is one token with a sequence_id, the first one with
    sequence_start, the last with sequence_end; the answer is its logits. Sequences are stepped together where ARTIFACT
    was exported with --batch dynamic. examples/triton_client.py is a client.

    Example: rwkv-edge triton RWKV-x070-World-0.1B-fp16 -o models --name rwkv
    """
    from rwkv_edge.artifact import Artifact
    from rwkv_edge.exporters.triton import TritonOptions, write_repository
    from rwkv_edge.runtime.initial import initial_arrays

    chosen = TritonOptions(**options)  # type: ignore[arg-type]  # click checked them
    opened = Artifact.open(artifact)
    note(f"{write_repository(opened, repository, initial_arrays(opened), chosen)}: ready to be loaded", err=False)
