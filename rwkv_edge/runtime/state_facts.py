"""What snapshots hold, and how two of them differ."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_edge.errors import StateError
from rwkv_edge.runtime.snapshot import read_snapshot


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs between two snapshots.

    Attributes:
        name: of the tensor.
        max_abs: largest |a − b|; infinite where only one of them is NaN.
        relative: ``max_abs`` over the largest |a|.
        differing: number of elements that are not equal.
        elements: number of elements.
    """

    name: str
    max_abs: float
    relative: float
    differing: int
    elements: int


@dataclass(frozen=True)
class Differences:
    """Of two snapshots: are they of the same model; and their tensors, the largest relative difference first."""

    same_model: bool
    tensors: tuple[TensorDifference, ...]

    @property
    def differing(self) -> tuple[TensorDifference, ...]:
        """The tensors that are not equal."""
        return tuple(tensor for tensor in self.tensors if tensor.differing)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def snapshot_facts(path: Path) -> dict[str, Any]:
    """What a snapshot holds, as JSON values.

    Raises:
        StateError: it cannot be read.
    """
    found = read_snapshot(path)
    largest = {name: float(np.abs(array).max(initial=0)) for name, array in found.arrays.items()}
    name = max(largest, key=largest.__getitem__, default="")
    return {
        "path": str(path),
        "version": found.version,
        "precision": found.precision,
        "model_hash": found.model_hash,
        "initial_hash": found.initial_hash,
        "streams": [asdict(stream) for stream in found.streams],
        "tensors": len(found.arrays),
        "bytes": sum(array.nbytes for array in found.arrays.values()),
        "largest": largest.get(name, 0.0),
        "largest_name": name,
        "extra": sorted({*found.extra, *found.notes}),
    }


def snapshot_differences(a: Path, b: Path) -> Differences:
    """Compare two snapshots, of the same model or of two with the same state tensors.

    Raises:
        StateError: one cannot be read, or they have other tensors or shapes.
    """
    first, second = read_snapshot(a), read_snapshot(b)
    shapes = [{name: array.shape for name, array in snapshot.arrays.items()} for snapshot in (first, second)]
    if shapes[0] != shapes[1]:
        odd = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))[0]
        found = [list(shape[odd]) if odd in shape else "absent" for shape in shapes]
        raise StateError(f"{a} and {b} cannot be compared: '{odd}' is {found[0]} in one and {found[1]} in the other")
    tensors = [_difference(name, array, second.arrays[name]) for name, array in first.arrays.items()]
    return Differences(
        (first.model_hash, first.initial_hash) == (second.model_hash, second.initial_hash),
        tuple(sorted(tensors, key=lambda tensor: -tensor.relative)),
    )


def _difference(name: str, a: np.ndarray, b: np.ndarray) -> TensorDifference:
    a, b = a.astype(np.float64), b.astype(np.float64)
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):  # infinity − infinity
        difference = np.where(equal, 0.0, np.abs(a - b))
    difference[np.isnan(difference)] = np.inf
    largest = float(difference.max(initial=0))
    scale = float(np.nanmax(np.abs(a), initial=0)) or 1e-30
    return TensorDifference(name, largest, largest / scale, int((~equal).sum()), a.size)
