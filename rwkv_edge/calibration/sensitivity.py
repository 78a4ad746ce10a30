"""What each part of a model loses when it alone is rounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rwkv_edge.artifact import Artifact
from rwkv_edge.calibration.loss import LossMeter
from rwkv_edge.calibration.quantize import checked_calibration, linears_of
from rwkv_edge.calibration.schemes import BLOCKS, allowed_format, group_of
from rwkv_edge.calibration.stream import float_graph
from rwkv_edge.errors import CalibrationError, InputError
from rwkv_edge.models.versions import architecture_named

FORMS = ("w4", "w8")
DEFAULT_TOKENS = 8192
Report = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class GroupSensitivity:
    """One group of linears, in one form, all others in float.

    Attributes:
        group: 'blocks.3.att', say.
        form: 'w4' or 'w8', the narrowest of its linears.
        linears: how many.
        nbytes: of the group in this form.
        float_nbytes: as exported.
        nats: increase of the loss per token.
        error: standard error of it.
    """

    group: str
    form: str
    linears: int
    nbytes: int
    float_nbytes: int
    nats: float
    error: float


@dataclass(frozen=True)
class Sensitivity:
    """Of a whole model, on the text of a calibration.

    Attributes:
        model_hash: of the float artifact.
        block: of int4.
        tokens: predictions that were compared.
        float_nats: loss of the float model per token.
        groups: every group in every form, in the order of the model.
    """

    model_hash: str
    block: int
    tokens: int
    float_nats: float
    groups: tuple[GroupSensitivity, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "groups": [asdict(group) for group in self.groups]}

    def to_text(self) -> str:
        """A table with bars for a terminal."""
        most = max((group.nats for group in self.groups), default=0.0) or 1.0
        lines = [f"{'group':<16} {'form':<5} {'MB':>8}  perplexity  (of {self.tokens:,} tokens)"]
        for g in self.groups:
            bar = "#" * max(0, round(30 * g.nats / most))
            change = f"{100 * math.expm1(g.nats):+8.3f} % ± {100 * g.error:.3f}"
            lines.append(f"{g.group:<16} {g.form:<5} {g.nbytes / 1e6:>8.3f} {change}  {bar}".rstrip())
        return "\n".join(lines)


def group_formats(artifact: Artifact, form: str, block: int) -> dict[str, dict[str, str]]:
    """Group → linear → the format that ``form`` comes to for it; linears that the version keeps are left out."""
    architecture = architecture_named(artifact.manifest.spec.version)
    found: dict[str, dict[str, str]] = {}
    for name, shape in linears_of(artifact).items():
        allowed = allowed_format(name, shape, form, architecture, block)
        if allowed != "float":
            found.setdefault(group_of(name), {})[name] = allowed
    return found


def sensitivity(
    path: str | Path,
    calibration: Path,
    block: int = 32,
    tokens: int = DEFAULT_TOKENS,
    threads: int = 0,
    report: Report | None = None,
) -> Sensitivity:
    """Round one group after the other and measure the loss on the calibration's windows.

    Args:
        path: the float artifact.
        calibration: of it.
        block: of int4.
        tokens: about how many to feed each time.
        threads: of ONNX Runtime.
        report: told of groups.

    Raises:
        ArtifactError: the artifact is damaged.
        CalibrationError: it is quantized, or the calibration is not of this artifact.
        InputError: a block that does not exist.
    """
    artifact, meter = meter_of(path, calibration, block, tokens, threads)
    return measured(artifact, meter, block, report)


def meter_of(path: str | Path, calibration: Path, block: int, tokens: int, threads: int) -> tuple[Artifact, LossMeter]:
    """The opened artifact and what measures it; see `sensitivity`."""
    if block not in BLOCKS:
        raise InputError(f"block must be one of {', '.join(map(str, BLOCKS))}, not {block}")
    if tokens < 1:
        raise InputError(f"there must be tokens to measure on, not {tokens}")
    artifact = Artifact.open(path)
    float_graph(artifact, (), 0)  # refuses what is quantized
    found = checked_calibration(calibration, artifact, "mixed")
    if found is None:
        raise CalibrationError("the sensitivity needs a calibration; run 'rwkv-edge calibrate' first")
    artifact.check_content()
    return artifact, LossMeter(artifact, found, block, tokens, threads)


def measured(artifact: Artifact, meter: LossMeter, block: int, report: Report | None) -> Sensitivity:
    """Every group in every form."""
    forms = {form: group_formats(artifact, form, block) for form in FORMS}
    update = report("groups", sum(map(len, forms.values()))) if report else lambda _: None
    found = []
    for group in forms[FORMS[0]]:
        for form in FORMS:
            formats = forms[form][group]
            if form == "w4" and formats == forms["w8"][group]:
                update(1)
                continue  # the version or its shape allows no int4 here
            found.append(_entry(meter, group, form, formats))
            update(1)
    return Sensitivity(artifact.manifest.model_hash, block, meter.tokens, meter.nats, tuple(found))


def _entry(meter: LossMeter, group: str, form: str, formats: Mapping[str, str]) -> GroupSensitivity:
    change = meter.change(formats)
    plain = meter.nbytes(dict.fromkeys(formats, "float"))
    return GroupSensitivity(group, form, len(formats), meter.nbytes(formats), plain, change.nats, change.error)
