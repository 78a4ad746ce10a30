"""The weights of a float artifact, one at a time, with the factors that smoothing moves between them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rwkv_edge.artifact import WEIGHTS, Artifact
from rwkv_edge.errors import ArtifactError
from rwkv_edge.spec import ITEM_SIZE, float32_from_stored, numpy_dtype, stored_from_float32

INDEX = "weights.json"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in weights.bin."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class FloatWeights:
    """Mapped tensors of a float artifact.

    Attributes:
        places: by name, in the order of the file.
        rows: factors [in] of the rows of linears.
        columns: factors of the last axis, or of a vector's elements.
    """

    mapped: np.ndarray
    places: Mapping[str, Place]
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def open(cls, artifact: Artifact) -> FloatWeights:
        """Of an artifact whose content was checked.

        Raises:
            ArtifactError: index and weights do not fit each other.
        """
        index = artifact.path / INDEX
        try:
            mapped: np.ndarray = np.memmap(artifact.path / WEIGHTS, np.uint8, mode="r")
            places = {place.name: place for place in _places(json.loads(index.read_bytes()), mapped.size)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ArtifactError(
                f"{index} does not describe {WEIGHTS} ({error}); export the checkpoint again"
            ) from error
        return cls(mapped, places)

    def stored(self, name: str) -> np.ndarray:
        """The values as they will be stored, factors included."""
        place = self.places[name]
        raw = self.mapped[place.offset : place.offset + place.nbytes].view(numpy_dtype(place.dtype))
        array: np.ndarray = raw.reshape(place.shape)
        if name not in self.rows and name not in self.columns:
            return array
        return stored_from_float32(self._scaled(name, float32_from_stored(array, place.dtype)), place.dtype)

    def load(self, name: str) -> np.ndarray:
        """The values as float32, factors included."""
        return float32_from_stored(self.stored(name), self.places[name].dtype)

    def _scaled(self, name: str, array: np.ndarray) -> np.ndarray:
        if name in self.rows:
            array = array * self.rows[name][:, None]
        if name in self.columns:
            factors = self.columns[name]
            array = (array.reshape(-1, len(factors)) * factors).reshape(array.shape)
        return array


def _places(entries: Any, size: int) -> Iterator[Place]:
    for entry in entries:
        shape = tuple(int(n) for n in entry["shape"])
        place = Place(str(entry["name"]), str(entry["dtype"]), shape, int(entry["offset"]), int(entry["nbytes"]))
        expected = int(np.prod(shape)) * ITEM_SIZE[place.dtype]
        if not 0 <= place.offset <= place.offset + place.nbytes <= size or place.nbytes != expected:
            raise ValueError(f"'{place.name}' does not lie inside {WEIGHTS}")
        yield place
