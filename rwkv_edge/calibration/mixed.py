"""The smallest model whose loss stays within a budget: a format for each group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_edge.artifact import Artifact
from rwkv_edge.calibration.loss import LossChange, LossMeter
from rwkv_edge.calibration.quantize import linears_of
from rwkv_edge.calibration.sensitivity import DEFAULT_TOKENS, Report, Sensitivity, group_formats, measured, meter_of
from rwkv_edge.errors import CalibrationError, InputError


@dataclass(frozen=True)
class MixedPlan:
    """What was chosen.

    Attributes:
        formats: of every linear.
        change: of the loss of all of it together, on the calibration text.
        budget: what was allowed, as a part of perplexity.
        sensitivity: what the choice came from.
    """

    formats: dict[str, str]
    change: LossChange
    budget: float
    sensitivity: Sensitivity

    def notes(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "budget": self.budget,
            "calibration_loss": {"nats": self.change.nats, "error": self.change.error},
            "sensitivity": self.sensitivity.to_json(),
        }


def mixed_formats(
    path: str | Path,
    calibration: Path,
    budget: float,
    block: int = 32,
    tokens: int = DEFAULT_TOKENS,
    threads: int = 0,
    report: Report | None = None,
) -> MixedPlan:
    """Measure the sensitivity of every group, then give int4 to as many as the budget allows, the cheapest first.

    All groups begin with int8. If that is too much already, the most sensitive ones stay in float. The loss of a
    choice is measured, not summed up from its groups; it and its standard error must stay within the budget.

    Args:
        path: the float artifact.
        calibration: of it.
        budget: increase of perplexity that is allowed, 0.005 for 0.5 %.
        block: of int4.
        tokens: about how many to measure on.
        threads: of ONNX Runtime.
        report: see `sensitivity`.

    Raises:
        CalibrationError: see `sensitivity`; or the budget is smaller than what can be measured.
        InputError: a budget that cannot be meant.
    """
    if not 0 < budget < 1:
        raise InputError(f"the budget must be between 0 and 100 % of perplexity, not {100 * budget:g} %")
    artifact, meter = meter_of(path, calibration, block, tokens, threads)
    found = measured(artifact, meter, block, report)
    plan = _Choice(artifact, meter, found, math.log1p(budget), block).best()
    return MixedPlan(*plan, budget, found)


class _Choice:
    """Formats by the number of groups that give way."""

    def __init__(self, artifact: Artifact, meter: LossMeter, found: Sensitivity, allowed: float, block: int) -> None:
        self._meter, self._allowed, self._artifact = meter, allowed, artifact
        self._four, self._eight = (group_formats(artifact, form, block) for form in ("w4", "w8"))
        known = {(g.group, g.form): g for g in found.groups}
        narrow = [g for g in self._four if (g, "w4") in known]
        self._narrow = sorted(narrow, key=lambda g: _price(known[g, "w4"].nats - known[g, "w8"].nats, _saved(known, g)))
        self._wide = sorted(
            self._eight,
            key=lambda g: -_price(known[g, "w8"].nats, known[g, "w8"].float_nbytes - known[g, "w8"].nbytes),
        )

    def best(self) -> tuple[dict[str, str], LossChange]:
        """The most groups in int4; else the fewest in float.

        Raises:
            CalibrationError: not even one group can be rounded.
        """
        count, change = self._most(len(self._narrow), self._with_int4)
        if change is not None:
            return self._all(self._with_int4(count)), change
        kept = len(self._wide) - 1
        count, change = self._most(kept, lambda n: self._with_float(kept - n))
        if change is None:
            raise CalibrationError(
                f"the budget of {100 * math.expm1(self._allowed):.2g} % is less than what int8 costs here; allow more"
            )
        return self._all(self._with_float(kept - count)), change

    def _most(self, count: int, formats: Callable[[int], dict[str, str]]) -> tuple[int, LossChange | None]:
        """The largest number up to ``count`` whose choice fits, by bisection; 0 and None where 0 does not."""
        low, best = 0, self._fits(formats(0))
        if best is None:
            return 0, None
        high = count + 1
        while high - low > 1:
            middle = (low + high) // 2
            change = self._fits(formats(middle))
            if change is None:
                high = middle
            else:
                low, best = middle, change
        return low, best

    def _fits(self, formats: dict[str, str]) -> LossChange | None:
        change = self._meter.change(formats)
        return change if change.nats + change.error <= self._allowed else None

    def _with_int4(self, count: int) -> dict[str, str]:
        return _joined([*self._eight.values(), *(self._four[group] for group in self._narrow[:count])])

    def _with_float(self, count: int) -> dict[str, str]:
        kept = set(self._wide[:count])
        return _joined([formats for group, formats in self._eight.items() if group not in kept])

    def _all(self, formats: dict[str, str]) -> dict[str, str]:
        """Every linear, those in float too."""
        return {name: formats.get(name, "float") for name in linears_of(self._artifact)}


def _joined(parts: Sequence[dict[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in parts:
        found |= part
    return found


def _saved(known: Any, group: str) -> int:
    return int(known[group, "w8"].nbytes - known[group, "w4"].nbytes)


def _price(nats: float, nbytes: int) -> float:
    """Loss for every byte that is saved; what seems to gain costs nothing."""
    return max(nats, 0.0) / max(nbytes, 1)
