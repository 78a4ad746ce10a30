"""Single streams of a state on the GPU: read, written and copied one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from rwkv_edge.runtime.cuda_driver import Driver
from rwkv_edge.spec import ModelSpec, numpy_dtype

if TYPE_CHECKING:
    from rwkv_edge.runtime.cuda_state import CudaState


class StateRows:
    """The streams of a state by their place in the batch."""

    def __init__(self, driver: Driver, spec: ModelSpec, state: CudaState) -> None:
        self._driver, self._spec, self._state = driver, spec, state

    def read(self, row: int) -> dict[str, np.ndarray]:
        """Copies of a stream's tensors [1, …] by name, as they are stored."""
        found = {}
        for t in self._spec.state:
            found[t.name] = np.empty((1, *t.shape), numpy_dtype(t.dtype))
            self._driver.download(self._address(t.name, row), found[t.name])
        return found

    def write(self, row: int, stored: Mapping[str, np.ndarray]) -> None:
        """Give a stream these values, as `read` gives them."""
        for t in self._spec.state:
            self._driver.upload(np.ascontiguousarray(stored[t.name]), self._address(t.name, row))

    def copy(self, row: int, source: StateRows, from_row: int) -> None:
        """Give a stream the state of another, of this state or another one, on the GPU."""
        for t in self._spec.state:
            self._driver.copy(self._address(t.name, row), source._address(t.name, from_row), t.nbytes)

    def _address(self, name: str, row: int) -> int:
        return self._state.address(name, self._state.side, row)
