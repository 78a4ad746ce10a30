"""The WKV kernels as plugins of TensorRT, ahead of time: their PTX becomes part of the engine, which then runs without
Python and without a library.

A plugin has the name and the namespace of the local function in whose place the parser puts it, ``rwkv::wkvN_step`` or
``rwkv::wkvN_sequence``, its inputs and its outputs (`rwkv_edge.exporters.recurrences`, `sequence_functions`). What each
TensorRT does with such a node is in `rwkv_edge.exporters.trt_targets`. Source of the interface: the documentation and
the Python text of ``tensorrt.plugin`` in TensorRT 10.9 to 11.1 (register, autotune, aot_impl; kernels get inputs, int32
scalars, outputs).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from importlib import import_module
from types import GenericAlias
from typing import Any

from rwkv_edge.errors import ExportError
from rwkv_edge.plugins import nvrtc
from rwkv_edge.plugins.spec import KINDS, VERSIONS, Argument, KernelSpec, Kind, Version, kernel_spec

NAMESPACE = "rwkv"
ACT_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
"""Types of activations that the kernels have, by their names in tensorrt.DataType."""

ANY_ACT, FLOAT = "FP32|FP16|BF16", "FP32"  # as tensorrt.plugin.AutoTuneCombination spells types

Annotations = Sequence[tuple[str, Any]]
_capabilities: dict[str, int] = {}  # of the GPU that each module builds for


def register_plugins(trt: Any, capability: int) -> None:
    """Make the kernels known to TensorRT, once in a process.

    Args:
        trt: the module ``tensorrt``, 10.9 or later.
        capability: compute capability of the GPU that engines are built for, 86 for sm86.

    Raises:
        ExportError: this TensorRT has no plugins that are compiled ahead of time, or NVRTC knows no such GPU.
        MissingDependencyError: cuda-bindings or NVRTC, which compiles the kernels, is not installed.
    """
    try:
        trtp = import_module(f"{trt.__name__}.plugin")
        needed = (trtp.register, trtp.autotune, trtp.aot_impl)
    except (ImportError, AttributeError) as error:
        raise ExportError(
            f"{trt.__name__} {trt.__version__} has no plugins that are compiled ahead of time ({error}); "
            "install TensorRT 10.9 or later, or build with --wkv function"
        ) from error
    assert all(map(callable, needed))
    nvrtc.nearest_capability(
        capability
    )  # now: what a kernel raises later goes through TensorRT, which loses the reason
    _capabilities[trt.__name__] = capability
    for version, kind in itertools.product(VERSIONS, KINDS):
        if not hasattr(getattr(trtp.op, NAMESPACE, None), f"wkv{version}_{kind}"):
            _register(trtp, trt.__name__, version, kind)


def _register(trtp: Any, module: str, version: Version, kind: Kind) -> None:
    """The three functions by which TensorRT knows a plugin: its outputs, its types, its kernel."""
    spec = kernel_spec(version, kind, "float16", 64)  # names, axes and order, which all dtypes and head sizes share
    names = [argument.name for argument in spec.inputs]
    inputs: Annotations = [(argument, trtp.TensorDesc) for argument in names]
    outputs = GenericAlias(tuple, (trtp.TensorDesc,) * len(spec.outputs))

    def describe(*descriptors: Any) -> tuple[Any, ...]:
        given = dict(zip(names, descriptors, strict=True))
        return tuple(given[_twin(output, spec.inputs)].like() for output in spec.outputs)

    def combinations(*descriptors: Any) -> list[Any]:
        types = ", ".join(
            ANY_ACT if argument.dtype == "float16" else FLOAT for argument in (*spec.inputs, *spec.outputs)
        )
        return [trtp.AutoTuneCombination(types, "LINEAR")]

    def kernel(*arguments: Any) -> tuple[Any, ...]:
        given = dict(zip(names, arguments[: len(names)], strict=True))
        act = next(argument.name for argument in spec.inputs if argument.dtype == "float16")
        made = kernel_spec(version, kind, ACT_DTYPES[given[act].dtype.name], _head_size(given))
        return _kernel(trtp, made, _dimensions(made, given), _capabilities[module])

    result = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    plugin = f"{NAMESPACE}::wkv{version}_{kind}"
    trtp.register(plugin)(_signed(describe, inputs, outputs))
    tail: Annotations = [("outputs", outputs)]
    trtp.autotune(plugin)(_signed(combinations, [*inputs, *tail], list[trtp.AutoTuneCombination]))
    trtp.aot_impl(plugin)(_signed(kernel, [*inputs, *tail, ("tactic", int)], result))


def _kernel(
    trtp: Any, spec: KernelSpec, dimensions: tuple[Any, Any, Any, int], capability: int
) -> tuple[str, str, Any, Any]:
    """Name, PTX, launch parameters and scalars; the dimensions B, T, H and N may be symbolic but for the last."""
    launch = trtp.KernelLaunchParams()
    launch.grid_x, launch.grid_y, launch.grid_z = spec.grid(*dimensions)
    launch.block_x, launch.block_y, launch.block_z = spec.block(*dimensions)
    launch.shared_mem = spec.shared_bytes(*dimensions)
    scalars = trtp.SymIntExprs.from_tuple([trtp.SymInt32(value) for value in spec.scalar_values(*dimensions)])
    return spec.name, spec.ptx(capability), launch, scalars


def _head_size(given: dict[str, Any]) -> int:
    """N, by the shape of the state; RWKV-4 has a channel for each head."""
    return int(given["state"].shape_expr[3].constant_value()) if "state" in given else 1


def _dimensions(spec: KernelSpec, given: dict[str, Any]) -> tuple[Any, Any, Any, int]:
    """B, T, H and N by the shapes of the inputs."""
    batch, heads = (given["state" if "state" in given else "num"].shape_expr[axis] for axis in (0, 1))
    tokens = given["k"].shape_expr[1] if spec.kind == "sequence" else 1
    return batch, tokens, heads, spec.head_size


def _twin(output: Argument, inputs: Sequence[Argument]) -> str:
    """The input of an output's type and shape: the old state of a new one, else an activation."""
    old = output.name.removesuffix(".out")
    if old != output.name:
        return old
    return next(i.name for i in inputs if (i.dtype, i.axes) == (output.dtype, output.axes))


def _signed(function: Callable[..., Any], parameters: Annotations, result: Any) -> Callable[..., Any]:
    """``function`` with the signature that TensorRT reads; it calls it by position."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    found = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters]
    function.__signature__ = inspect.Signature(found, return_annotation=result)  # type: ignore[attr-defined]
    return function
