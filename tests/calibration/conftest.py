"""Small artifacts and their calibrations, made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from makers import MAKERS

from rwkv_edge.calibration.calibrate import CalibrateOptions, calibrate
from rwkv_edge.calibration.text import Text, WindowOptions
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.synthetic import save_pth
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint

TEXT = "".join(f"{i} times {j} is {i * j}; so they say.\n" for i in range(40) for j in range(10))
WINDOWS = WindowOptions(samples=4, length=32, warmup=16)


@dataclass(frozen=True)
class Calibrated:
    """A float artifact and what was seen in it."""

    artifact: Path
    calibration: Path


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Calibrated]:
    """Makes the artifact of a version, 2 layers x 128 with a chunk of 16, and its calibration with Hessians."""
    made: dict[tuple[str, str], Calibrated] = {}

    def make(version: str, precision: str = "fp32") -> Calibrated:
        if (version, precision) not in made:
            folder = tmp_path_factory.mktemp(f"rwkv{version}-{precision}")
            checkpoint = save_pth(MAKERS[version](), folder / "model.pth")
            options = ExportOptions(precision=precision, chunks=(16,))
            export_checkpoint(open_checkpoint(checkpoint), folder / "float", options)
            found = Calibrated(folder / "float", folder / "calibration.json")
            options_ = CalibrateOptions(WINDOWS, hessian=True, threads=1)
            calibrate(found.artifact, [Text("numbers", TEXT)], found.calibration, options_)
            made[version, precision] = found
        return made[version, precision]

    return make
