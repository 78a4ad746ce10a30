"""What is installed: packages by their state, and the extras of rwkv-edge that lack something."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any, Literal

from rwkv_edge.engines import ENGINE_BACKENDS
from rwkv_edge.errors import MissingDependencyError, RwkvEdgeError
from rwkv_edge.runtime.ort_providers import first_line

State = Literal["ok", "installed", "missing", "broken"]
"""'ok' was imported; 'installed' was only found, since importing it takes seconds; 'broken' has a reason."""


@dataclass(frozen=True)
class Package:
    """A package as it was found.

    Attributes:
        name: as pip calls it.
        state: see `State`.
        version: None where it does not say.
        problem: why it is broken, one line.
        module: what was imported.
    """

    name: str
    state: State
    version: str | None = None
    problem: str | None = None
    module: Any = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"state": self.state, "version": self.version, "problem": self.problem}


@dataclass(frozen=True)
class Extra:
    """An extra of rwkv-edge: what it is for, and the packages that it installs."""

    name: str
    purpose: str
    packages: tuple[str, ...]

    @property
    def install(self) -> str:
        """The one line."""
        return f"pip install 'rwkv-edge[{self.name}]'"


EXTRAS = (
    Extra("ort", "running on ONNX Runtime", ("onnxruntime",)),
    Extra("ort-gpu", "running on ONNX Runtime's CUDA provider, in place of onnxruntime", ("onnxruntime",)),
    Extra("cuda", "running models by our own CUDA kernels", ("cuda-bindings", "nvidia-cuda-nvrtc")),
    Extra("export", "exporting and verifying checkpoints", ("torch", "onnx", "onnx-ir", "onnxscript")),
    Extra("quantize", "calibrating and quantizing", ("onnx-graphsurgeon",)),
    Extra("tensorrt", "building engines with TensorRT", ("tensorrt",)),
    Extra("tensorrt-rtx", "building engines with TensorRT for RTX", ("tensorrt-rtx",)),
    Extra("hf", "tokenizers of Hugging Face", ("tokenizers",)),
    Extra("hub", "checkpoints by name from the Hugging Face hub", ("huggingface_hub",)),
    Extra("report", "plots of benchmarks", ("matplotlib",)),
)
"""Those of pyproject.toml that are not made of others alone, in the order in which a device needs them."""

NOT_IMPORTED = {
    "torch": "torch", "onnx": "onnx", "onnx-ir": "onnx_ir", "onnxscript": "onnxscript",
    "onnx-graphsurgeon": "onnx_graphsurgeon", "tokenizers": "tokenizers", "huggingface_hub": "huggingface_hub",
    "matplotlib": "matplotlib", "safetensors": "safetensors", "pyrwkv-tokenizer": "pyrwkv_tokenizer",
}  # fmt: skip
"""Distribution → module of packages whose presence is enough to know."""


def packages() -> dict[str, Package]:
    """All that rwkv-edge may use, by name; imports the backends and nothing else."""
    found = {"onnxruntime": imported("onnxruntime", "onnxruntime", "InferenceSession", _onnxruntime_distribution())}
    for backend in ENGINE_BACKENDS.values():
        found[backend.name] = imported(backend.name, backend.module, "Builder")
    found["cuda-bindings"] = imported("cuda-bindings", "cuda.bindings.driver", "cuInit")
    found["nvidia-cuda-nvrtc"] = nvrtc(found["cuda-bindings"])
    return found | {name: present(name, module) for name, module in NOT_IMPORTED.items()}


def imported(name: str, module: str, attribute: str, distribution: str | None = None) -> Package:
    """Import a package; one that lacks ``attribute`` is types, or what an uninstalled one left, without its library.

    Args:
        name: for the report.
        module: to import.
        attribute: what a whole one has.
        distribution: whose version counts; ``name`` where it is None.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            return Package(name, "missing")
        return Package(name, "broken", version_of(distribution or name), _reason(error))
    except (Exception, SystemExit) as error:  # a broken package raises whatever it likes
        return Package(name, "broken", version_of(distribution or name), _reason(error))
    if not hasattr(found, attribute):
        return Package(
            name, "broken", None, f"of the module '{module}' only types or remains are there, not its library"
        )
    version = getattr(found, "__version__", None) or version_of(distribution or name)
    return Package(name, "ok", None if version is None else str(version), None, found)


def present(name: str, module: str) -> Package:
    """Look for a package without importing it."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return Package(name, "missing")
    if spec.origin is None:
        return Package(name, "broken", None, f"the folder '{module}' is there, but empty")
    return Package(name, "installed", version_of(name))


def nvrtc(bindings: Package) -> Package:
    """NVRTC, which cuda-bindings finds and asks."""
    name = "nvidia-cuda-nvrtc"
    if bindings.state != "ok":
        return present_distribution(name)
    from rwkv_edge.plugins.nvrtc import nvrtc_version

    return asked(name, nvrtc_version)


def asked(name: str, version: Callable[[], tuple[int, int]]) -> Package:
    """A library that is there if it tells its version."""
    try:
        numbers = version()
    except MissingDependencyError:
        return Package(name, "missing")
    except (RwkvEdgeError, RuntimeError, OSError, ImportError) as error:
        return Package(name, "broken", version_of(name), _reason(error))
    return Package(name, "ok", ".".join(map(str, numbers)))


def present_distribution(name: str) -> Package:
    """A package that has no module of its own."""
    version = version_of(name)
    return Package(name, "missing") if version is None else Package(name, "installed", version)


def missing_of(extra: Extra, found: Mapping[str, Package]) -> list[str]:
    """The packages of an extra that are absent or broken."""
    return [name for name in extra.packages if found[name].state in ("missing", "broken")]


def _onnxruntime_distribution() -> str:
    """Several distributions install this module."""
    return next((name for name in ("onnxruntime-gpu", "onnxruntime") if version_of(name)), "onnxruntime")


def version_of(distribution: str) -> str | None:
    """Of an installed distribution, None where it is not."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _reason(error: BaseException) -> str:
    line = first_line(error) if isinstance(error, Exception) else str(error)
    return line or type(error).__name__
