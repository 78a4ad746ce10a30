"""The memory bandwidth of a GPU, measured by its driver's own copy: through ctypes, so that nothing need be installed.

Source of the functions: cuda.h.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

LIBRARY = "libcuda.so.1"
COPIED = 1 << 28  # bytes, well past the caches
REPEATS = 10


def copy_bandwidth(gpu: int = 0) -> float | None:
    """GB/s of reading and writing while 256 MiB are copied in the GPU's memory; None where it cannot be measured."""
    try:
        cuda = ctypes.CDLL(LIBRARY)
        with _context(cuda, gpu), _blocks(cuda) as (source, target):
            return max(_timed(cuda, source, target) for _ in range(3))
    except OSError:
        return None


class _CudaError(OSError):
    """A call of the driver failed."""


def _call(cuda: Any, name: str, *arguments: Any) -> None:
    code = getattr(cuda, name)(*arguments)
    if code:
        raise _CudaError(f"{name} returned {code}")


@contextlib.contextmanager
def _context(cuda: Any, gpu: int) -> Iterator[None]:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _call(cuda, "cuInit", ctypes.c_uint(0))
    _call(cuda, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(gpu))
    _call(cuda, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        _call(cuda, "cuCtxSetCurrent", context)
        yield
    finally:
        cuda.cuDevicePrimaryCtxRelease_v2(device)


@contextlib.contextmanager
def _blocks(cuda: Any) -> Iterator[tuple[ctypes.c_ulonglong, ctypes.c_ulonglong]]:
    blocks = (ctypes.c_ulonglong(), ctypes.c_ulonglong())
    try:
        for block in blocks:
            _call(cuda, "cuMemAlloc_v2", ctypes.byref(block), ctypes.c_size_t(COPIED))
        yield blocks
    finally:
        for block in blocks:
            if block.value:
                cuda.cuMemFree_v2(block)


def _timed(cuda: Any, source: ctypes.c_ulonglong, target: ctypes.c_ulonglong) -> float:
    """GB/s of some copies in a row."""
    begun, ended, milliseconds = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float()
    for event in (begun, ended):
        _call(cuda, "cuEventCreate", ctypes.byref(event), ctypes.c_uint(0))
    try:
        _call(cuda, "cuEventRecord", begun, None)
        for _ in range(REPEATS):
            _call(cuda, "cuMemcpyDtoDAsync_v2", target, source, ctypes.c_size_t(COPIED), None)
        _call(cuda, "cuEventRecord", ended, None)
        _call(cuda, "cuEventSynchronize", ended)
        _call(cuda, "cuEventElapsedTime", ctypes.byref(milliseconds), begun, ended)
    finally:
        for event in (begun, ended):
            cuda.cuEventDestroy_v2(event)
    return 2 * COPIED * REPEATS / milliseconds.value / 1e6
