"""The part of TensorRT's Python module that builds engines, as types.

`tensorrt-stubs` 10.13 describes all of it, but mypy cannot use that: it has no py.typed marker, and five of its
signatures are not Python. So this is what the adapter needs, and tests compare it name by name with those stubs
(TensorRT 10.13) and with the module `tensorrt_rtx` itself (1.7). No other version was at hand: what differs between
them is in the docstrings of `rwkv_edge.exporters.trt_adapter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class HostMemory(Protocol):
    """IHostMemory: memory of the library, readable through the buffer protocol."""

    @property
    def nbytes(self) -> int:
        """Its size."""
        ...

    def __buffer__(self, flags: int, /) -> memoryview:
        """A view of it."""
        ...


class Member(Protocol):
    """A value of one of the enumerations."""

    @property
    def name(self) -> str:
        """As in the enumeration: 'BF16'."""
        ...

    def __int__(self) -> int: ...


class Tensor(Protocol):
    """ITensor; its name is that in the ONNX graph, and can be changed."""

    name: str

    @property
    def dtype(self) -> Member:
        """A DataType."""
        ...

    @property
    def shape(self) -> Sequence[int]:
        """-1 for the dynamic axes."""
        ...


class Layer(Protocol):
    """ILayer."""

    @property
    def type(self) -> Member:
        """A LayerType."""
        ...

    @property
    def num_outputs(self) -> int:
        """Number of outputs."""
        ...

    def get_output(self, index: int) -> Tensor:
        """An output."""
        ...


class NetworkDefinition(Protocol):
    """INetworkDefinition."""

    @property
    def num_inputs(self) -> int:
        """Number of inputs."""
        ...

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        ...

    @property
    def num_outputs(self) -> int:
        """Number of outputs."""
        ...

    def get_input(self, index: int) -> Tensor:
        """An input."""
        ...

    def get_layer(self, index: int) -> Layer:
        """A layer."""
        ...

    def get_output(self, index: int) -> Tensor:
        """An output."""
        ...

    def add_topk(self, input: Tensor, op: Member, k: int, axes: int) -> Layer | None:
        """The k largest or smallest along the one axis of a bit mask: values, and int32 places."""
        ...

    def add_reduce(self, input: Tensor, op: Member, axes: int, keep_dims: bool) -> Layer | None:
        """A ReduceOperation over the axes of a bit mask."""
        ...

    def add_unary(self, input: Tensor, op: Member) -> Layer | None:
        """A UnaryOperation."""
        ...

    def add_elementwise(self, input1: Tensor, input2: Tensor, op: Member) -> Layer | None:
        """An ElementWiseOperation, with broadcasting."""
        ...

    def mark_output(self, tensor: Tensor) -> None:
        """Make a tensor an output."""
        ...


class OptimizationProfile(Protocol):
    """IOptimizationProfile."""

    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:
        """Range of an input's shape."""
        ...


class TimingCache(Protocol):
    """ITimingCache."""

    def serialize(self) -> HostMemory:
        """Its content."""
        ...


class BuilderConfig(Protocol):
    """IBuilderConfig."""

    builder_optimization_level: int
    progress_monitor: Any

    def set_flag(self, flag: Member) -> None:
        """Set a BuilderFlag."""
        ...

    def clear_flag(self, flag: Member) -> None:
        """Clear a BuilderFlag."""
        ...

    def set_memory_pool_limit(self, pool: Member, pool_size: int) -> None:
        """Limit a pool, in bytes."""
        ...

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        """Add a profile; returns its index, negative where it is invalid."""
        ...

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None:
        """A cache with this content."""
        ...

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        """Use a cache; False where it is of another device or version."""
        ...

    def get_timing_cache(self) -> TimingCache | None:
        """The cache in use."""
        ...


class RtxBuilderConfig(BuilderConfig, Protocol):
    """What IBuilderConfig has in `tensorrt_rtx` only."""

    num_compute_capabilities: int

    def set_compute_capability(self, compute_capability: Member, index: int) -> bool:
        """Set one of the GPUs to build for."""
        ...


class ParserError(Protocol):
    """What the parser has against a node."""

    def desc(self) -> str:
        """What is wrong."""
        ...

    def node_name(self) -> str:
        """The node."""
        ...

    def node_operator(self) -> str:
        """Its operator."""
        ...

    def local_function_stack(self) -> list[str]:
        """The local functions around it, outermost first."""
        ...


class OnnxParser(Protocol):
    """OnnxParser; the weights of the network belong to it."""

    @property
    def num_errors(self) -> int:
        """Number of errors."""
        ...

    def parse_from_file(self, model: str) -> bool:
        """Parse a graph and the weights beside it."""
        ...

    def get_error(self, index: int) -> ParserError:
        """An error."""
        ...


class Builder(Protocol):
    """Builder."""

    def create_network(self, flags: int = 0) -> NetworkDefinition:
        """An empty network."""
        ...

    def create_builder_config(self) -> BuilderConfig:
        """A configuration."""
        ...

    def create_optimization_profile(self) -> OptimizationProfile:
        """A profile for dynamic shapes."""
        ...

    def build_serialized_network(self, network: NetworkDefinition, config: BuilderConfig) -> HostMemory | None:
        """The engine; None where the build failed."""
        ...
