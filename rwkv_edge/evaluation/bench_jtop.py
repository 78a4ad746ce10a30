"""Energy, clocks and power mode of a Jetson by the service of jetson-stats, which needs no tegrastats of its own.

Source of the interface: `jtop` of jetson-stats 4 to 7. Power is in milliwatts there, clocks are in kHz.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from rwkv_edge.evaluation.bench_power import TegraLine, joules_between

INTERVAL = 0.2  # seconds between samples that the service is asked for; whoever asked first decides


class JtopMeter:
    """The mean power that the service tells, times the time."""

    least = 3.0  # seconds: the service may run at one sample a second

    def __init__(self, module: Any) -> None:
        """Connect; samples come until `close`.

        Args:
            module: `jtop`.

        Raises:
            Exception: the service does not answer, or is of another version. Its exceptions have no common base.
        """
        self._samples: list[tuple[float, float]] = []
        self.latest: TegraLine | None = None
        self._begun = 0.0
        self._jtop = module.jtop(interval=INTERVAL)
        self._jtop.attach(self._read)
        self._jtop.start()

    @property
    def source(self) -> str:
        """The rails."""
        return "jtop" + (f", {' + '.join(self.latest.rails)}" if self.latest else "")

    @property
    def power_mode(self) -> str | None:
        """As 'MAXN' or '15W'."""
        return None if self._jtop.nvpmodel is None else str(self._jtop.nvpmodel.name)

    @property
    def clocks_fixed(self) -> bool | None:
        """Whether jetson_clocks holds the clocks at their maximum; None where the service does not know it."""
        return None if self._jtop.jetson_clocks is None else bool(self._jtop.jetson_clocks)

    def start(self) -> None:
        """Remember when."""
        self._samples.clear()
        self._begun = time.perf_counter()

    def stop(self) -> float | None:
        """Mean power times the time; None where no sample came in it."""
        now = time.perf_counter()
        return joules_between(list(self._samples), self._begun, now, slack=0)

    def close(self) -> None:
        """Disconnect."""
        self._jtop.close()

    def _read(self, jetson: Any) -> None:
        """Called by the service's thread with every sample."""
        found = line_from_jtop(jetson)
        if found is not None:
            self.latest = found
            self._samples.append((time.perf_counter(), found.watts))


def line_from_jtop(jetson: Any) -> TegraLine | None:
    """A sample in the form of tegrastats; None where it tells no power.

    The rail that is the whole board's is not among ``rail``: it is ``tot``, and named there.
    """
    power: Mapping[str, Any] = jetson.power
    rails = {str(name): int(rail["power"]) for name, rail in power.get("rail", {}).items() if rail.get("online", True)}
    total = power.get("tot", {})
    if "name" in total:
        rails[str(total["name"])] = int(total["power"])
    if not rails:
        return None
    khz = {
        "gpu": [gpu.get("freq", {}).get("cur") for gpu in jetson.gpu.values()],
        "memory": [jetson.memory.get("EMC", {}).get("cur")],
        "cpu": [core.get("freq", {}).get("cur") for core in jetson.cpu["cpu"] if core.get("online")],
    }
    mhz = {name: round(max(known) / 1000) for name, values in khz.items() if (known := [v for v in values if v])}
    return TegraLine(rails, mhz)


def jtop_meter(name: str = "jtop") -> JtopMeter | None:
    """On a Jetson whose service of jetson-stats runs; None elsewhere."""
    try:
        return JtopMeter(import_module(name))
    except ImportError:
        return None
    except Exception:  # no service, no permission, another version: tegrastats needs none of it
        return None
