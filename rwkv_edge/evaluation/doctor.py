"""What this machine can build and run, what it lacks, and the line that installs it.

Nothing fails because something is absent or broken: that is what is reported.
"""

from __future__ import annotations

import contextlib
import io
import platform
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rwkv_edge.engines import ENGINE_BACKENDS, Backend, target_of, version_numbers
from rwkv_edge.errors import RwkvEdgeError
from rwkv_edge.evaluation.doctor_machine import Board, Gpus, find_board, find_gpus
from rwkv_edge.evaluation.doctor_packages import EXTRAS, Package, missing_of, packages, version_of
from rwkv_edge.evaluation.roofline import usable_cores
from rwkv_edge.exporters.trt_adapter import OLDEST, LoadedBackend
from rwkv_edge.plugins.nvrtc import nearest_capability
from rwkv_edge.runtime.ort_providers import CPU, CUDA, first_line, preload_libraries
from rwkv_edge.runtime.session import BACKENDS

PROBE = bytes.fromhex(
    "08083a320a0b0a017812017922034e65671201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a0808"
    "0112040a02080142040a00100d"
)
"""An ONNX model (IR 8, opset 13) of one node, y = Neg(x), of one float32: what a provider must be able to open."""

LINUX_FOR_TEGRA = "sudo apt install python3-libnvinfer"  # JetPack's TensorRT for the system's Python
SILENT, WARNING = 4, 2  # severities of ONNX Runtime's log: fatal alone, and its default


@dataclass(frozen=True)
class Ability:
    """Whether something works here.

    Attributes:
        name: of what builds or runs.
        works: whether it does.
        detail: what it builds or runs for, or why it does not.
        targets: of a builder, the GPUs that it can build for: 'sm86'.
    """

    name: str
    works: bool
    detail: str
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """All that `diagnose` found.

    Attributes:
        system: Python, rwkv-edge, operating system, cores, by name.
        board: a Jetson, or None.
        gpus: and the driver.
        packages: by name.
        providers: of ONNX Runtime.
        runs: what runs a model here.
        builds: what builds engines here, and for which GPUs.
        lacking: extras that lack something: name, purpose, missing packages, the line that installs them.
        warnings: traps, a sentence each.
    """

    system: Mapping[str, str | int]
    board: Board | None
    gpus: Gpus
    packages: Mapping[str, Package]
    providers: tuple[str, ...]
    runs: tuple[Ability, ...]
    builds: tuple[Ability, ...]
    lacking: tuple[Mapping[str, Any], ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        cuda = self.gpus.cuda
        return {
            **self.system,
            "board": None if self.board is None else asdict(self.board),
            "driver_cuda": dotted(cuda) if cuda else None,
            "gpus": [gpu.to_json() for gpu in self.gpus.found],
            "gpus_by": self.gpus.source,
            "gpu_problem": self.gpus.problem,
            "packages": {name: package.to_json() for name, package in self.packages.items()},
            "onnxruntime_providers": list(self.providers),
            "runs": [asdict(ability) for ability in self.runs],
            "builds": [asdict(ability) for ability in self.builds],
            "missing": [dict(entry) for entry in self.lacking],
            "warnings": list(self.warnings),
        }


def diagnose() -> Diagnosis:
    """Look at everything once; without a GPU it takes about as long as importing the backends."""
    found = packages()
    gpus = find_gpus(found["cuda-bindings"].module)
    board = find_board()
    ort = found["onnxruntime"].module
    providers = tuple(ort.get_available_providers()) if ort is not None else ()
    system: dict[str, str | int] = {
        "rwkv_edge": version_of("rwkv-edge") or "unknown",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": usable_cores(),
    }
    return Diagnosis(
        system=system,
        board=board,
        gpus=gpus,
        packages=found,
        providers=providers,
        runs=(
            onnxruntime_ability(found["onnxruntime"], CPU, providers, gpus),
            onnxruntime_ability(found["onnxruntime"], CUDA, providers, gpus),
            *(engine_ability(backend, found, gpus) for backend in ENGINE_BACKENDS.values()),
            cuda_ability(found, gpus),
        ),
        builds=tuple(build_ability(backend, found[backend.name], gpus) for backend in ENGINE_BACKENDS.values()),
        lacking=lacking(found, providers, gpus, board),
        warnings=warnings_of(found, gpus),
    )


def onnxruntime_ability(package: Package, provider: str, providers: tuple[str, ...], gpus: Gpus) -> Ability:
    """Whether a provider opens a model of one node."""
    name = f"onnxruntime, {provider.removesuffix('ExecutionProvider')}"
    if package.module is None:
        return Ability(name, False, unusable(package))
    if provider not in providers:
        return Ability(name, False, f"this onnxruntime has no {provider}")
    if provider != CPU and not gpus.found:
        return Ability(name, False, str(gpus.problem))
    problem = provider_problem(package.module, provider)
    return Ability(name, problem is None, problem or "all models and precisions")


def provider_problem(ort: Any, provider: str) -> str | None:
    """Why a session on a provider does not open, or None.

    Where a provider cannot be loaded, ONNX Runtime prints and warns, and takes the CPU instead.
    """
    try:
        ort.set_default_logger_severity(SILENT)
        if provider != CPU:
            preload_libraries()
        options = ort.SessionOptions()
        options.log_severity_level = SILENT
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session = ort.InferenceSession(PROBE, options, providers=[provider])
        if provider in session.get_providers():
            return None
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        return first_line(error)
    finally:
        ort.set_default_logger_severity(WARNING)
    return f"{provider} does not load: its CUDA or cuDNN libraries are missing or of another version"


def engine_ability(backend: Backend, found: Mapping[str, Package], gpus: Gpus) -> Ability:
    """Whether engines run: with the GPU's driver by cuda-bindings, on a GPU that the backend knows."""
    for package in (found[backend.name], found["cuda-bindings"]):
        if package.module is None:
            return Ability(backend.name, False, unusable(package))
    if not gpus.found:
        return Ability(backend.name, False, str(gpus.problem))
    if backend.name not in BACKENDS:
        return Ability(backend.name, False, "this release of rwkv-edge builds engines, but has no session over them")
    loaded, here = LoadedBackend(backend, found[backend.name].module), targets_here(gpus)
    old = too_old(loaded)
    if old:
        return Ability(backend.name, False, old)
    if here and loaded.targets is not None and not set(here) & set(loaded.targets):
        words = f"{backend.words} is for {', '.join(loaded.targets)}, but this GPU is {', '.join(here)}"
        return Ability(backend.name, False, words)
    return Ability(backend.name, True, f"engines built for {', '.join(here) or 'this GPU'}")


def cuda_ability(found: Mapping[str, Package], gpus: Gpus) -> Ability:
    """Whether our own kernels run."""
    name = "cuda"
    for package in ("cuda-bindings", "nvidia-cuda-nvrtc"):
        if found[package].state != "ok":
            return Ability(name, False, unusable(found[package]))
    if not gpus.found:
        return Ability(name, False, str(gpus.problem))
    newer = newer_nvrtc(found, gpus)
    if newer:
        return Ability(name, False, newer)
    capability = gpus.found[0].capability
    try:
        if capability:
            nearest_capability(capability[0] * 10 + capability[1])
    except RwkvEdgeError as error:
        return Ability(name, False, str(error))
    return Ability(name, True, "models by our own kernels")


def build_ability(backend: Backend, package: Package, gpus: Gpus) -> Ability:
    """For which GPUs engines can be built."""
    if package.module is None:
        return Ability(backend.name, False, unusable(package))
    loaded = LoadedBackend(backend, package.module)
    if loaded.targets is not None:
        return Ability(backend.name, True, ", ".join(loaded.targets), loaded.targets)
    old = too_old(loaded)
    if old:
        return Ability(backend.name, False, old)
    if not gpus.found:
        return Ability(backend.name, False, f"it builds for the GPU of its machine, but {gpus.problem}")
    first = tuple(targets_here(gpus)[:1])
    return Ability(backend.name, True, ", ".join(first) or "the GPU of this machine", first)


def lacking(
    found: Mapping[str, Package], providers: tuple[str, ...], gpus: Gpus, board: Board | None
) -> tuple[Mapping[str, Any], ...]:
    """Extras that could do something here and lack a package."""
    entries = []
    for extra in EXTRAS:
        missing = missing_of(extra, found)
        if extra.name == "ort-gpu":
            missing = ["onnxruntime-gpu"] if gpus.found and CUDA not in providers else []
        install = extra.install
        if extra.name in ("tensorrt", "cuda", "ort-gpu") and not gpus.found and board is None:
            continue  # of no use without a GPU
        if extra.name == "tensorrt-rtx" and board is not None:
            continue  # TensorRT for RTX is for desktops
        if extra.name == "tensorrt" and board is not None:
            install = LINUX_FOR_TEGRA
        if extra.name == "ort-gpu":
            install = f"pip uninstall -y onnxruntime && {install}"
        if missing:
            entries.append({"extra": extra.name, "purpose": extra.purpose, "missing": missing, "install": install})
    return tuple(entries)


def warnings_of(found: Mapping[str, Package], gpus: Gpus) -> tuple[str, ...]:
    """Traps that show only later, and packages that are broken."""
    broken = [f"{p.name} cannot be used: {p.problem}" for p in found.values() if p.state == "broken"]
    newer = newer_nvrtc(found, gpus)
    return (*broken, *([newer] if newer else []))


def newer_nvrtc(found: Mapping[str, Package], gpus: Gpus) -> str | None:
    """The sentence for an NVRTC whose code the driver refuses, with what to do; None where it fits."""
    nvrtc = found["nvidia-cuda-nvrtc"]
    if nvrtc.state != "ok" or nvrtc.version is None or gpus.cuda is None or version_numbers(nvrtc.version) <= gpus.cuda:
        return None
    here = dotted(gpus.cuda)
    same = gpus.cuda[0] == version_numbers(nvrtc.version)[0]
    advice = f"pip install 'nvidia-cuda-nvrtc=={here}.*'" if same else f"update the driver to CUDA {nvrtc.version}"
    return f"NVRTC {nvrtc.version} is newer than the driver's CUDA {here}, which refuses its code: {advice}"


def too_old(loaded: LoadedBackend) -> str | None:
    """The sentence for a TensorRT that knows too little, None where it will do."""
    if loaded.backend.name != "tensorrt" or version_numbers(loaded.version) >= OLDEST:
        return None
    return f"{loaded.version} is too old, engines need {dotted(OLDEST)} or later"


def unusable(package: Package) -> str:
    """Why a package cannot be used, in words."""
    return str(package.problem) if package.problem else f"{package.name} is not installed"


def targets_here(gpus: Gpus) -> list[str]:
    """'sm86' of every GPU, each once."""
    return list(dict.fromkeys(target_of(gpu.capability) for gpu in gpus.found if gpu.capability))


def dotted(numbers: tuple[int, ...]) -> str:
    """(13, 0) → '13.0'."""
    return ".".join(map(str, numbers))
