"""A double of `tensorrt.plugin`, which cannot be installed here, as its documentation describes it.

It refuses what TensorRT refuses at registration (names, annotations, orders), and plays the builder: output types from
shapes that are not known yet, output shapes, type combinations, launch parameters as expressions of the shapes.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

DataType = Enum("DataType", ["FLOAT", "HALF", "BF16", "INT32", "INT64", "INT8"])
SPELLING = {"FP32": DataType.FLOAT, "FP16": DataType.HALF, "BF16": DataType.BF16, "INT32": DataType.INT32}
RESERVED = {"", "trt", "tensorrt", "std"}


class SymInt32:
    """A value that the shapes at run time decide: a function of the named dimensions."""

    def __init__(self, value: int | SymInt32 | Callable[[Mapping[str, int]], int]) -> None:
        if isinstance(value, SymInt32):
            self._value: Callable[[Mapping[str, int]], int] = value._value
            self._constant = value._constant
        elif isinstance(value, int):
            self._value, self._constant = (lambda _: value), value
        else:
            self._value, self._constant = value, None

    def _with(self, other: int | SymInt32, operation: Callable[[int, int], int]) -> SymInt32:
        right = SymInt32(other)
        made = type(self)(lambda sizes: operation(self._value(sizes), right._value(sizes)))
        if self._constant is not None and right._constant is not None:
            made._constant = operation(self._constant, right._constant)
        return made

    def __add__(self, other: int | SymInt32) -> SymInt32:
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, other: int | SymInt32) -> SymInt32:
        return self._with(other, lambda a, b: a - b)

    def __mul__(self, other: int | SymInt32) -> SymInt32:
        return self._with(other, lambda a, b: a * b)

    def __floordiv__(self, other: int | SymInt32) -> SymInt32:
        return self._with(other, lambda a, b: a // b)

    def at(self, sizes: Mapping[str, int]) -> int:
        """What only the double knows: the value for these dimensions."""
        return self._value(sizes)


class ShapeExpr(SymInt32):
    """A dimension. While types are asked for, it is fake: nothing is known of it."""

    def __init__(self, value: Any = None) -> None:
        super().__init__(0 if value is None else value)
        self.is_fake = value is None

    def _with(self, other: int | SymInt32, operation: Callable[[int, int], int]) -> SymInt32:
        return ShapeExpr() if self.is_fake else super()._with(other, operation)

    @property
    def is_constant(self) -> bool:
        if self.is_fake:
            raise RuntimeError("not accessible for fake shapes")
        return self._constant is not None

    def constant_value(self) -> int:
        if not self.is_constant or self._constant is None:
            raise RuntimeError("not accessible for a dimension that is not constant")
        return self._constant


class SymIntExprs(list[SymInt32]):
    """Scalars of a kernel."""

    @classmethod
    def from_tuple(cls, values: Sequence[int | SymInt32]) -> SymIntExprs:
        return cls(v if isinstance(v, SymInt32) else SymInt32(v) for v in values)


class KernelLaunchParams:
    """Grid, block and shared memory; no other attributes."""

    __slots__ = ("block_x", "block_y", "block_z", "grid_x", "grid_y", "grid_z", "shared_mem")

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0 if name == "shared_mem" else 1)

    def __setattr__(self, name: str, value: int | SymInt32) -> None:
        if not isinstance(value, (int, SymInt32)):
            raise TypeError(f"{name} must be an integer or an expression, not {type(value)}")
        object.__setattr__(self, name, SymInt32(value))


@dataclass
class TensorDesc:
    """Type and shape of a tensor."""

    dtype: DataType
    shape_expr: tuple[ShapeExpr, ...]

    def like(self) -> TensorDesc:
        return TensorDesc(self.dtype, self.shape_expr)


class AutoTuneCombination:
    """Types of all inputs and outputs: '|' for choices that go together."""

    def __init__(self, io_types: str, layouts: str = "LINEAR") -> None:
        if layouts != "LINEAR":
            raise ValueError("the double knows linear tensors")
        choices = [[SPELLING[t.strip()] for t in part.split("|")] for part in io_types.split(",")]
        lengths = {len(c) for c in choices} - {1}
        if len(lengths) > 1:
            raise ValueError("illegal dependent lengths")
        count = max(lengths, default=1)
        self.all = [[c[min(i, len(c) - 1)] for c in choices] for i in range(count)]


@dataclass
class Definition:
    """What is known of a plugin."""

    register: Callable[..., Any]
    inputs: list[str]
    outputs: int
    autotune: Callable[..., Any] | None = None
    aot_impl: Callable[..., Any] | None = None


class _Namespaces(SimpleNamespace):
    """`tensorrt.plugin.op`."""


@dataclass
class Module:
    """`tensorrt.plugin`; a new one has no plugins."""

    definitions: dict[str, Definition] = field(default_factory=dict)
    op: _Namespaces = field(default_factory=_Namespaces)
    TensorDesc: type[TensorDesc] = TensorDesc
    AutoTuneCombination: type[AutoTuneCombination] = AutoTuneCombination
    KernelLaunchParams: type[KernelLaunchParams] = KernelLaunchParams
    SymIntExprs: type[SymIntExprs] = SymIntExprs
    SymInt32: type[SymInt32] = SymInt32

    @staticmethod
    def from_shape_expr(shape_expr: tuple[ShapeExpr | int, ...], dtype: DataType) -> TensorDesc:
        if not isinstance(shape_expr, tuple) or not all(isinstance(n, (int, ShapeExpr)) for n in shape_expr):
            raise TypeError("a shape is a tuple of integers and expressions")
        return TensorDesc(dtype, tuple(n if isinstance(n, ShapeExpr) else ShapeExpr(n) for n in shape_expr))

    def register(self, plugin_id: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            namespace, name = plugin_id.split("::")
            if namespace in RESERVED or "." in namespace or "." in name:
                raise ValueError(f"{plugin_id} is no name of a plugin")
            if plugin_id in self.definitions:
                raise ValueError(f"{plugin_id} is registered already")
            signature = inspect.signature(function)
            for parameter in signature.parameters.values():
                if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
                    raise ValueError(f"{parameter} is not positional or keyword")
                if parameter.default is not inspect.Parameter.empty or not issubclass(parameter.annotation, TensorDesc):
                    raise ValueError(f"{parameter} has a default, or is no TensorDesc")
                if not parameter.name.isidentifier() or parameter.name in ("outputs", "stream", "tactic"):
                    raise ValueError(f"{parameter} has a name that is not allowed")
            found = typing.get_args(signature.return_annotation)
            if typing.get_origin(signature.return_annotation) is not tuple or not all(
                issubclass(t, TensorDesc) for t in found
            ):
                raise ValueError("a description returns TensorDescs")
            self.definitions[plugin_id] = Definition(function, list(signature.parameters), len(found))
            space = getattr(self.op, namespace, None) or SimpleNamespace()
            setattr(space, name, self.definitions[plugin_id])
            setattr(self.op, namespace, space)
            return function

        return decorate

    def autotune(self, plugin_id: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            definition = self.definitions[plugin_id]
            result = self._checked(function, definition, ["outputs"])
            if typing.get_origin(result) is not list or not issubclass(typing.get_args(result)[0], AutoTuneCombination):
                raise ValueError("autotune returns a list of AutoTuneCombination")
            definition.autotune = function
            return function

        return decorate

    def aot_impl(self, plugin_id: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            definition = self.definitions[plugin_id]
            result = typing.get_args(self._checked(function, definition, ["outputs", "tactic"]))
            if len(result) != 4 or result[:2] != (str, str) or not issubclass(result[2], KernelLaunchParams):
                raise ValueError("aot_impl returns name, PTX, KernelLaunchParams and SymIntExprs")
            if not issubclass(result[3], SymIntExprs):
                raise ValueError("scalars are SymIntExprs")
            definition.aot_impl = function
            return function

        return decorate

    @staticmethod
    def _checked(function: Callable[..., Any], definition: Definition, tail: list[str]) -> Any:
        signature = inspect.signature(function)
        if list(signature.parameters) != [*definition.inputs, *tail]:
            raise ValueError(f"expected ({', '.join([*definition.inputs, *tail])}), found {signature}")
        for name, parameter in signature.parameters.items():
            annotation = parameter.annotation
            if name == "outputs" and typing.get_origin(annotation) is not tuple:
                raise ValueError("outputs are a tuple of TensorDesc")
            if name in definition.inputs and not issubclass(annotation, TensorDesc):
                raise ValueError(f"{name} is a TensorDesc")
            if name == "tactic" and annotation is not int:
                raise ValueError("a tactic is an int")
        return signature.return_annotation


@dataclass(frozen=True)
class Built:
    """What the builder puts into an engine."""

    outputs: list[tuple[DataType, tuple[SymInt32, ...]]]
    name: str
    ptx: str
    launch: KernelLaunchParams
    scalars: SymIntExprs

    def numbers(self, **sizes: int) -> dict[str, tuple[int, ...]]:
        """Grid, block, shared memory, scalars and output shapes where the named dimensions have these sizes."""
        launch = self.launch
        return {
            "grid": tuple(x.at(sizes) for x in (launch.grid_x, launch.grid_y, launch.grid_z)),
            "block": tuple(x.at(sizes) for x in (launch.block_x, launch.block_y, launch.block_z)),
            "shared": (launch.shared_mem.at(sizes),),
            "scalars": tuple(x.at(sizes) for x in self.scalars),
            **{str(i): tuple(n.at(sizes) for n in shape) for i, (_, shape) in enumerate(self.outputs)},
        }


def build(module: Module, plugin_id: str, inputs: Sequence[tuple[str, Sequence[int | str]]]) -> Built:
    """What TensorRT does with a node of the plugin.

    Args:
        module: the double.
        plugin_id: namespace and name.
        inputs: type and shape of each input; dimensions that are letters are dynamic.
    """
    definition = module.definitions[plugin_id]
    types = [DataType[dtype] for dtype, _ in inputs]
    fake = [TensorDesc(t, tuple(ShapeExpr() for _ in shape)) for t, (_, shape) in zip(types, inputs, strict=True)]
    dtypes = [output.dtype for output in definition.register(*fake)]
    known = [
        TensorDesc(t, tuple(ShapeExpr(n if isinstance(n, int) else (lambda sizes, n=n: sizes[n])) for n in shape))
        for t, (_, shape) in zip(types, inputs, strict=True)
    ]
    outputs = definition.register(*known)
    assert [o.dtype for o in outputs] == dtypes
    assert len(outputs) == definition.outputs
    assert definition.autotune is not None
    assert definition.aot_impl is not None
    combinations = [c for found in definition.autotune(*known, outputs) for c in found.all]
    if [*types, *dtypes] not in combinations:
        raise ValueError(f"no combination of types fits {types}")
    name, ptx, launch, scalars = definition.aot_impl(*known, outputs, 0)
    assert isinstance(name, str)
    assert isinstance(ptx, str)
    assert isinstance(launch, KernelLaunchParams)
    assert isinstance(scalars, SymIntExprs)
    return Built([(o.dtype, o.shape_expr) for o in outputs], name, ptx, launch, scalars)
