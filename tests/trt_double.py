"""A double of the Python module `tensorrt`, which cannot be installed here: it builds nothing, but has only names that
the stubs of TensorRT 10.13 document (tests compare them), and those that a version adds, without those that it lacks.

Its classes take no other attributes than these, as those of pybind11, and it writes down what it was told.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

COMMON_FLAGS = ["DEBUG", "REFIT", "TF32", "STRICT_NANS", "VERSION_COMPATIBLE", "STRIP_PLAN"]
WEAK_FLAGS = ["FP16", "BF16", "INT8", "FP8", "INT4", "OBEY_PRECISION_CONSTRAINTS"]  # gone in TensorRT 11
DATA_TYPES = ["FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "FP8", "BF16", "INT64", "INT4"]
OPERATIONS = {
    "TopKOperation": ["MAX", "MIN"],
    "ReduceOperation": ["SUM", "PROD", "MAX", "MIN", "AVG"],
    "UnaryOperation": ["EXP", "LOG", "SQRT"],
    "ElementWiseOperation": ["SUM", "PROD", "MAX", "MIN", "SUB", "DIV"],
}


class IHostMemory(bytearray):
    """Readable through the buffer protocol."""

    @property
    def nbytes(self) -> int:
        return len(self)


class ITensor:
    __slots__ = ("dtype", "name", "shape")

    def __init__(self, name: str, dtype: Any, shape: Sequence[int]) -> None:
        self.name, self.dtype, self.shape = name, dtype, tuple(shape)


class ILayer:
    __slots__ = ("outputs", "type")

    def __init__(self, kind: str, *dtypes: Any) -> None:
        self.type, self.outputs = SimpleNamespace(name=kind), [ITensor("y", dtype, (1,)) for dtype in dtypes]

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_output(self, index: int) -> ITensor:
        return self.outputs[index]


class INetworkDefinition:
    __slots__ = ("inputs", "layers", "outputs", "types")

    def __init__(self, types: Any) -> None:
        self.types = types
        self.inputs: list[ITensor] = []
        self.layers: list[ILayer] = []
        self.outputs: list[ITensor] = []

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_input(self, index: int) -> ITensor:
        return self.inputs[index]

    def get_layer(self, index: int) -> ILayer:
        return self.layers[index]

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_output(self, index: int) -> ITensor:
        return self.outputs[index]

    def mark_output(self, tensor: ITensor) -> None:
        self.outputs.append(tensor)

    def add_topk(self, input: ITensor, op: Any, k: int, axes: int) -> ILayer | None:
        return self._added("TOPK", input.dtype, self.types.INT32) if k <= 3840 else None

    def add_reduce(self, input: ITensor, op: Any, axes: int, keep_dims: bool) -> ILayer:
        return self._added("REDUCE", input.dtype)

    def add_unary(self, input: ITensor, op: Any) -> ILayer:
        return self._added("UNARY", input.dtype)

    def add_elementwise(self, input1: ITensor, input2: ITensor, op: Any) -> ILayer:
        assert input1.dtype == input2.dtype
        return self._added("ELEMENTWISE", input1.dtype)

    def _added(self, kind: str, *dtypes: Any) -> ILayer:
        self.layers.append(ILayer(kind, *dtypes))
        return self.layers[-1]


class ParserError:
    def desc(self) -> str:
        return "Assertion failed: nobody knows this\n operator."

    def node_name(self) -> str:
        return "node_7"

    def node_operator(self) -> str:
        return "Strange"

    def local_function_stack(self) -> list[str]:
        return ["outer", "inner"]


class ITimingCache:
    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> IHostMemory:
        return IHostMemory(self.data + b"timed;")


class IOptimizationProfile:
    __slots__ = ("shapes",)

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Any, ...]] = {}

    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:
        self.shapes[input] = (min, opt, max)


class IBuilderConfig:
    __slots__ = ("builder_optimization_level", "cache", "flags", "pools", "profiles", "progress_monitor")

    def __init__(self, flags: set[str]) -> None:
        self.flags, self.pools, self.profiles, self.cache = flags, {}, [], None
        self.builder_optimization_level, self.progress_monitor = 3, None

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag.name)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self.pools[pool.name] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile.shapes)
        return 0 if all(shapes[2][0] <= 1024 for shapes in profile.shapes.values()) else -1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        return None if serialized_timing_cache == b"damaged" else ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return ignore_mismatch or cache.data != b"of another GPU"

    def get_timing_cache(self) -> ITimingCache | None:
        return self.cache


class TensorRTDouble:
    """The module. ``told`` holds the last network and its flags, the last config and the number of builds.

    Args:
        version: decides what the module has.
        layers: (LayerType, DataType) names of what the parser makes of any graph.
        fails: where it fails: 'start', 'parse', 'parse without errors' or 'build'.
        missing: names that this version lacks.
    """

    def __init__(
        self,
        version: str = "10.13.3.9",
        layers: Sequence[tuple[str, str]] = (("MATRIX_MULTIPLY", "FLOAT"),),
        fails: str = "",
        missing: Sequence[str] = (),
    ) -> None:
        major, minor = (int(part) for part in re.findall(r"\d+", version)[:2])
        self.__version__ = version
        self.told = SimpleNamespace(network_flags=None, network=None, config=None, builds=0)
        self.DataType = IntEnum("DataType", DATA_TYPES)
        self.BuilderFlag = IntEnum("BuilderFlag", COMMON_FLAGS + (WEAK_FLAGS if major < 11 else []))
        for name, members in OPERATIONS.items():
            setattr(self, name, IntEnum(name, members))
        self.MemoryPoolType = IntEnum("MemoryPoolType", ["WORKSPACE", "TACTIC_DRAM"])
        creation = {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
        creation |= {"PREFER_AOT_PYTHON_PLUGINS": 3} if (major, minor) >= (10, 9) else {}
        self.NetworkDefinitionCreationFlag = IntEnum(
            "NetworkDefinitionCreationFlag", {k: v for k, v in creation.items() if k not in missing}
        )
        self.ILogger = _logger()
        self.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
        for name in missing:
            if hasattr(self, name):
                delattr(self, name)
        self.Builder = _builder(self, fails)
        self.OnnxParser = _parser(self, layers, fails)


def _logger() -> type:
    severity = IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])
    return type("ILogger", (), {"__init__": lambda self: None, "Severity": severity})


def _parser(trt: TensorRTDouble, layers: Sequence[tuple[str, str]], fails: str) -> type:
    class OnnxParser:
        __slots__ = ("network",)

        def __init__(self, network: INetworkDefinition, logger: Any) -> None:
            self.network = network

        @property
        def num_errors(self) -> int:
            return 1 if fails == "parse" else 0

        def get_error(self, index: int) -> ParserError:
            return ParserError()

        def parse_from_file(self, model: str) -> bool:
            batch = -1 if "dynamic" in Path(model).name else 2
            self.network.inputs.append(ITensor("token", trt.DataType.INT64, (batch,)))
            self.network.inputs.append(ITensor("wkv.0", trt.DataType.FLOAT, (batch, 2, 64, 64)))
            self.network.outputs.append(ITensor("logits", trt.DataType.FLOAT, (batch, 65536)))
            self.network.layers += [ILayer(kind, trt.DataType[dtype]) for kind, dtype in layers]
            return not fails.startswith("parse")

    return OnnxParser


def _builder(trt: TensorRTDouble, fails: str) -> type:
    class Builder:
        __slots__ = ("logger",)

        def __init__(self, logger: Any) -> None:
            if fails == "start":
                logger.log(logger.Severity.ERROR, "createInferBuilder: Error Code 6: CUDA initialization failure: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self.logger = logger

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            trt.told.network_flags = flags
            trt.told.network = INetworkDefinition(trt.DataType)
            return trt.told.network

        def create_builder_config(self) -> IBuilderConfig:
            trt.told.config = IBuilderConfig({"TF32"})
            return trt.told.config

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
            trt.told.builds += 1
            self.logger.log(self.logger.Severity.WARNING, "this is no error")
            if fails == "build":
                self.logger.log(self.logger.Severity.INTERNAL_ERROR, "Error Code 2: out of memory.\n")
            return None if fails == "build" or not _goes_on(config.progress_monitor) else IHostMemory(b"engine")

    return Builder


def _goes_on(monitor: Any) -> bool:
    """Four steps in two phases; stops where the monitor says so."""
    if monitor is None:
        return True
    monitor.phase_start("outer", None, 2)
    goes_on = True
    for outer in range(2):
        monitor.phase_start("inner", "outer", 2)
        goes_on = goes_on and all(monitor.step_complete("inner", inner) for inner in range(2))
        monitor.phase_finish("inner")
        goes_on = goes_on and monitor.step_complete("outer", outer)
    monitor.phase_finish("outer")
    return goes_on
