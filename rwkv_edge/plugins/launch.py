"""Launches a kernel of a `KernelSpec` through the CUDA driver (cuda-bindings), on pointers of whatever library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from rwkv_edge.errors import InputError, MissingDependencyError, SessionError
from rwkv_edge.plugins.spec import KernelSpec


def launch(
    spec: KernelSpec,
    inputs: Sequence[int],
    outputs: Sequence[int],
    B: int,
    T: int,
    H: int,
    N: int,
    stream: int = 0,
) -> None:
    """Enqueues one launch on the current context and returns at once.

    Args:
        spec: the kernel.
        inputs: device pointers of ``spec.inputs`` in that order.
        outputs: device pointers of ``spec.outputs``; a new state may be the old one.
        B: streams.
        T: tokens, 1 for a step.
        H: heads. RWKV-4 uses only the product H·N, the channels.
        N: head size.
        stream: handle of a CUDA stream, 0 for the default one.

    Raises:
        InputError: the counts do not fit the kernel.
        SessionError: the driver refuses, or no context is current.
    """
    sizes = B, T, H, N
    _check_counts(spec, (len(inputs), len(outputs)), sizes)
    values = (*inputs, *spec.scalar_values(*sizes), *outputs)
    kinds = (ctypes.c_void_p,) * len(inputs) + (ctypes.c_int,) * len(spec.scalars) + (ctypes.c_void_p,) * len(outputs)
    driver = _driver()
    function = _function(spec, _context(driver))
    dimensions = (*spec.grid(*sizes), *spec.block(*sizes), spec.shared_bytes(*sizes))
    _checked(spec, *driver.cuLaunchKernel(function, *dimensions, stream, (values, kinds), 0))


def current_capability() -> int:
    """Compute capability of the current context's device: 90 for 9.0.

    Raises:
        SessionError: no context is current.
    """
    driver = _driver()
    _context(driver)
    names = driver.CUdevice_attribute
    (device,) = _checked(None, *driver.cuCtxGetDevice())
    major, minor = (
        _checked(None, *driver.cuDeviceGetAttribute(attribute, device))[0]
        for attribute in (
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return int(major) * 10 + int(minor)


def _check_counts(spec: KernelSpec, pointers: tuple[int, int], sizes: tuple[int, int, int, int]) -> None:
    """Refuses numbers of input and output pointers, and sizes (B, T, H, N), that the kernel does not take."""
    if pointers != (len(spec.inputs), len(spec.outputs)):
        raise InputError(
            f"{spec.name} takes {len(spec.inputs)} inputs and {len(spec.outputs)} outputs; "
            f"found {pointers[0]} and {pointers[1]}"
        )
    _, tokens, _, head = sizes
    if min(sizes) < 1 or (spec.version != "4" and spec.head_size != head) or (spec.kind == "step" and tokens != 1):
        found = ", ".join(f"{letter}={size}" for letter, size in zip("BTHN", sizes, strict=True))
        wanted = "positive sizes" + ("" if spec.version == "4" else f", N={spec.head_size}")
        raise InputError(f"{spec.name} takes {wanted}{', T=1' if spec.kind == 'step' else ''}; found {found}")


def _context(driver: Any) -> int:
    """Handle of the current context."""
    _checked(None, *driver.cuInit(0))
    (context,) = _checked(None, *driver.cuCtxGetCurrent())
    if int(context) == 0:
        raise SessionError(
            "a CUDA context must be current before a kernel is launched; found none: set the device first"
        )
    return int(context)


@lru_cache(maxsize=256)
def _function(spec: KernelSpec, context: int) -> Any:
    """The kernel, loaded into the current context; the module lives as long as the process."""
    driver = _driver()
    image = spec.ptx(current_capability()).encode() + b"\0"
    (module,) = _checked(spec, *driver.cuModuleLoadData(image))
    (function,) = _checked(spec, *driver.cuModuleGetFunction(module, spec.name.encode()))
    return function


@lru_cache(maxsize=1)
def _driver() -> Any:
    """The module cuda.bindings.driver."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingDependencyError("cuda-bindings", "cuda", "launching the CUDA kernels") from error
    return driver


def _checked(spec: KernelSpec | None, status: Any, *values: Any) -> tuple[Any, ...]:
    """The values of a call of the driver that succeeded."""
    if int(status) != 0:
        hint = (
            ": NVRTC is newer than the driver, install nvidia-cuda-nvrtc of the driver's CUDA"
            if status.name == "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"
            else ""
        )
        raise SessionError(
            f"the CUDA driver must run {spec.name if spec else 'a query'}; it answered {status.name}{hint}"
        )
    return values
