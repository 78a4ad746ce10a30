"""Order of calls to the CUDA driver that no double of a GPU sees."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from rwkv_edge.errors import SessionError
from rwkv_edge.runtime.cuda_driver import Driver


class Calls:
    """Stands for `cuda.bindings.driver`: notes every call, and refuses what spoils a capture."""

    FORBIDDEN = ("cuStreamSynchronize", "cuMemFree", "cuMemFreeHost", "cuGraphExecDestroy", "cuEventDestroy")

    def __init__(self) -> None:
        self.called: list[str] = []
        self.capturing, self.spoilt, self.last = False, False, 0
        self.host: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("CU"):
            return MagicMock()
        return lambda *arguments: self._call(name)

    def _call(self, name: str) -> tuple[Any, ...]:
        self.called.append(name)
        if self.capturing and name in self.FORBIDDEN:
            self.spoilt = True
        if name == "cuStreamBeginCapture":
            self.capturing, self.spoilt = True, False
        if name == "cuStreamEndCapture":
            self.capturing = False
            return (Status(901), 0) if self.spoilt else (Status(0), 77)
        if name == "cuDeviceGetName":
            return Status(0), b"double\0"
        if name == "cuMemHostAlloc":
            self.host.append(ctypes.create_string_buffer(64))
            return Status(0), ctypes.addressof(self.host[-1])
        self.last += 256
        return Status(0), self.last


class Status(int):
    name = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    monkeypatch.setattr("rwkv_edge.runtime.cuda_driver._bindings", lambda: found)
    return found


class Holder:
    """Holds memory of all kinds, and itself: only the collector of garbage drops it."""

    def __init__(self, driver: Driver) -> None:
        self.me = self
        with driver.capture() as graph:
            pass
        event, pinned, pointer = driver.event(), driver.pinned(16), driver.allocate(16)
        weakref.finalize(self, release, driver, graph, event, pinned, pointer)


def release(driver: Driver, graph: Any, event: Any, pinned: np.ndarray, pointer: int) -> None:
    graph.close()
    event.close()
    driver.free_pinned(pinned)
    driver.free(pointer)


def test_what_is_dropped_during_a_capture_is_freed_after_it(calls: Calls) -> None:
    driver = Driver()
    gc.disable()
    try:
        Holder(driver)
        before = len(calls.called)
        with driver.capture() as graph:
            gc.collect()
            assert len(calls.called) == before + 1  # the beginning of the capture
        assert graph.executable
    finally:
        gc.enable()
    names = calls.called[before:]
    end = names.index("cuStreamEndCapture")
    assert sorted(set(names) & set(Calls.FORBIDDEN)) == sorted(Calls.FORBIDDEN)
    assert all(names.index(name) > end for name in Calls.FORBIDDEN)
    driver.close()
    for name in ("cuMemFree", "cuMemFreeHost", "cuEventDestroy"):
        assert calls.called.count(name) == 1
    assert calls.called.count("cuGraphExecDestroy") == 2


def test_a_capture_that_fails_frees_too(calls: Calls) -> None:
    driver = Driver()
    pointer = driver.allocate(16)
    with pytest.raises(ValueError, match="in the block"), driver.capture():
        raise ValueError("in the block" if driver.free(pointer) is None else "")
    assert calls.called[-1] == "cuMemFree"
    with pytest.raises(SessionError, match="CAPTURE_INVALIDATED"), driver.capture():
        driver.synchronize()
