"""Pinned memory between the caller of a step and the GPU, so that a step waits for the GPU once."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from rwkv_edge.runtime.cuda_driver import Driver

ROWS: Final = 8
"""Streams whose tokens and logits fit: 2 MiB with a vocabulary of 65536. Copies of more take longer than a wait."""

TOKEN: Final = 4  # bytes


class Staging:
    """Tokens on their way to the device, logits on their way back."""

    def __init__(self, driver: Driver, vocabulary: int) -> None:
        """Nothing is allocated yet.

        Args:
            driver: the GPU.
            vocabulary: V.
        """
        self._driver, self._vocabulary = driver, vocabulary
        self._tokens: NDArray[np.int32] | None = None
        self._logits: NDArray[np.float32] | None = None
        self._under_way = False  # tokens that the device may still have to read

    def feed(self, tokens: np.ndarray, to: int) -> None:
        """Copy tokens [B] to device memory, int32; they may change as soon as this returns."""
        if len(tokens) > ROWS:
            self._driver.upload(np.ascontiguousarray(tokens, np.int32), to)
            return
        if self._tokens is None:
            self._tokens = self._driver.pinned(TOKEN * ROWS).view(np.int32)
        if self._under_way:
            self._driver.synchronize()
        self._under_way = True
        self._tokens[: len(tokens)] = tokens
        self._driver.enqueue_upload(self._tokens[: len(tokens)], to)

    def logits(self, pointer: int, batch: int) -> NDArray[np.float32]:
        """Logits [B, V] from device memory, after all that was enqueued."""
        if batch > ROWS:
            found = np.empty((batch, self._vocabulary), np.float32)
            self._driver.download(pointer, found)
            return found
        if self._logits is None:
            nbytes = TOKEN * ROWS * self._vocabulary
            self._logits = self._driver.pinned(nbytes).view(np.float32).reshape(ROWS, self._vocabulary)
        self._driver.enqueue_download(pointer, self._logits[:batch])
        self._driver.synchronize()
        self._under_way = False
        return self._logits[:batch].copy()
