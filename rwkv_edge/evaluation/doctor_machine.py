"""What NVIDIA hardware a machine has: GPUs, the driver's CUDA, the Jetson board; absence raises nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_edge.engines import target_of
from rwkv_edge.runtime.ort_providers import first_line

ROOT = Path("/")
SMI = "nvidia-smi"
SMI_SECONDS = 10  # a hung driver must not hang the doctor
SMI_FIELDS = "name,compute_cap,memory.total"
NO_DEVICE = "CUDA_ERROR_NO_DEVICE"


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as the driver says.
        capability: compute capability, (9, 0); None where nvidia-smi does not tell.
        memory: in bytes; None where nvidia-smi does not tell, as on boards that share it.
    """

    name: str
    capability: tuple[int, int] | None
    memory: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        capability = self.capability
        return {
            "name": self.name,
            "compute_capability": f"{capability[0]}.{capability[1]}" if capability else None,
            "target": target_of(capability) if capability else None,
            "memory_bytes": self.memory,
        }


@dataclass(frozen=True)
class Gpus:
    """What could be found out.

    Attributes:
        found: in the driver's order.
        source: 'cuda-bindings' or 'nvidia-smi', whichever answered; None where neither did.
        cuda: the newest CUDA that the driver runs, (13, 0).
        problem: why there are none, in words.
    """

    found: tuple[Gpu, ...] = ()
    source: str | None = None
    cuda: tuple[int, int] | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Board:
    """A Jetson.

    Attributes:
        model: of the device tree.
        l4t: release of Jetson Linux: '36.4.3'.
        jetpack: version of the package nvidia-jetpack; None where that is not installed.
    """

    model: str | None
    l4t: str | None
    jetpack: str | None


def find_gpus(driver: Any | None) -> Gpus:
    """By cuda-bindings where it is given and answers, else by nvidia-smi.

    Args:
        driver: the module cuda.bindings.driver, None where it cannot be imported.
    """
    asked = Gpus(problem="cuda-bindings is not installed") if driver is None else gpus_from_driver(driver)
    if asked.found:
        return asked
    shown = gpus_from_smi()
    if shown.found:
        return shown
    return asked if driver is not None and asked.cuda else Gpus((), shown.source, shown.cuda, _none(driver, asked))


def gpus_from_driver(driver: Any) -> Gpus:
    """By the calls of CUDA's driver."""
    attributes = driver.CUdevice_attribute
    major, minor = (
        attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    )
    cuda = None
    try:
        version = int(_checked(driver.cuDriverGetVersion()))
        cuda = version // 1000, version % 1000 // 10
        _checked(driver.cuInit(0))
        found = []
        for ordinal in range(int(_checked(driver.cuDeviceGetCount()))):
            device = _checked(driver.cuDeviceGet(ordinal))
            name = _checked(driver.cuDeviceGetName(96, device)).decode("utf-8", "replace").partition("\0")[0]
            capability = tuple(int(_checked(driver.cuDeviceGetAttribute(a, device))) for a in (major, minor))
            memory = int(_checked(driver.cuDeviceTotalMem(device)))
            found.append(Gpu(name, (capability[0], capability[1]), memory))
    except RuntimeError as error:  # cuda-bindings finds no library of the driver, or it refuses
        return Gpus((), None, cuda, "no NVIDIA driver was found" if cuda is None else first_line(error))
    return Gpus(tuple(found), "cuda-bindings", cuda, None if found else "the driver sees no GPU")


def gpus_from_smi(command: str = SMI) -> Gpus:
    """By what nvidia-smi prints."""
    path = shutil.which(command)
    if path is None:
        return Gpus(problem=f"there is no {command}")
    listed = _printed(path, f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader,nounits")
    shown = re.search(r"CUDA(?: UMD)? Version:\s*(\d+)\.(\d+)", _printed(path))
    cuda = (int(shown[1]), int(shown[2])) if shown else None
    found = tuple(gpu for line in listed.splitlines() if (gpu := _gpu_from_line(line)))
    return Gpus(found, SMI, cuda, None if found else f"{command} lists no GPU")


def find_board(root: Path = ROOT) -> Board | None:
    """The Jetson that this is, or None."""
    release = _text(root / "etc/nv_tegra_release")
    model = _text(root / "proc/device-tree/model")
    if release is None and "jetson" not in (model or "").lower():
        return None
    found = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", release or "")
    status = _text(root / "var/lib/dpkg/status") or ""
    package = re.search(r"^Package: nvidia-jetpack\n(?:.+\n)*?Version: (\S+)", status, re.MULTILINE)
    return Board(model, f"{found[1]}.{found[2]}" if found else None, package[1].partition("+")[0] if package else None)


def _none(driver: Any | None, asked: Gpus) -> str:
    return "no NVIDIA driver was found" if driver is None else str(asked.problem)


def _checked(answer: tuple[Any, ...]) -> Any:
    """The value of a call of the driver that succeeded.

    Raises:
        RuntimeError: it did not; says how.
    """
    status, *values = answer
    if int(status) != 0:
        name = str(getattr(status, "name", status))
        raise RuntimeError("the driver sees no GPU" if name == NO_DEVICE else f"the driver answers {name}")
    return values[0] if values else None


def _gpu_from_line(line: str) -> Gpu | None:
    """'NVIDIA GeForce RTX 4090, 8.9, 24564' (MiB)."""
    parts = [part.strip() for part in line.rsplit(",", 2)]
    if len(parts) != 3:
        return None
    number = re.fullmatch(r"(\d+)\.(\d+)", parts[1])
    memory = int(parts[2]) << 20 if parts[2].isdecimal() else None
    return Gpu(parts[0], (int(number[1]), int(number[2])) if number else None, memory)


def _printed(*command: str) -> str:
    """Standard output of a program; empty where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SMI_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None
