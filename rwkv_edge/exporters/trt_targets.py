"""What must hold before an engine is built: for which GPUs, in which precision, with which form of the recurrence.

Everything here is pure except `device_capability`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from rwkv_edge.engines import ENGINE_BACKENDS, is_target, target_of, version_numbers
from rwkv_edge.errors import ExportError, InputError

LEAST_TARGET = {"BF16": 80, "INT4": 80, "FP8": 89, "FP4": 100}
"""DataType → first compute capability × 10 that computes with it: TensorRT's support matrix; the builder's refusal of
BF16 on sm75 was seen with TensorRT-RTX 1.7."""

AOT_PLUGINS = (10, 9)
"""First TensorRT whose quick plugins put their code into the engine, where it runs without Python."""


@dataclass(frozen=True)
class ParserDispatch:
    """Where the parser looks for an operator's meaning: the first match wins."""

    since: tuple[int, int]
    order: tuple[str, ...]


PARSER_DISPATCH = (
    ParserDispatch((10, 15), ("plugin of the node's plugin_namespace", "builtin", "function", "plugin")),
    ParserDispatch((10, 7), ("builtin", "plugin", "function")),
    ParserDispatch((10, 0), ("builtin", "function", "plugin")),
)
"""Newest first.

- 10.0 to 10.6: onnx-tensorrt 10.1, ModelImporter.cpp, parseNode: importers, local functions, FallbackPluginImporter,
  which reads the node's attribute ``plugin_namespace`` (source read).
- 10.7 to 10.14: changelog of onnx-tensorrt 10.7, plugins before local functions (read).
- from 10.15 on: the documentation of OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE in tensorrt_rtx 1.7, and its log (run): a
  node with ``plugin_namespace`` is looked up among the plugins of that namespace and, where there is none, is its local
  function. The tracer gives every call of ``rwkv::wkvN_step`` that attribute. The flag is not used: it looks up every
  node of the graph (MatMul, Add, …), and in the empty namespace.

No plugin was ever taken here: no TensorRT that runs them can be installed."""


def parser_dispatch(version: str) -> ParserDispatch:
    """The entry for a version of TensorRT.

    Raises:
        InputError: it is older than 10.0.
    """
    numbers = version_numbers(version)
    for entry in PARSER_DISPATCH:
        if numbers >= entry.since:
            return entry
    raise InputError(f"TensorRT {version} is installed, but engines are built by 10.3 or later; install a later one")


def chosen_wkv(wanted: str | None, exported: str, backend: str, version: str) -> str:
    """The form of a step in the engine: what the graph has, or plugins in the place of its local functions.

    Args:
        wanted: 'plugin', 'fused', 'function', 'inline', or None for what the graph has.
        exported: 'fused', 'function' or 'inline', the graph's form.
        backend: 'tensorrt' or 'tensorrt-rtx'.
        version: the backend's.

    Raises:
        InputError: the graph has another form, or the backend runs no plugins.
    """
    wanted = wanted or exported
    needed = ("function", "fused") if wanted == "plugin" else (wanted,)
    form = exported if exported in needed else needed[0]
    if wanted == "plugin" and backend != "tensorrt":
        raise InputError(f"{ENGINE_BACKENDS[backend].words} runs no plugins from Python; build with --wkv {form}")
    if exported not in needed:
        raise InputError(
            f"--wkv {wanted} needs a graph that was exported with --wkv {' or '.join(needed)}, but this one has "
            f"{exported}; export the checkpoint with --wkv {form}"
        )
    if wanted == "plugin" and version_numbers(version) < AOT_PLUGINS:
        least = ".".join(map(str, AOT_PLUGINS))
        raise InputError(
            f"--wkv plugin needs TensorRT {least} or later, but {version} is installed; build with --wkv {form}"
        )
    return wanted


def chosen_targets(
    wanted: Sequence[str], backend: str, known: Collection[str] | None, capability: tuple[int, int] | None
) -> tuple[str, ...]:
    """The GPUs to build for: those that were asked for, or the one of this machine.

    Args:
        wanted: such as 'sm86'; empty for this machine's GPU.
        backend: 'tensorrt' or 'tensorrt-rtx'.
        known: what the backend can build for without having it; None where it builds for its own GPU only.
        capability: compute capability of this machine's GPU, None where there is none.

    Raises:
        InputError: no such target, or none that this machine can build for.
    """
    for target in wanted:
        if not is_target(target):
            raise InputError(f"a target is the compute capability of a GPU, such as sm86, not '{target}'")
    words, here = ENGINE_BACKENDS[backend].words, target_of(capability) if capability else None
    if here is None and (known is None or not wanted):
        hint = "build on the machine that will run it" if known is None else "name one with --target sm86"
        raise InputError(f"no NVIDIA GPU was found here, for which {words} could build; {hint}")
    targets = tuple(dict.fromkeys(wanted)) or (str(here),)
    for target in targets:
        if known is None and target != here:
            raise InputError(f"{words} builds for the GPU of this machine, {here}, not for {target}; build there")
        if known is not None and target not in known:
            raise InputError(f"{words} builds for {', '.join(known)}, not for {target}")
    return targets


def check_precision(dtypes: Iterable[str], targets: Sequence[str], graph: str) -> None:
    """Refuse data types that a target does not compute with.

    Args:
        dtypes: names of TensorRT's DataType.
        targets: GPUs to build for.
        graph: the file, for the sentence.

    Raises:
        InputError: one is too old.
    """
    for dtype in sorted(set(dtypes) & set(LEAST_TARGET)):
        for target in targets:
            if int(target[2:]) < LEAST_TARGET[dtype]:
                raise InputError(
                    f"{graph} computes in {dtype}, which GPUs have from sm{LEAST_TARGET[dtype]} on, but the target is "
                    f"{target}; export with another precision, such as fp16"
                )


def device_capability() -> tuple[int, int] | None:
    """Compute capability of the first visible GPU, from CUDA's driver; None where there is no driver or no GPU.

    Raises:
        ExportError: the driver fails.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, values = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for value, attribute in zip(values, (75, 76), strict=True):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if code := driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            raise ExportError(f"CUDA's driver does not tell the GPU's compute capability (error {code}); update it")
    return values[0].value, values[1].value
