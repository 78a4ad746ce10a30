"""What a folder holds for a report: artifacts, and the JSON of eval, bench, sensitivity and calibrate."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rwkv_edge.artifact import MANIFEST, Artifact
from rwkv_edge.errors import FileError

MOST_BYTES = 1 << 28  # of a JSON file; a calibration of a large model has some megabytes


@dataclass
class Row:
    """An artifact and all that is known about it.

    Attributes:
        name: of its folder.
        model_hash: of its weights.
        scheme: 'fp32', 'w8a8'…
        nbytes: of its weights.
        formats: linear → format of a quantized one.
        facts: what its manifest says about its quantization.
        evaluation: of `eval --json`, the last by name of the file.
        bench: of a contender of `bench --json`.
    """

    name: str
    model_hash: str
    scheme: str
    nbytes: int | None = None
    formats: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    bench: Mapping[str, Any] | None = None

    @property
    def kept(self) -> list[str]:
        """Linears of a quantized artifact that stayed in float."""
        return [name for name, form in self.formats.items() if form == "float"]

    def number(self, *path: str) -> float | None:
        """A finite number of the evaluation or the benchmark; None where it is not there."""
        value: Any = self.evaluation if path[0] == "eval" else self.bench
        for key in path[1:]:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        return float(value)


@dataclass
class Collected:
    """A folder's content, by kind.

    Attributes:
        folder: the folder.
        rows: artifacts, floats first, then by size.
        dimensions: of the model, in words.
        sensitivity: of `sensitivity --json`.
        calibration: the file of a calibration.
        protocol: how texts were fed, each different one once.
        machines: where speed was measured, each different one once.
        warnings: of evaluations.
        used: files that the report is made of.
        ignored: JSON files that are none of ours.
    """

    folder: Path
    rows: list[Row] = field(default_factory=list)
    dimensions: str = ""
    sensitivity: Mapping[str, Any] | None = None
    calibration: Path | None = None
    protocol: list[str] = field(default_factory=list)
    machines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def row(self, name: str, model_hash: str, scheme: str) -> Row:
        """The row of an artifact, which is made where there is none."""
        for row in self.rows:
            if (row.name, row.model_hash) == (name, model_hash):
                return row
        self.rows.append(Row(name, model_hash, scheme))
        return self.rows[-1]


def collect(folder: Path) -> Collected:
    """Read the artifacts in a folder's subfolders, and its JSON files.

    Raises:
        FileError: it holds nothing to report, or one of its files is damaged.
        ArtifactError: an artifact is damaged.
    """
    if not folder.is_dir():
        raise FileError(f"{folder} is not a folder; give the one that holds artifacts and the JSON of eval and bench")
    found = Collected(folder)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (path / MANIFEST).is_file():
            _add_artifact(found, Artifact.open(path))
    for path in sorted(folder.glob("*.json")):
        _add_file(found, path)
    if not found.used:
        raise FileError(f"{folder} holds nothing to report; put artifacts there, and the JSON of eval and bench")
    found.rows.sort(key=lambda row: (bool(row.formats), -(row.nbytes or 0), row.name))
    return found


def _add_artifact(found: Collected, artifact: Artifact) -> None:
    manifest, spec = artifact.manifest, artifact.manifest.spec
    quantization = manifest.quantization or {}
    scheme = str(quantization.get("scheme", spec.precision))
    row = found.row(artifact.path.resolve().name, manifest.model_hash, scheme)
    weights = manifest.files.get("weights.bin")
    row.nbytes = weights.nbytes if weights else None
    row.formats = quantization.get("formats", {})
    row.facts = {name: value for name, value in quantization.items() if name != "formats"}
    found.dimensions = found.dimensions or (
        f"RWKV-{spec.version}, {spec.n_layer} layers × {spec.n_embd}, vocabulary {spec.vocab_size}"
    )
    found.used.append(f"{row.name}/{MANIFEST}")


def _add_file(found: Collected, path: Path) -> None:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged ({str(error)[:200]}); make it again or take it away") from error
    try:
        known = _add(found, path, data) if isinstance(data, Mapping) else False
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(
            f"{path} is not as rwkv-edge wrote it ({type(error).__name__}: {str(error)[:100]}); make it again"
        ) from error
    (found.used if known else found.ignored).append(path.name)


def _add(found: Collected, path: Path, data: Mapping[str, Any]) -> bool:
    """Whether it is one of ours."""
    if data.get("kind") == "evaluation":
        _add_evaluation(found, data)
    elif data.get("kind") == "benchmark":
        _add_bench(found, data)
    elif data.get("format") == "rwkv-edge calibration":
        found.calibration = path
    elif "float_nats" in data and "groups" in data:
        found.sensitivity = _checked_sensitivity(data)
    else:
        return False
    return True


def _add_evaluation(found: Collected, data: Mapping[str, Any]) -> None:
    subject = data["artifact"]
    if data.get("comparison"):
        str(data["reference"]["model_hash"])
    row = found.row(str(subject["name"]), str(subject["model_hash"]), _scheme(subject))
    row.evaluation = data
    row.nbytes = row.nbytes or int(subject["weight_bytes"]) or None
    protocol = data.get("protocol")
    if protocol:
        sentence = (
            f"{data['text']['file']}: {data['score']['tokens']:,} tokens; windows of {int(protocol['window'])} tokens "
            f"(0: all), stride {int(protocol['stride'])}, warm-up {int(protocol['warm_up'])}, "
            f"state {protocol['state']}, beginning {protocol['initial_state']}"
        )
        found.protocol += [sentence] if sentence not in found.protocol else []
    if data.get("lambada"):
        sentence = f"{data['lambada']['file']}: LAMBADA, {data['lambada']['convention']}"
        found.protocol += [sentence] if sentence not in found.protocol else []
    found.warnings += [str(line) for line in data["warnings"]]


def _scheme(subject: Mapping[str, Any]) -> str:
    return str(subject.get("quantization") or subject["precision"])


def _add_bench(found: Collected, data: Mapping[str, Any]) -> None:
    machine = data["machine"]
    names = [machine.get("board"), machine.get("gpu"), machine.get("cpu"), f"{machine['cores']} cores"]
    names += [f"power mode {machine['power_mode']}"] if machine.get("power_mode") else []
    place = ", ".join(str(name) for name in names if name)
    sentence = f"{place}; batch {int(data['batch'])}, prompt of {int(data['prompt'])} tokens"
    found.machines += [sentence] if sentence not in found.machines else []
    for contender in data["contenders"]:
        if contender["parity"]["passed"] is not True:
            raise ValueError("a speed without parity")
        if contender["model_hash"] is not None:
            scheme = str(contender["precision"]).split()[-1]
            found.row(str(contender["name"]), str(contender["model_hash"]), scheme).bench = contender


def _checked_sensitivity(data: Mapping[str, Any]) -> Mapping[str, Any]:
    groups: list[dict[str, Any]] = [
        {"group": str(g["group"]), "form": str(g["form"]), "nats": float(g["nats"]), "error": float(g["error"])}
        for g in data["groups"]
    ]
    if not all(math.isfinite(g["nats"]) and 0 <= g["error"] < math.inf for g in groups):
        raise ValueError("a change that is not finite")
    return {"tokens": int(data["tokens"]), "groups": groups}
