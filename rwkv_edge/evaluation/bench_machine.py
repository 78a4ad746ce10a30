"""The machine a benchmark ran on: its processors, power mode and clocks; and what watches it while it runs."""

from __future__ import annotations

import contextlib
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_edge.evaluation.bench_jtop import JtopMeter, jtop_meter
from rwkv_edge.evaluation.bench_nvml import Nvml, open_nvml
from rwkv_edge.evaluation.bench_power import EnergyMeter, NvmlMeter, TegrastatsMeter, tegrastats_meter
from rwkv_edge.evaluation.roofline import usable_cores

ROOT = Path("/")
POLL = 0.02  # seconds between looks at the memory of a device
_CPUFREQ = "sys/devices/system/cpu/cpu0/cpufreq"


def machine_facts(root: Path = ROOT) -> dict[str, Any]:
    """What does not change during a run; None where the machine does not tell."""
    return {
        "board": _text(root / "proc/device-tree/model"),
        "cpu": cpu_name(root),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "governor": _text(root / _CPUFREQ / "scaling_governor"),
        "power_mode": power_mode(),
    }


def cpu_name(root: Path = ROOT) -> str | None:
    """The processor's name."""
    text = _text(root / "proc/cpuinfo") or ""
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine() or None


def cpu_mhz(root: Path = ROOT) -> int | None:
    """The clock of the first core, now."""
    khz = _text(root / _CPUFREQ / "scaling_cur_freq")
    if khz and khz.isdigit():
        return int(khz) // 1000
    found = re.search(r"^cpu MHz\s*:\s*([\d.]+)$", _text(root / "proc/cpuinfo") or "", re.MULTILINE)
    return round(float(found[1])) if found else None


def power_mode(command: str = "nvpmodel") -> str | None:
    """A Jetson's, as 'MAXN' or '15W'; None elsewhere."""
    path = shutil.which(command)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "-q"], capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return power_mode_from(done.stdout)


def power_mode_from(text: str) -> str | None:
    """From what nvpmodel -q prints: 'NV Power Mode: 15W'."""
    found = re.search(r"Power Mode:\s*(\S+)", text)
    return found[1] if found else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


class Machine:
    """The board while it is measured: its energy, its clocks, the memory of its GPU."""

    def __init__(self, gpu: int | None = None) -> None:
        """Find what the board tells.

        Args:
            gpu: the number of the GPU that computes, None for none.
        """
        self.nvml: Nvml | None = None if gpu is None else open_nvml(gpu)
        self._board: JtopMeter | TegrastatsMeter | None = jtop_meter() or tegrastats_meter()
        self.meter: EnergyMeter | None = self._board or (NvmlMeter(self.nvml) if self.nvml else None)

    def facts(self) -> dict[str, Any]:
        """What does not change."""
        facts = machine_facts()
        facts["clocks_fixed"] = None
        if isinstance(self._board, JtopMeter):
            facts["power_mode"] = self._board.power_mode or facts["power_mode"]
            facts["clocks_fixed"] = self._board.clocks_fixed
        facts["gpu"] = self.nvml.name() if self.nvml else None
        facts["gpu_power_limit_watts"] = self.nvml.power_limit_watts() if self.nvml else None
        return facts

    def clocks(self) -> dict[str, int]:
        """MHz now, of what tells it."""
        clocks: dict[str, int] = {}
        if (cpu := cpu_mhz()) is not None:
            clocks["cpu"] = cpu
        if self._board and self._board.latest:
            clocks |= self._board.latest.mhz
        if self.nvml:
            clocks |= {f"gpu_{name}": value for name, value in self.nvml.clocks_mhz().items()}
        return clocks

    @contextlib.contextmanager
    def device_memory(self) -> Iterator[list[int]]:
        """Around work on a GPU: the list's only entry becomes the most bytes that were in use."""
        peak: list[int] = []
        stop = threading.Event()

        def watch() -> None:
            while True:
                used = self.nvml.used_bytes() if self.nvml else None
                if used is not None:
                    peak[:] = [max([used, *peak])]
                if stop.wait(POLL):
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        if self.nvml:
            watcher.start()
        try:
            yield peak
        finally:
            stop.set()
            if self.nvml:
                watcher.join()

    def close(self) -> None:
        """End what was started."""
        if self._board:
            self._board.close()
