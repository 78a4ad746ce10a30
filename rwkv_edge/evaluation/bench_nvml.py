"""What NVIDIA's management library tells of a GPU: energy, memory, clocks; through ctypes, since drivers bring it.

Source of the functions, constants and structures: nvml.h.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
_SM, _MEMORY = 1, 2  # nvmlClockType_t


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Nvml:
    """One GPU. A value that the board does not tell is None."""

    def __init__(self, library: Any, gpu: int = 0, visible: str | None = None) -> None:
        """Find the GPU.

        Args:
            library: libnvidia-ml, loaded.
            gpu: its number as CUDA counts.
            visible: CUDA_VISIBLE_DEVICES, by which CUDA's numbers differ from the driver's; None for all.

        Raises:
            OSError: the library does not start, or knows no such GPU.
        """
        self._library = library
        self._handle = ctypes.c_void_p()
        if library.nvmlInit_v2():
            raise OSError("NVML does not start")
        names = [name.strip() for name in (visible or "").split(",") if name.strip()]
        name = names[gpu] if gpu < len(names) else str(gpu)
        if name.isdigit():
            failed = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), ctypes.byref(self._handle))
        else:
            failed = library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(self._handle))
        if failed:
            raise OSError(f"NVML knows no GPU {name}")

    def name(self) -> str | None:
        """As 'NVIDIA H100 80GB HBM3'."""
        text = ctypes.create_string_buffer(96)
        failed = self._library.nvmlDeviceGetName(self._handle, text, ctypes.c_uint(len(text)))
        return None if failed else text.value.decode("utf-8", errors="replace")

    def energy_joules(self) -> float | None:
        """Since the driver was loaded; from Volta on."""
        value = self._number("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong())
        return None if value is None else value / 1e3

    def used_bytes(self) -> int | None:
        """Memory in use, by all processes."""
        memory = _Memory()
        failed = self._library.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory))
        return None if failed else int(memory.used)

    def power_limit_watts(self) -> float | None:
        """The limit that is set."""
        value = self._number("nvmlDeviceGetEnforcedPowerLimit", ctypes.c_uint())
        return None if value is None else value / 1e3

    def clocks_mhz(self) -> dict[str, int]:
        """Of the multiprocessors and of the memory, now."""
        clocks = {}
        for label, kind in (("sm", _SM), ("memory", _MEMORY)):
            value = ctypes.c_uint()
            if not self._library.nvmlDeviceGetClockInfo(self._handle, ctypes.c_int(kind), ctypes.byref(value)):
                clocks[label] = int(value.value)
        return clocks

    def _number(self, function: str, value: Any) -> int | None:
        failed = getattr(self._library, function)(self._handle, ctypes.byref(value))
        return None if failed else int(value.value)


def open_nvml(gpu: int = 0) -> Nvml | None:
    """The GPU's management; None where there is no driver or no such GPU."""
    try:
        return Nvml(ctypes.CDLL(LIBRARY), gpu, os.environ.get("CUDA_VISIBLE_DEVICES"))
    except (OSError, AttributeError):  # no such library, or one without such a function
        return None
