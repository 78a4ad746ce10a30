"""Tokens and logits through pinned memory: no token is overwritten before the device has read it."""

from __future__ import annotations

from collections.abc import Callable

import cuda_double
import numpy as np
import pytest

from rwkv_edge.runtime.cuda_staging import ROWS, Staging


class Late(cuda_double.Driver):
    """A device that copies from pinned memory only when somebody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Callable[[], None]] = []

    def enqueue_upload(self, array: np.ndarray, to: int) -> None:
        self.waiting.append(lambda: cuda_double.Driver.enqueue_upload(self, array, to))

    def enqueue_download(self, pointer: int, array: np.ndarray) -> None:
        self.waiting.append(lambda: cuda_double.Driver.enqueue_download(self, pointer, array))

    def synchronize(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


@pytest.mark.parametrize("batch", [1, 3, ROWS, ROWS + 1])
def test_tokens_in_and_logits_out(batch: int) -> None:
    driver = Late()
    staging = Staging(driver, 5)  # type: ignore[arg-type, unused-ignore]
    first, second, logits = (driver.allocate(4 * batch * n) for n in (1, 1, 5))
    tokens, found = np.arange(batch, dtype=np.int64), np.empty(batch, np.int32)
    expected = np.random.default_rng(0).normal(0, 1, (batch, 5)).astype(np.float32)
    driver.upload(expected, logits)
    staging.feed(tokens, first)
    staging.feed(tokens + 7, second)  # no logits in between, as for tokens that are owed
    given = staging.logits(logits, batch)
    for pointer, right in ((first, tokens), (second, tokens + 7)):
        driver.download(pointer, found)
        np.testing.assert_array_equal(found, right)
    np.testing.assert_array_equal(given, expected)
    driver.upload(expected + 1, logits)
    np.testing.assert_array_equal(staging.logits(logits, batch), expected + 1)
    np.testing.assert_array_equal(given, expected)  # the caller's own
