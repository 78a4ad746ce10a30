"""calibration.json: what was seen where, in which model, on which texts; and the statistics beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_edge.artifact import sha256_of
from rwkv_edge.calibration.fingerprint import Fingerprint
from rwkv_edge.calibration.ranges import METHODS
from rwkv_edge.errors import CalibrationError

FORMAT = "rwkv-edge calibration"
FORMAT_VERSION = 1
AGAIN = "run 'rwkv-edge calibrate' again"


@dataclass(frozen=True)
class Range:
    """What one input of linears took on: magnitudes, and the threshold that was chosen for 8 bits.

    Attributes:
        linears: parameters [in, out] that this value is multiplied with.
        width: its channels, K.
        count: values that were seen.
        rms: root of the mean square.
        percentiles: '99.9' → magnitude.
        thresholds: by every method; the one of the calibration's ``method`` is used.
    """

    linears: tuple[str, ...]
    width: int
    count: int
    rms: float
    percentiles: Mapping[str, float]
    thresholds: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self.__dict__, "linears": list(self.linears)}


@dataclass(frozen=True, eq=False)
class Calibration:
    """The content of a calibration file.

    Attributes:
        path: the file.
        model_hash: sha256 of the weights that it was made with.
        version: of RWKV.
        method: of the thresholds, a name in `METHODS`.
        settings: windows, seed, tools.
        texts: names, sizes and hashes.
        fingerprint: of the texts, see `overlap`.
        inputs: name of the first linear → range.
        files: other files of this calibration and their sha256.
    """

    path: Path
    model_hash: str
    version: str
    method: str
    settings: Mapping[str, Any]
    texts: tuple[Mapping[str, Any], ...]
    fingerprint: Fingerprint
    inputs: Mapping[str, Range]
    files: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, in a fixed order."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model_hash": self.model_hash,
            "version": self.version,
            "method": self.method,
            "settings": dict(self.settings),
            "texts": [dict(text) for text in self.texts],
            "inputs": {name: entry.to_json() for name, entry in self.inputs.items()},
            "files": dict(self.files),
            "fingerprint": self.fingerprint.to_json(),
        }

    def input_of(self, linear: str) -> str:
        """The name under which the input of a linear is recorded.

        Raises:
            CalibrationError: it is not.
        """
        for name, entry in self.inputs.items():
            if linear in entry.linears:
                return name
        raise CalibrationError(f"{self.path} has no range for the input of '{linear}'; {AGAIN}")

    def threshold(self, linear: str) -> float:
        """The largest magnitude of the input of a linear that 8 bits shall represent."""
        return self.inputs[self.input_of(linear)].thresholds[self.method]

    @property
    def has_hessians(self) -> bool:
        """Whether it was made with --hessian."""
        return any(".hessian-" in name for name in self.files)

    def statistic(self, kind: str, name: str) -> np.ndarray:
        """An array beside the JSON: 'peak' or 'square' [K], 'histogram' [BINS + 1], 'hessian' [K, K], 'tokens' [S, W].

        Raises:
            CalibrationError: its file is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        key = f"{kind}/{name}" if name else kind
        try:
            for file in self.files:
                with safe_open(self.path.parent / file, framework="numpy") as tensors:
                    if key in tensors.keys():  # noqa: SIM118  # not a dictionary
                        found: np.ndarray = tensors.get_tensor(key)
                        return found
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"{self.path.parent / file} cannot be read ({_line(error)}); {AGAIN}") from error
        raise CalibrationError(f"{self.path} has no '{key}'; {AGAIN}")

    def check_files(self) -> None:
        """Compare the files beside the JSON with their hashes.

        Raises:
            CalibrationError: one is missing or another.
        """
        for name, sha256 in self.files.items():
            try:
                found = sha256_of(self.path.parent / name)
            except OSError as error:
                raise CalibrationError(
                    f"{self.path} needs {name} beside it, which cannot be read ({error.strerror}); {AGAIN}"
                ) from error
            if found != sha256:
                raise CalibrationError(f"{self.path.parent / name} is not the file that was written; {AGAIN}")


def overlap(calibration: Calibration, text: str) -> float:
    """Share of a text, from 0 to 1, that the texts of a calibration hold too: above 0.01, a figure on it flatters."""
    return calibration.fingerprint.share_of(text.encode("utf-8"))


def load_calibration(path: Path) -> Calibration:
    """Read a calibration; the statistics beside it are not touched.

    Raises:
        CalibrationError: there is none, it is cut or damaged, or holds NaN.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} is damaged ({_line(error)}); {AGAIN}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CalibrationError(f"{path} is not a calibration; expected the file that 'rwkv-edge calibrate' wrote")
    if data.get("format_version") != FORMAT_VERSION:
        version = str(data.get("format_version"))[:40]
        raise CalibrationError(f"{path} has format version {version}, expected {FORMAT_VERSION}; {AGAIN}")
    try:
        return _checked(path, data)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"it lacks '{error.args[0]}'" if isinstance(error, KeyError) else _line(error)
        raise CalibrationError(f"{path} is damaged ({reason}); {AGAIN}") from error


def _checked(path: Path, data: Mapping[str, Any]) -> Calibration:
    if not re.fullmatch(r"[0-9a-f]{64}", data["model_hash"]):
        raise ValueError("its model hash is none")
    if data["method"] not in METHODS:
        raise ValueError(f"its method is {data['method']!r}")
    for name, sha256 in data["files"].items():
        if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ValueError(f"'{name}' is no file beside it")
    return Calibration(
        path=path,
        model_hash=data["model_hash"],
        version=str(data["version"]),
        method=data["method"],
        settings=dict(data["settings"]),
        texts=tuple(dict(text) for text in data["texts"]),
        fingerprint=Fingerprint.from_json(data["fingerprint"]),
        inputs={str(name): _range(name, entry) for name, entry in data["inputs"].items()},
        files=dict(data["files"]),
    )


def _range(name: str, entry: Mapping[str, Any]) -> Range:
    thresholds = {method: _magnitude(entry["thresholds"][method], f"threshold of '{name}'") for method in METHODS}
    return Range(
        linears=tuple(str(linear) for linear in entry["linears"]),
        width=int(entry["width"]),
        count=int(entry["count"]),
        rms=_magnitude(entry["rms"], f"rms of '{name}'"),
        percentiles={str(p): _magnitude(x, f"percentile of '{name}'") for p, x in entry["percentiles"].items()},
        thresholds=thresholds,
    )


def _magnitude(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"the {name} is {value!r}, not a magnitude")
    return float(value)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
