"""The kernels as plugins of TensorRT, ahead of time: their PTX becomes part of the engine, which then runs without
Python and without a library.

A plugin has the name and the namespace of the local function in whose place the parser puts it, ``rwkv::wkvN_step`` or
``rwkv::wkvN_sequence`` (`rwkv_edge.exporters.recurrences`, `sequence_functions`) or that of a fused node
(`rwkv_edge.plugins.fused_nodes`), its inputs and its outputs. What each TensorRT does with such a node is in
`rwkv_edge.exporters.trt_targets`. Source of the interface: the documentation and the Python text of
``tensorrt.plugin`` in TensorRT 10.9 to 11.1 (register, autotune, aot_impl; kernels get inputs, int32 scalars, outputs).

The fused kernels wait for the kernel ahead by ``griddepcontrol.wait``. TensorRT does not launch them as programmatic
dependents, so there is none to wait for: the instruction waits for prerequisite grids in flight (PTX ISA 9.0).
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
from rwkv_edge.plugins.fused_nodes import ACT, FUSED_VERSIONS, FusedNode, fused_layers
from rwkv_edge.plugins.spec import KINDS, VERSIONS, Argument, KernelSpec, Kind, Version, kernel_spec

NAMESPACE = "rwkv"
ACT_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
"""Types of activations that the kernels have, by their names in tensorrt.DataType."""

ANY_ACT, FLOAT = "FP32|FP16|BF16", "FP32"  # as tensorrt.plugin.AutoTuneCombination spells types
SPELLING = {ACT: ANY_ACT, "float32": FLOAT, "int32": "INT32"}

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
        if not _is_registered(trtp, f"wkv{version}_{kind}"):
            _register_wkv(trtp, trt.__name__, version, kind)
    for fused in FUSED_VERSIONS:
        for node in fused_layers(fused).nodes.values():
            if not _is_registered(trtp, node.name):
                _register_fused(trtp, trt, node)


def _is_registered(trtp: Any, name: str) -> bool:
    return hasattr(getattr(trtp.op, NAMESPACE, None), name)


def _register_wkv(trtp: Any, module: str, version: Version, kind: Kind) -> None:
    """A kernel of `rwkv_edge.plugins.spec`."""
    spec = kernel_spec(version, kind, "float16", 64)  # names, axes and order, which all dtypes and head sizes share
    names = [argument.name for argument in spec.inputs]

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

    _register(trtp, f"wkv{version}_{kind}", names, len(spec.outputs), describe, combinations, kernel)


def _register_fused(trtp: Any, trt: Any, node: FusedNode) -> None:
    """A kernel of `rwkv_edge.plugins.fused`, compiled for the shapes of the node."""
    names = [f"input_{i}" for i in range(len(node.inputs))]  # TensorRT takes no 'stream' and no dots
    act = next((i for i, argument in enumerate(node.inputs) if argument.dtype == ACT), None)

    def describe(*descriptors: Any) -> tuple[Any, ...]:
        sizes = {**_sizes(node, descriptors), "1": 1}
        known = not sizes["B"].is_fake  # else only types are asked for
        sizes["S"] = node.parts(_constants(node, descriptors)) if known else 1
        dtypes = {"float32": trt.DataType.FLOAT} | ({} if act is None else {ACT: descriptors[act].dtype})
        return tuple(
            trtp.from_shape_expr(tuple(sizes[letter] for letter in output.axes), dtypes[output.dtype])
            for output in node.outputs
        )

    def combinations(*descriptors: Any) -> list[Any]:
        types = ", ".join(SPELLING[argument.dtype] for argument in (*node.inputs, *node.outputs))
        return [trtp.AutoTuneCombination(types, "LINEAR")]

    def kernel(*arguments: Any) -> tuple[Any, ...]:
        given = arguments[: len(names)]
        dtype = "float32" if act is None else ACT_DTYPES[given[act].dtype.name]  # some recurrences take float32 alone
        made = node.kernel(_constants(node, given), dtype)
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = made.grid
        launch.block_x, launch.block_y, launch.block_z = made.threads, 1, 1
        launch.shared_mem = made.shared
        return made.name, made.ptx(_capabilities[trt.__name__]), launch, trtp.SymIntExprs.from_tuple(())

    _register(trtp, node.name, names, len(node.outputs), describe, combinations, kernel)


def _sizes(node: FusedNode, descriptors: Sequence[Any]) -> dict[str, Any]:
    """The dimensions of a node's inputs by letter."""
    return {
        letter: size
        for argument, given in zip(node.inputs, descriptors, strict=True)
        for letter, size in zip(argument.axes, given.shape_expr, strict=True)
    }


def _constants(node: FusedNode, descriptors: Sequence[Any]) -> dict[str, int]:
    """`_sizes` as integers: shapes of a fixed batch size are constant."""
    return {letter: int(size.constant_value()) for letter, size in _sizes(node, descriptors).items()}


def _register(
    trtp: Any,
    name: str,
    inputs: Sequence[str],
    outputs: int,
    describe: Callable[..., Any],
    combinations: Callable[..., Any],
    kernel: Callable[..., Any],
) -> None:
    """The three functions by which TensorRT knows a plugin: its outputs, its types, its kernel."""
    plugin, given = f"{NAMESPACE}::{name}", [(argument, trtp.TensorDesc) for argument in inputs]
    several = GenericAlias(tuple, (trtp.TensorDesc,) * outputs)
    result = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    tail: Annotations = [("outputs", several)]
    trtp.register(plugin)(_signed(describe, given, several))
    trtp.autotune(plugin)(_signed(combinations, [*given, *tail], list[trtp.AutoTuneCombination]))
    trtp.aot_impl(plugin)(_signed(kernel, [*given, *tail, ("tactic", int)], result))


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
