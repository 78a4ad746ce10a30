"""CUDA C++ to PTX with NVRTC (the wheel ``nvidia-cuda-nvrtc``; no toolkit, no headers), cached by content on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from rwkv_edge.errors import ExportError, MissingDependencyError

CACHE_VARIABLE = "RWKV_EDGE_CACHE"
HEADERS = (
    "common.cuh",
    "fused.cuh",
    "products.cuh",
    "heads.cuh",
    "wide.cuh",
    "wide_product.cuh",
    "wide_integers.cuh",
    "wide_wkv.cuh",
    "sample.cuh",
    "sample_bins.cuh",
)
OPTIONS = ("--std=c++17",)


def kernel_text(name: str) -> str:
    """The text of a file of `rwkv_edge.plugins.kernels`."""
    return (resources.files("rwkv_edge.plugins") / "kernels" / name).read_text("utf-8")


def cache_folder(folder: Path | None = None) -> Path:
    """``folder``, else $RWKV_EDGE_CACHE, else $XDG_CACHE_HOME/rwkv-edge, else ~/.cache/rwkv-edge."""
    if folder is not None:
        return folder
    if CACHE_VARIABLE in os.environ:
        return Path(os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkv-edge"


def nvrtc_version() -> tuple[int, int]:
    """Of the installed NVRTC, (major, minor).

    Raises:
        MissingDependencyError: there is none.
    """
    major, minor = _checked(*_nvrtc().nvrtcVersion())
    return major, minor


def supported_capabilities() -> tuple[int, ...]:
    """The compute capabilities (90 for 9.0) that the installed NVRTC compiles for, ascending."""
    (known,) = _checked(*_nvrtc().nvrtcGetSupportedArchs())
    return tuple(sorted(known))


def nearest_capability(capability: int) -> int:
    """The newest capability that NVRTC knows and a device of ``capability`` runs: PTX is forward compatible.

    Raises:
        ExportError: the device is older than all that NVRTC knows.
    """
    known = supported_capabilities()
    fitting = [c for c in known if c <= capability]
    if not fitting:
        raise ExportError(
            f"a GPU of compute capability {capability / 10:.1f} needs an NVRTC that compiles for it; NVRTC "
            f"{'.'.join(map(str, nvrtc_version()))} starts at {known[0] / 10:.1f}: install one of an older CUDA"
        )
    return fitting[-1]


def compile_ptx(source: str, defines: Sequence[tuple[str, str]], capability: int, cache: Path | None = None) -> str:
    """PTX of one kernel file.

    Args:
        source: a file of `rwkv_edge.plugins.kernels`.
        defines: macros, names and values.
        capability: of the device, 90 for 9.0; one that NVRTC does not know gets the nearest older one.
        cache: folder of compiled texts; see `cache_folder`. An unwritable one is done without.

    Raises:
        ExportError: the text does not compile, or the device is too old.
        MissingDependencyError: cuda-bindings or NVRTC is not installed.
    """
    options = (*OPTIONS, *(f"-D{name}={value}" for name, value in defines))
    options += (f"--gpu-architecture=compute_{nearest_capability(capability)}",)
    texts = [kernel_text(name) for name in (source, *HEADERS)]
    key = hashlib.sha256(repr((nvrtc_version(), options, texts)).encode()).hexdigest()
    path = cache_folder(cache) / "ptx" / f"{key}.ptx"
    if path.is_file():
        return path.read_text("utf-8")
    ptx, _ = compiled(source, options)
    text = ptx.decode().rstrip("\0")
    _write(path, text)
    return text


def compiled(source: str, options: Sequence[str]) -> tuple[bytes, str]:
    """Compiles a kernel file with NVRTC.

    Args:
        source: a file of `rwkv_edge.plugins.kernels`.
        options: NVRTC's; an architecture ``compute_90`` gives PTX, ``sm_90`` machine code.

    Returns:
        The PTX or cubin, and the compiler's log.

    Raises:
        ExportError: the text does not compile.
    """
    nvrtc = _nvrtc()
    headers = [kernel_text(name).encode() for name in HEADERS]
    names = [name.encode() for name in HEADERS]
    text = kernel_text(source).encode()
    (program,) = _checked(*nvrtc.nvrtcCreateProgram(text, source.encode(), len(headers), headers, names))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = bytearray(_checked(*nvrtc.nvrtcGetProgramLogSize(program))[0])
        _checked(*nvrtc.nvrtcGetProgramLog(program, log))
        message = log.decode().rstrip("\0\n")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise ExportError(f"the kernel {source} must compile with {' '.join(options)}; NVRTC says: {message}")
        machine_code = any("=sm_" in option for option in options)
        size, get = (
            (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
            if machine_code
            else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        )
        output = bytearray(_checked(*size(program))[0])
        _checked(*get(program, output))
        return bytes(output), message
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@lru_cache(maxsize=1)
def _nvrtc() -> Any:
    """The module cuda.bindings.nvrtc, with its library found."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise MissingDependencyError("cuda-bindings", "cuda", "compiling the CUDA kernels") from error
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:  # cuda.pathfinder found no library
        raise MissingDependencyError("nvidia-cuda-nvrtc", "cuda", "compiling the CUDA kernels") from error
    return nvrtc


def _checked(status: Any, *values: Any) -> tuple[Any, ...]:
    """The values of a call of NVRTC that succeeded."""
    if int(status) != 0:
        raise ExportError(f"NVRTC must answer NVRTC_SUCCESS; it answered {status.name}")
    return values


def _write(path: Path, text: str) -> None:
    """Puts a whole file in place, or none: readers beside this process never see half of one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(text)
        Path(file.name).replace(path)
    except OSError:  # a cache that cannot be written costs a compilation, nothing else
        return
