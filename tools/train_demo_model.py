"""Train the demo model that ships with rwkv-edge: a byte-level RWKV-7 of 3 million parameters.

::

    python tools/train_demo_model.py TEXT -o DIR            write DIR/model.safetensors and DIR/training.json
    python tools/train_demo_model.py TEXT --evaluate FILE   measure an existing model in parallel and byte by byte
    python tools/train_demo_model.py --check [FILE]         compare with the `rwkv` package on 100 bytes

The last tenth of TEXT is never trained on: it measures the result, after the weights were rounded to the stored dtype.
`--validation BYTES` also takes away the end of the training part and measures there instead, to choose settings with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import demo_measure
import torch
from demo_measure import ToolError
from demo_training import Recipe, trained
from rwkv7_torch import Config, Weights, initial_weights
from safetensors.torch import save_file
from torch import Tensor

MODEL_NAME = "rwkv7-shakespeare-3M"
TRAINED_SHARE = 0.9  # of the text's bytes, from its start; the rest is held out
STORED_DTYPE = torch.float16  # 10 mantissa bits to bfloat16's 7; every weight lies within its range

_Settings = TypeVar("_Settings", Recipe, Config)


def split_text(path: Path, validation: int, segment: int) -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes to measure on [int64]: the held-out tenth, or the last `validation` of the rest."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ToolError(f"the text {path} cannot be read: {error.strerror}") from error
    text = torch.tensor(list(data), dtype=torch.long)
    trained_bytes = int(len(text) * TRAINED_SHARE)
    train, measure = text[:trained_bytes], text[trained_bytes:]
    if validation:
        train, measure = train[:-validation], train[-validation:]
    if len(train) <= segment + 1 or len(measure) < 2:
        raise ToolError(
            f"{path} holds {len(text)} bytes, which leaves {len(train)} to train on and {len(measure)} to measure on: "
            f"give a text that leaves more than {segment + 1} and at least 2"
        )
    return train, measure


def train_and_save(arguments: argparse.Namespace) -> None:
    """Train, write model.safetensors and training.json, print the figure that was measured."""
    recipe, config = _from_arguments(Recipe, arguments), _from_arguments(Config, arguments)
    device = _device(arguments.device)
    train, measure = split_text(arguments.text, arguments.validation, recipe.segment)
    _make_folder(arguments.output)  # before the work, not after it
    started = time.monotonic()
    average, bits = trained(config, recipe, train.to(device), arguments.eager, arguments.compile)
    seconds = time.monotonic() - started
    stored = {name: value.to("cpu", STORED_DTYPE).contiguous() for name, value in average.items()}
    model = write_model(arguments.output, stored, recipe)
    weights = {name: value.to(device).float() for name, value in stored.items()}
    parallel = demo_measure.bits_per_byte(weights, measure.to(device))
    part = "validation" if arguments.validation else "held_out"
    report = {
        "name": MODEL_NAME,
        "parameters": sum(value.numel() for value in stored.values()),
        "stored_dtype": str(STORED_DTYPE).removeprefix("torch."),
        "model_sha256": _sha256(model),
        "text_sha256": _sha256(arguments.text),
        "config": asdict(config),
        "recipe": asdict(recipe),
        "trained_bytes": len(train),
        f"{part}_bytes": len(measure),
        "training_loss_bits_per_byte": round(bits, 4),
        f"{part}_bits_per_byte_parallel": round(parallel, 4),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "compiled": arguments.compile,
        "torch": torch.__version__,
        "training_seconds": round(seconds, 1),
    }
    _write_json(arguments.output / "training.json", report)
    print(f"{report['parameters']} parameters, {len(measure)} {part} bytes, bits per byte in parallel: {parallel:.4f}")


def write_model(folder: Path, stored: Weights, recipe: Recipe) -> Path:
    """Write model.safetensors, described in its own header, into `folder`; returns its path."""
    header = {
        "format": "pt",
        "name": MODEL_NAME,
        "licence": "Apache-2.0",
        "seed": str(recipe.seed),
        "steps": str(recipe.steps),
    }
    path = folder / "model.safetensors"
    save_file(stored, path, header)
    path.chmod(0o644)  # safetensors writes 0600
    return path


def evaluate(arguments: argparse.Namespace) -> None:
    """Print a sample and the held-out figures of an existing model; with -o, add the figures to DIR/training.json."""
    _, measure = split_text(arguments.text, arguments.validation, segment=0)
    device = _device(arguments.device)
    weights = demo_measure.load_weights(arguments.evaluate)
    sample = demo_measure.generated(weights, b"\n", count=200, temperature=0.8, seed=arguments.seed)
    print(sample.decode(errors="replace"), flush=True)
    weights, measure = {name: value.to(device) for name, value in weights.items()}, measure.to(device)
    parallel = demo_measure.bits_per_byte(weights, measure)
    print(f"{len(measure)} bytes, bits per byte in parallel:   {parallel:.4f}", flush=True)
    serial = demo_measure.bits_per_byte_serial(weights, measure)
    print(f"{len(measure)} bytes, bits per byte, byte by byte: {serial:.4f}")
    if arguments.output and not arguments.validation:
        path = arguments.output / "training.json"
        report = json.loads(path.read_text()) if path.exists() else {"model_sha256": _sha256(arguments.evaluate)}
        if report.get("model_sha256") != _sha256(arguments.evaluate):
            raise ToolError(f"{path} describes another model than {arguments.evaluate}: give -o the folder of this one")
        report["held_out_bits_per_byte_parallel"] = round(parallel, 4)
        report["held_out_bits_per_byte_serial"] = round(serial, 4)
        _write_json(path, report)


def check(path: Path | None) -> None:
    """Compare with the `rwkv` package; ToolError if the logits differ by more than the tolerance."""
    if path is not None:
        weights = demo_measure.load_weights(path)
    else:  # fresh weights hold zeros that would hide others: disturb every tensor, so that each reaches the logits
        generator = torch.Generator().manual_seed(0)
        fresh = initial_weights(Config(layers=3), generator)
        weights = {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in fresh.items()}
    difference = demo_measure.largest_difference(weights)
    print(f"largest difference of logits from the rwkv package over {demo_measure.CHECK_BYTES} bytes: {difference:.1e}")
    if not difference <= demo_measure.CHECK_TOLERANCE:
        raise ToolError(
            f"the logits differ by {difference:.1e}, more than the tolerance {demo_measure.CHECK_TOLERANCE:.0e}"
        )


def build_parser() -> argparse.ArgumentParser:
    """The command line; every field of Recipe and Config is an option of its own."""
    parser = argparse.ArgumentParser(description="Train the demo model of rwkv-edge, a byte-level RWKV-7.")
    parser.add_argument("text", type=Path, nargs="?", help="text to train and to measure on, read as bytes")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder for model.safetensors and training.json"
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--eager", action="store_true", help="on CUDA: run kernel by kernel, without a graph")
    parser.add_argument("--compile", action="store_true", help="fuse the layers' kernels first, by torch.compile")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--validation",
        type=int,
        default=0,
        metavar="BYTES",
        help="measure on the last BYTES of the training part instead",
    )
    parser.add_argument("--evaluate", type=Path, metavar="FILE", help="measure this model and do not train")
    parser.add_argument(
        "--check", nargs="?", const=True, metavar="FILE", help="compare FILE, or fresh weights, with the rwkv package"
    )
    for kind in (Recipe, Config):
        group = parser.add_argument_group(kind.__name__.lower())
        for field in fields(kind):
            option = "--" + field.name.replace("_", "-")
            group.add_argument(
                option, type=type(field.default), default=field.default, help=f"default: {field.default}"
            )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        _refuse_bad(arguments)
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        if arguments.check:
            check(None if arguments.check is True else Path(arguments.check))
        elif arguments.evaluate:
            evaluate(arguments)
        else:
            train_and_save(arguments)
    except ToolError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _refuse_bad(arguments: argparse.Namespace) -> None:
    """ToolError for arguments that cannot be meant."""
    if not arguments.check and arguments.text is None:
        raise ToolError("give the TEXT to train and to measure on")
    if not arguments.check and not arguments.evaluate and arguments.output is None:
        raise ToolError("say with -o DIR where the model is to be written")
    positive = ("steps", "streams", "segment", "layers", "width", "head_size", "ffn_width", "learning_rate", "clip")
    for name in (*positive, "decay_rank", "rate_rank", "value_rank", "gate_rank"):
        if not getattr(arguments, name) > 0:
            raise ToolError(f"--{name.replace('_', '-')} must be positive, not {getattr(arguments, name)}")
    for name in ("restart", "dropout", "corruption", "averaging", "final_rate"):
        if not 0 <= getattr(arguments, name) < 1:
            raise ToolError(
                f"--{name.replace('_', '-')} must be at least 0 and below 1, not {getattr(arguments, name)}"
            )
    if arguments.width % arguments.head_size:
        raise ToolError(f"--width must be a multiple of --head-size {arguments.head_size}, not {arguments.width}")
    if arguments.vocabulary < 256 or arguments.layers < 2 or arguments.weight_decay < 0 or arguments.validation < 0:
        raise ToolError(
            "--vocabulary must be 256 or more, --layers 2 or more, --weight-decay and --validation 0 or more"
        )


def _from_arguments(kind: type[_Settings], arguments: argparse.Namespace) -> _Settings:
    return kind(**{field.name: getattr(arguments, field.name) for field in fields(kind)})


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ToolError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ToolError(f"the folder {folder} cannot be written: {error.strerror}") from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_json(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
