"""A double of the module `jtop` of jetson-stats: what its service tells on three boards, by the threads it has."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any


class JtopException(Exception):
    """As theirs."""


def rail(milliwatts: int, online: bool = True) -> dict[str, Any]:
    return {"online": online, "type": "INA3221", "volt": 5000, "curr": 100, "power": milliwatts, "avg": milliwatts}


ORIN_NX = {
    "rail": {"VDD_CPU_GPU_CV": rail(1228), "VDD_SOC": rail(2380)},
    "tot": rail(6626) | {"name": "VDD_IN"},
}
AGX_ORIN = {
    "rail": {
        "VDD_GPU_SOC": rail(2399), "VDD_CPU_CV": rail(400), "VIN_SYS_5V0": rail(4032), "VDDQ_VDD2_1V8AO": rail(301),
    },
    "tot": {"power": 7132, "avg": 7132},
}  # fmt: skip
XAVIER = {"rail": {"GPU": rail(0), "CPU": rail(311), "SOC": rail(1244), "CV": rail(9, online=False)}, "tot": {}}


class Jetson(threading.Thread):
    """`jtop.jtop`: after `start`, every observer is called at the interval."""

    power: dict[str, Any] = ORIN_NX
    failure: Exception | None = None

    def __init__(self, interval: float = 1.0) -> None:
        super().__init__(daemon=True)
        self._interval, self._ended = interval, threading.Event()
        self._observers: list[Callable[[Jetson], None]] = []
        self.cpu = {
            "total": {},
            "cpu": [
                {"online": True, "governor": "schedutil", "freq": {"min": 115200, "max": 1728000, "cur": 729600}},
                {"online": True, "governor": "schedutil", "freq": {"min": 115200, "max": 1728000, "cur": 1344000}},
                {"online": False},
            ],
        }
        self.gpu = {"gpu": {"type": "integrated", "freq": {"min": 306000, "max": 1020000, "cur": 918000}}}
        self.memory = {"RAM": {"tot": 1}, "EMC": {"cur": 2133000, "max": 3199000}}
        self.nvpmodel: Any = SimpleNamespace(name="15W", id=2)
        self.jetson_clocks: Any = True  # theirs is an object that is true or not

    def attach(self, observer: Callable[[Jetson], None]) -> None:
        self._observers.append(observer)

    def start(self) -> None:
        if self.failure is not None:
            raise self.failure
        super().start()

    def run(self) -> None:
        while not self._ended.wait(self._interval):
            for observer in self._observers:
                observer(self)

    def close(self) -> None:
        self._ended.set()
        self.join()


def module(power: dict[str, Any] = ORIN_NX, failure: Exception | None = None) -> ModuleType:
    """The module, of a board or of a service that fails."""
    made = ModuleType("jtop")
    made.jtop = type("jtop", (Jetson,), {"power": power, "failure": failure})  # type: ignore[attr-defined]
    made.JtopException = JtopException  # type: ignore[attr-defined]
    return made
