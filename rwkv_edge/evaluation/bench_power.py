"""Energy of a piece of work, where the board tells it: NVML's counter, or the power that tegrastats prints.

jtop's is in `rwkv_edge.evaluation.bench_jtop`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, Protocol

from rwkv_edge.evaluation.bench_nvml import Nvml

INTERVAL = 0.1  # seconds between tegrastats' lines
TOTAL_RAILS = ("VIN", "VDD_IN", "POM_5V_IN")
"""Rails that are the whole board's or module's input: Thor; Orin Nano, Orin NX, Xavier NX; Nano, TX2."""

AGX_ORIN_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
"""Inputs of an AGX Orin that add up to the module; VDDQ_VDD2_1V8AO is behind the last one."""

_RAIL = re.compile(r"\b([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/(\d+)(?:mW)?(?= |$)")
_NO_RAILS = ("RAM", "SWAP", "IRAM", "NC")


class EnergyMeter(Protocol):
    """Measures the energy between `start` and `stop`.

    Attributes:
        least: seconds that the work must take, so that what the board tells in steps is within some percent.
    """

    least: float

    @property
    def source(self) -> str:
        """What is measured, in words."""
        ...

    def start(self) -> None:
        """Begin."""
        ...

    def stop(self) -> float | None:
        """Joules since `start`; None where it was too short to tell."""
        ...


class NvmlMeter:
    """The counter of an NVIDIA GPU."""

    least = 2.0  # the driver renews it some ten times a second

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml
        self._before: float | None = None
        self.source = "NVML, the GPU alone"

    def start(self) -> None:
        """Read the counter."""
        self._before = self._nvml.energy_joules()

    def stop(self) -> float | None:
        """Read it again."""
        after = self._nvml.energy_joules()
        if self._before is None or after is None or after <= self._before:
            return None
        return after - self._before


@dataclass(frozen=True)
class TegraLine:
    """What one line of tegrastats tells.

    Attributes:
        milliwatts: of every rail, at this moment.
        mhz: clocks of GPU (GR3D_FREQ) and memory (EMC_FREQ), and the CPU's fastest core; those that are printed.
    """

    milliwatts: Mapping[str, int]
    mhz: Mapping[str, int] = field(default_factory=dict)

    @property
    def rails(self) -> tuple[str, ...]:
        """Those that add up to all that is measured, each once."""
        for name in TOTAL_RAILS:
            if name in self.milliwatts:
                return (name,)
        if all(name in self.milliwatts for name in AGX_ORIN_RAILS):
            return AGX_ORIN_RAILS
        return tuple(self.milliwatts)

    @property
    def watts(self) -> float:
        """All of them."""
        return sum(self.milliwatts[name] for name in self.rails) / 1e3


def tegra_line(line: str) -> TegraLine | None:
    """A line of tegrastats; None where it tells no power."""
    rails = {name: int(now) for name, now, _ in _RAIL.findall(line) if name not in _NO_RAILS}
    if not rails:
        return None
    mhz = {}
    for label, pattern in (("gpu", r"\bGR3D_FREQ \d+%@\[?(\d+)"), ("memory", r"\bEMC_FREQ \d+%@(\d+)")):
        if found := re.search(pattern, line):
            mhz[label] = int(found[1])
    cores = re.search(r"\bCPU \[([^\]]*)\]", line)
    speeds = [int(speed) for speed in re.findall(r"%@(\d+)", cores[1])] if cores else []
    if speeds:
        mhz["cpu"] = max(speeds)
    return TegraLine(rails, mhz)


def joules_between(
    samples: Iterable[tuple[float, float]], start: float, stop: float, slack: float = INTERVAL
) -> float | None:
    """Energy of samples of (time, watts), each of which stands for the time up to it; None without a sample inside.

    A sample counts up to ``slack`` seconds after ``stop``.
    """
    inside = [watts for at, watts in samples if start <= at <= stop + slack]
    return sum(inside) / len(inside) * (stop - start) if inside else None


class TegrastatsMeter:
    """The mean power of a Jetson times the time."""

    least = 2.0  # twenty of its lines

    def __init__(self, command: str = "tegrastats") -> None:
        """Start it; it runs until `close`.

        Raises:
            OSError: it cannot be started.
        """
        self._process = subprocess.Popen(
            [command, "--interval", str(round(INTERVAL * 1000))],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace",
        )  # fmt: skip
        self._samples: list[tuple[float, float]] = []
        self.latest: TegraLine | None = None
        self._begun = 0.0
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    @property
    def source(self) -> str:
        """The rails."""
        return "tegrastats" + (f", {' + '.join(self.latest.rails)}" if self.latest else "")

    def start(self) -> None:
        """Remember when."""
        self._samples.clear()
        self._begun = time.perf_counter()

    def stop(self) -> float | None:
        """Mean power times the time."""
        now = time.perf_counter()
        return joules_between(list(self._samples), self._begun, now)

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()
        self._reader.join()
        if self._process.stdout:
            self._process.stdout.close()

    def _read(self, lines: IO[str] | None) -> None:
        for line in lines or ():
            found = tegra_line(line)
            if found:
                self.latest = found
                self._samples.append((time.perf_counter(), found.watts))


def tegrastats_meter() -> TegrastatsMeter | None:
    """On a Jetson; None elsewhere."""
    command = shutil.which("tegrastats")
    if command is None:
        return None
    try:
        return TegrastatsMeter(command)
    except OSError:
        return None
