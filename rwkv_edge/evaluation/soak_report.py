"""What a soak found."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np

WARM_UP = 3  # checkpoints, or a tenth of all if that is more: until then the allocator's free space settles


@dataclass(frozen=True, slots=True)
class SoakPoint:
    """What was found at a checkpoint.

    Attributes:
        tokens: consumed since the beginning.
        run: 0 for the first process, 1 for the one that resumed it, and so on.
        tokens_per_second: of the steps since the checkpoint before.
        rss_mb: memory of the process in megabytes; None where it is unknown.
        state_max: largest |value| of the state.
        state_max_name: the tensor that holds it.
        logits_drift: largest |difference| of the logits over the largest |logit| of the reference; None without one.
        state_drift: the same for the state tensor where it is largest.
        state_drift_name: that tensor.
    """

    tokens: int
    run: int
    tokens_per_second: float
    rss_mb: float | None
    state_max: float
    state_max_name: str
    logits_drift: float | None = None
    state_drift: float | None = None
    state_drift_name: str | None = None

    @property
    def drift(self) -> float:
        """The larger of the two; 0 without a reference."""
        return max(self.logits_drift or 0.0, self.state_drift or 0.0)

    def to_text(self) -> str:
        """One line."""
        rss = f", {self.rss_mb:.1f} MB" if self.rss_mb is not None else ""
        drift = f", drift: logits {self.logits_drift:.2e}, state {self.state_drift:.2e}" if self.state_drift else ""
        return (
            f"{self.tokens:>9} tokens, {self.tokens_per_second:.0f} tokens/s{rss}, "
            f"largest state {self.state_max:.3g} ({self.state_max_name}){drift}"
        )


@dataclass(frozen=True)
class SoakReport:
    """The whole run.

    Attributes:
        artifact: its folder's name.
        version: of RWKV.
        precision: of the artifact.
        tokens: consumed.
        source: where the tokens came from.
        reference: file of the float64 reference; None without one.
        backend: what ran the artifact.
        tokens_per_second: over all steps.
        rss_growth_mb: the most that a process grew after the first tenth of its checkpoints, or the first three; None
            where there are no others.
        nonfinite_at: the token after which NaN or infinity appeared; None where none did.
        drift: the largest at any checkpoint; None without a reference.
        tolerance: bound on it.
        passed: no NaN, and within the tolerance.
        points: the checkpoints.
    """

    artifact: str
    version: str
    precision: str
    tokens: int
    source: str
    reference: str | None
    backend: str
    tokens_per_second: float
    rss_growth_mb: float | None
    nonfinite_at: int | None
    drift: float | None
    tolerance: float
    passed: bool
    points: tuple[SoakPoint, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; NaN and infinity, which JSON has not, become null."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)), parse_constant=lambda _: None)
        return plain

    def to_text(self) -> str:
        """A few lines for a terminal."""
        few = f"not judged: that takes more than {WARM_UP} checkpoints"
        growth = few if self.rss_growth_mb is None else f"{self.rss_growth_mb:+.2f} MB after the warm-up"
        drift = (
            "not judged: that takes a reference"
            if self.drift is None
            else f"{self.drift:.3g} from float64, tolerance {self.tolerance:g}"
        )
        nonfinite = "none" if self.nonfinite_at is None else f"after token {self.nonfinite_at}"
        return (
            f"{'passed' if self.passed else 'FAILED'}: {self.tokens} tokens ({self.source}), "
            f"{self.tokens_per_second:.0f} tokens/s\n"
            f"  memory         {growth}\n"
            f"  NaN, infinity  {nonfinite}\n"
            f"  largest drift  {drift}"
        )


def rss_growth_mb(points: Sequence[SoakPoint]) -> float | None:
    """The most that any process grew after its warm-up; None where none had a checkpoint after that."""
    grown = []
    for number in {point.run for point in points}:
        rss = [p.rss_mb for p in points if p.run == number and p.rss_mb is not None]
        warm = max(WARM_UP, len(rss) // 10)
        if len(rss) > warm:
            grown.append(max(rss[warm:]) - rss[warm - 1])
    return round(max(grown), 3) if grown else None


def array_from_points(points: Sequence[SoakPoint], names: Sequence[str]) -> np.ndarray:
    """[P, 9] float64, names as indices and NaN for None: as JSON, a thousand points would need memory themselves."""

    def row(point: SoakPoint) -> list[float]:
        values = (names.index(v) if isinstance(v, str) else v for v in astuple(point))
        return [math.nan if value is None else value for value in values]

    return np.array([row(point) for point in points], np.float64)


def points_from_array(array: np.ndarray, names: Sequence[str]) -> list[SoakPoint]:
    """What `array_from_points` was given."""

    def point(row: list[float]) -> SoakPoint:
        tokens, run, speed, rss, largest, name, logits, state, worst = row
        found = None if math.isnan(worst) else names[int(worst)]
        drifts = _known(logits), _known(state), found
        return SoakPoint(int(tokens), int(run), speed, _known(rss), largest, names[int(name)], *drifts)

    return [point(row) for row in array.tolist()]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
