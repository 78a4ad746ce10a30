"""Energy, clocks and power modes, from what real boards print and from a double of NVML."""

from __future__ import annotations

import ctypes
import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

import jtop_double
import pytest

from rwkv_edge.evaluation import bench_machine
from rwkv_edge.evaluation.bench_bandwidth import copy_bandwidth
from rwkv_edge.evaluation.bench_jtop import JtopMeter, jtop_meter, line_from_jtop
from rwkv_edge.evaluation.bench_machine import Machine, cpu_mhz, cpu_name, machine_facts, power_mode_from
from rwkv_edge.evaluation.bench_nvml import Nvml, open_nvml
from rwkv_edge.evaluation.bench_power import NvmlMeter, TegrastatsMeter, joules_between, tegra_line, tegrastats_meter

# tegrastats, as printed on the boards
ORIN_NANO = (
    "04-27-2026 15:00:54 RAM 779/7620MB (lfb 2x4MB) SWAP 0/3810MB (cached 0MB) CPU [0%@1344,0%@1344,3%@1728,0%@1344,"
    "off,off] GR3D_FREQ 0% cpu@50.125C soc2@49.125C soc0@49.25C gpu@50.562C tj@50.562C soc1@50.437C "
    "VDD_IN 6626mW/6625mW VDD_CPU_GPU_CV 1228mW/1230mW VDD_SOC 2380mW/2380mW \n"
)
AGX_ORIN = (
    "04-24-2023 00:01:24 RAM 1282/62795MB (lfb 15152x4MB) SWAP 0/31398MB (cached 0MB) CPU [0%@729,0%@729] "
    "EMC_FREQ 0%@2133 GR3D_FREQ 99%@[1300,1300] VIC_FREQ 729 APE 174 CV0@-256C CPU@42.593C Tboard@32C tj@42.593C "
    "VDD_GPU_SOC 2399mW/2399mW VDD_CPU_CV 400mW/400mW VIN_SYS_5V0 4032mW/4032mW NC 0mW/0mW "
    "VDDQ_VDD2_1V8AO 301mW/301mW NC 0mW/0mW"
)
XAVIER_NX = (
    "RAM 2673/7765MB (lfb 118x4MB) SWAP 0/3883MB (cached 0MB) CPU [12%@1190,8%@1190,4%@1190,off,off,off] EMC_FREQ 7% "
    "GR3D_FREQ 33% AO@35C GPU@33C PMIC@100C VDD_IN 3902/3611 VDD_CPU_GPU_CV 1331/1180 VDD_SOC 997/941"
)
AGX_XAVIER = (
    "RAM 9/31928MB CPU [1%@1190] GR3D_FREQ 0%@114 "
    "GPU 0/0 CPU 311/311 SOC 1244/1244 CV 0/0 VDDRQ 155/155 SYS5V 1600/1600"
)


@pytest.mark.parametrize(
    ("line", "rails", "watts", "mhz"),
    [
        (ORIN_NANO, ("VDD_IN",), 6.626, {"cpu": 1728}),
        (AGX_ORIN, ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), 6.831, {"gpu": 1300, "memory": 2133, "cpu": 729}),
        (XAVIER_NX, ("VDD_IN",), 3.902, {"cpu": 1190}),
        (AGX_XAVIER, ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"), 3.31, {"gpu": 114, "cpu": 1190}),
    ],
)
def test_tegrastats(line: str, rails: tuple[str, ...], watts: float, mhz: dict[str, int]) -> None:
    found = tegra_line(line)
    assert found is not None
    assert found.rails == rails
    assert found.watts == pytest.approx(watts)
    assert found.mhz == mhz


def test_tegrastats_without_power() -> None:
    assert tegra_line("RAM 779/7620MB (lfb 2x4MB) SWAP 0/3810MB CPU [0%@1344] GR3D_FREQ 0% cpu@50.125C") is None
    assert tegra_line("") is None


def test_energy_of_samples() -> None:
    samples = [(0.5, 100.0), (1.1, 4.0), (1.6, 6.0), (2.05, 8.0), (3.0, 100.0)]
    assert joules_between(samples, 1, 2) == pytest.approx(6.0)
    assert joules_between(samples, 5, 6) is None


def test_a_running_tegrastats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "tegrastats"
    script.write_text(f"#!/bin/sh\nwhile :; do echo '{ORIN_NANO.strip()}'; sleep 0.02; done\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    meter = tegrastats_meter()
    assert isinstance(meter, TegrastatsMeter)
    meter.start()
    start = time.perf_counter()
    time.sleep(0.3)
    joules = meter.stop()
    seconds = time.perf_counter() - start
    meter.close()
    assert joules is not None
    assert joules == pytest.approx(6.626 * seconds, rel=0.05)
    assert meter.source == "tegrastats, VDD_IN"
    machine = Machine()
    until = time.monotonic() + 5
    while "cpu" not in machine.clocks() or machine.clocks()["cpu"] != 1728:
        assert time.monotonic() < until
        time.sleep(0.01)
    machine.close()


@pytest.mark.parametrize(
    ("power", "rails", "watts"),
    [
        (jtop_double.ORIN_NX, ("VDD_IN",), 6.626),
        (jtop_double.AGX_ORIN, ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), 6.831),  # not VDDQ, which is behind VIN
        (jtop_double.XAVIER, ("GPU", "CPU", "SOC"), 1.555),
    ],
)
def test_jtop_of_boards(power: dict[str, Any], rails: tuple[str, ...], watts: float) -> None:
    found = line_from_jtop(jtop_double.module(power).jtop())
    assert found is not None
    assert found.rails == rails
    assert found.watts == pytest.approx(watts)
    assert found.mhz == {"gpu": 918, "memory": 2133, "cpu": 1344}


def test_jtop_that_tells_little() -> None:
    jetson = jtop_double.module({}).jtop()
    assert line_from_jtop(jetson) is None
    jetson = jtop_double.module().jtop()
    jetson.gpu, jetson.memory, jetson.cpu = {}, {}, {"cpu": [{"online": True}]}
    found = line_from_jtop(jetson)
    assert found is not None
    assert found.mhz == {}


def test_jtop_comes_before_tegrastats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jtop", jtop_double.module())
    monkeypatch.setattr(bench_machine, "tegrastats_meter", lambda: pytest.fail("jtop is there"))
    machine = Machine()
    meter = machine.meter
    assert isinstance(meter, JtopMeter)
    meter.start()
    start = time.perf_counter()
    time.sleep(0.7)
    joules = meter.stop()
    seconds = time.perf_counter() - start
    assert joules == pytest.approx(6.626 * seconds, rel=0.05)
    assert meter.source == "jtop, VDD_IN"
    facts = machine.facts()
    assert (facts["power_mode"], facts["clocks_fixed"]) == ("15W", True)
    clocks = machine.clocks()
    assert (clocks["cpu"], clocks["gpu"], clocks["memory"]) == (1344, 918, 2133)
    meter.start()
    assert meter.stop() is None  # no sample came
    machine.close()
    assert not meter._jtop.is_alive()


def test_a_service_of_jtop_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jtop_meter("no_such_module") is None
    broken = jtop_double.module(failure=jtop_double.JtopException("The jtop.service is not active."))
    monkeypatch.setitem(sys.modules, "jtop", broken)
    assert jtop_meter() is None


class Library:
    """libnvidia-ml that answers like an H100; functions it has not return 'not supported' (3)."""

    def __init__(self, **missing: bool) -> None:
        self.missing = missing
        self.millijoules = 1_234_567
        self.used = 2 << 30
        self.asked: Any = None

    def nvmlInit_v2(self) -> int:
        return 9 if self.missing.get("driver") else 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: Any) -> int:
        self.asked = index.value
        handle._obj.value = 0xABC
        return 2 if index.value > 1 else 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        self.asked = name
        handle._obj.value = 0xABC
        return 0

    def nvmlDeviceGetName(self, handle: Any, text: Any, length: Any) -> int:
        assert handle.value == 0xABC
        text.value = b"NVIDIA H100 80GB HBM3"
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, value: Any) -> int:
        value._obj.value = self.millijoules
        return 3 if self.missing.get("energy") else 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.used = 80 << 30, self.used
        return 0

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any, value: Any) -> int:
        value._obj.value = 700_000
        return 0

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: ctypes.c_int, value: Any) -> int:
        value._obj.value = {1: 1980, 2: 2619}[kind.value]
        return 0


def test_nvml() -> None:
    library = Library()
    nvml = Nvml(library, 1)
    assert library.asked == 1
    assert nvml.name() == "NVIDIA H100 80GB HBM3"
    assert nvml.used_bytes() == 2 << 30
    assert nvml.power_limit_watts() == 700
    assert nvml.clocks_mhz() == {"sm": 1980, "memory": 2619}
    meter = NvmlMeter(nvml)
    meter.start()
    library.millijoules += 2500
    assert meter.stop() == pytest.approx(2.5)
    meter.start()
    assert meter.stop() is None  # too short for the counter


def test_nvml_where_something_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="does not start"):
        Nvml(Library(driver=True))
    with pytest.raises(OSError, match="no GPU 2"):
        Nvml(Library(), 2)
    meter = NvmlMeter(Nvml(Library(energy=True)))
    meter.start()
    assert meter.stop() is None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    assert open_nvml() is not None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # too old a library
    assert open_nvml() is None


def test_numbers_of_gpus_are_those_of_cuda() -> None:
    library = Library()
    Nvml(library, 0, "1,0")
    assert library.asked == 1
    Nvml(library, 1, "GPU-11, GPU-22")
    assert library.asked == b"GPU-22"
    Nvml(library, 0, "")
    assert library.asked == 0


def test_memory_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(bench_machine, "open_nvml", lambda gpu: Nvml(library, gpu))
    machine = Machine(0)
    with machine.device_memory() as peak:
        library.used = 9 << 30
        time.sleep(0.1)
        library.used = 3 << 30
        time.sleep(0.1)
    assert peak == [9 << 30]
    assert machine.facts()["gpu"] == "NVIDIA H100 80GB HBM3"
    assert machine.clocks()["gpu_sm"] == 1980
    machine.close()
    with Machine().device_memory() as peak:
        pass
    assert peak == []


def test_facts_of_a_board(tmp_path: Path) -> None:
    for name, text in {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
        "proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 62.50\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1344000\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    facts = machine_facts(tmp_path)
    assert facts["board"] == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert facts["governor"] == "schedutil"
    assert cpu_mhz(tmp_path) == 1344
    (tmp_path / "proc/cpuinfo").write_text("model name\t: AMD EPYC\ncpu MHz\t\t: 2595.124\n")
    assert cpu_name(tmp_path) == "AMD EPYC"
    (tmp_path / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq").unlink()
    assert cpu_mhz(tmp_path) == 2595
    assert cpu_mhz(tmp_path / "nowhere") is None


def test_power_modes() -> None:
    assert power_mode_from("NV Power Mode: MAXN\n0\n") == "MAXN"
    assert power_mode_from("NVPM WARN: fan mode is not set!\nNV Power Mode: 15W\n2\n") == "15W"
    assert power_mode_from("") is None


@pytest.mark.gpu
def test_a_gpu_tells() -> None:
    nvml = open_nvml()
    if nvml is None:
        pytest.skip("no NVIDIA driver here")
    assert (nvml.used_bytes() or 0) > 0
    assert nvml.clocks_mhz()["sm"] > 0
    assert nvml.energy_joules() is not None
    bandwidth = copy_bandwidth()
    assert bandwidth is not None
    assert 20 < bandwidth < 20_000


def test_no_gpu_no_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert copy_bandwidth() is None
    assert open_nvml() is None
