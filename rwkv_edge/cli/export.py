"""``rwkv-edge export``."""

from __future__ import annotations

from pathlib import Path

import click

from rwkv_edge.cli.common import (
    PATH,
    Batch,
    Suggested,
    adapter_options,
    byte_progress,
    needs,
    note,
    quiet_option,
    read_text,
    size,
)
from rwkv_edge.cli.engines import add_engines, engine_options, planned_engines
from rwkv_edge.cli.progress import count_progress


@click.command("export")
@click.argument("checkpoint", type=PATH)
@click.option(
    "-o", "--output", type=PATH, metavar="DIR",
    help="Folder to create.  [default: the checkpoint's name and the precision]",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True,
    help="Of weights and activations; the recurrence stays in fp32.",
)  # fmt: skip
@click.option("--batch", type=Batch(), default="1", show_default=True, help="Streams fed in one step.")
@click.option(
    "--wkv", type=click.Choice(["inline", "function", "fused", "plugin"]), default="inline", show_default=True,
    help="The recurrence as plain operators, as local functions (rwkv::wkv7_step, wkv7_sequence), or, in a TensorRT "
    "engine, as CUDA kernels in their place; fused: a step of local functions alone, five a layer in RWKV-7.",
)  # fmt: skip
@click.option(
    "--chunk", "chunks", type=click.IntRange(0), multiple=True, metavar="T", default=(16, 64, 256),
    show_default="16, 64 and 256",
    help="Prompts are read in chunks of this length, 2 to 1024, by a graph of its own; repeatable; 0: token by token.",
)  # fmt: skip
@click.option(
    "--all-logits", is_flag=True, help="Add a graph that gives the logits of all tokens of the longest chunk."
)
@click.option(
    "--rescale", type=click.IntRange(0), metavar="N",
    help="Halve the residual stream every N layers; 0 never.  [default: 6 in fp16 of RWKV-4 to 6]",
)  # fmt: skip
@click.option(
    "--tokenizer", type=Suggested("world", "bytes", "none"), metavar="NAME|FILE",
    help="world, bytes, none, or a tokenizer.json.  [default: by the vocabulary size]",
)  # fmt: skip
@adapter_options
@click.option("--state", type=PATH, metavar="FILE", help="Tuned state (blocks.i.att.time_state) to begin with.")
@click.option(
    "--int8", type=PATH, metavar="TEXT",
    help="Calibrate on this UTF-8 text and quantize weights and activations to int8 (w8a8).",
)  # fmt: skip
@click.option(
    "--format", "form", type=click.Choice(["onnx", "engine", "both"]), default="onnx", show_default=True,
    help="ONNX graphs, TensorRT engines, or both; engines alone cannot be built again. What follows is for engines.",
)  # fmt: skip
@engine_options
@quiet_option
def command(
    checkpoint: Path,
    output: Path | None,
    precision: str,
    batch: int | str,
    wkv: str,
    chunks: tuple[int, ...],
    all_logits: bool,
    rescale: int | None,
    tokenizer: str | None,
    lora: Path | None,
    lora_alpha: float | None,
    state: Path | None,
    int8: Path | None,
    form: str,
    **engine: object,
) -> None:
    """Write the artifact of CHECKPOINT: step.onnx, weights.bin, manifest.json and the tokenizer.

    CHECKPOINT is a .pth, .bin or .safetensors (.st) file, with the official names or those of transformers, fla or
    web-rwkv; a Hugging Face folder; or hf://OWNER/NAME[/FILE], either of them on the hub. The folder appears when
    everything in it is complete and checked.

    Example: rwkv-edge export RWKV-x070-World-0.1B.pth --precision fp16
    """
    with needs("export", "exporting"):
        from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
    from rwkv_edge.checkpoints.adapters import open_merged
    from rwkv_edge.hub import checkpoint_name

    plan = planned_engines(form, precision, wkv, engine)  # refuses before the export what cannot be built after it
    label = precision if int8 is None else f"{precision}-w8a8"
    target = output or Path(f"{checkpoint_name(checkpoint)}-{label}")
    options = ExportOptions(
        precision=precision,
        batch=None if batch == "dynamic" else int(batch),
        wkv="function" if wkv == "plugin" else wkv,
        tokenizer=tokenizer,
        rescale=rescale,
        state=state,
        chunks=tuple(chunk for chunk in chunks if chunk),
        all_logits=all_logits,
    )
    opened = open_merged(checkpoint, lora, lora_alpha)
    with byte_progress("weights") as progress, count_progress() as report:
        if int8 is None:
            manifest = export_checkpoint(opened, target, options, progress)
        else:
            with needs("quantize", "quantizing"):
                from rwkv_edge.calibration.export import export_quantized
                from rwkv_edge.calibration.text import Text
            text = Text(int8.name, read_text(int8))
            manifest = export_quantized(opened, target, options, [text], progress, report)
    for warning in manifest.warnings:
        click.echo(f"Warning: {checkpoint}: {warning}", err=True)
    total = sum(entry.nbytes for entry in manifest.files.values())
    spec = manifest.spec
    note(
        f"{target}: RWKV-{spec.version}, {spec.n_layer} layers x {spec.n_embd}, {label}, "
        f"{manifest.graphs[0].nodes} nodes, {size(total)}",
        err=False,
    )
    add_engines(target, plan)
