"""From a checkpoint and a text to a quantized artifact in one go."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rwkv_edge.artifact import Manifest
from rwkv_edge.calibration.calibrate import CalibrateOptions, Report, calibrate
from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
from rwkv_edge.calibration.schemes import SchemeOptions
from rwkv_edge.calibration.text import Text
from rwkv_edge.checkpoints import Checkpoint
from rwkv_edge.errors import InputError
from rwkv_edge.exporters.folder import disk_errors
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.exporters.weights import Progress

SCHEME = "w8a8"


def check_int8(options: ExportOptions) -> None:
    """Refuse, before anything is exported, what cannot be quantized after it.

    Raises:
        InputError: bf16, fused nodes, or no tokenizer to read the text with.
    """
    if options.wkv == "fused":
        raise InputError("--int8 quantizes no fused nodes, whose kernels take float; choose another --wkv")
    if options.precision == "bf16":
        raise InputError("--int8 quantizes fp32 or fp16, not bf16; choose another --precision")
    if options.tokenizer == "none":
        raise InputError("--int8 reads a text, but there is --tokenizer none; leave it out")


def export_quantized(
    checkpoint: Checkpoint,
    target: Path,
    options: ExportOptions,
    texts: Sequence[Text],
    progress: Callable[[int], Progress] | None = None,
    report: Report | None = None,
) -> Manifest:
    """Export, calibrate and quantize to W8A8; the float artifact is gone afterwards.

    Args:
        checkpoint: an open checkpoint.
        target: the folder to create.
        options: of the export.
        texts: to calibrate on.
        progress: of the export's weights.
        report: of the calibration's tokens.

    Returns:
        The manifest of the quantized artifact.

    Raises:
        RwkvEdgeError: what the three steps raise; nothing is left then.
    """
    check_int8(options)
    place = Path(os.path.realpath(target)).parent
    with disk_errors(target):
        place.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{target.name}.float-", dir=place)
    with scratch as name:
        folder, calibration = Path(name) / "float", Path(name) / "calibration.json"
        export_checkpoint(checkpoint, folder, options, progress)
        calibrate(folder, texts, calibration, CalibrateOptions(), report)
        return quantize_artifact(folder, target, QuantizeOptions(SchemeOptions(SCHEME)), calibration)
