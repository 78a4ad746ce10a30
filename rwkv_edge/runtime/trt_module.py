"""The part of TensorRT's Python modules that runs engines: as types, and loaded.

The types are compared name by name with the stubs of TensorRT 10.13 and with the module `tensorrt_rtx` 1.7 itself. No
engine was ever run here: TensorRT cannot be installed, and TensorRT for RTX knows none of the GPUs at hand.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from rwkv_edge.engines import Backend, error_log, one_line, reason_of
from rwkv_edge.errors import ArtifactError, MissingDependencyError, SessionError


class Member(Protocol):
    """A value of one of the enumerations."""

    @property
    def name(self) -> str:
        """As in the enumeration: 'FLOAT'."""
        ...


class ExecutionContext(Protocol):
    """IExecutionContext: one binding of an engine to memory."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Give an input with dynamic axes its shape; False where the profile does not hold it."""
        ...

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Device memory of an input or output."""
        ...

    def set_device_memory(self, memory: int, size: int) -> None:
        """Scratch memory, at a multiple of 256 bytes."""
        ...

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Enqueue a run; False where that failed."""
        ...


class CudaEngine(Protocol):
    """ICudaEngine."""

    @property
    def num_io_tensors(self) -> int:
        """Number of inputs and outputs."""
        ...

    @property
    def device_memory_size_v2(self) -> int:
        """Bytes of scratch memory that a context needs."""
        ...

    def get_tensor_name(self, index: int) -> str:
        """Name of an input or output."""
        ...

    def get_tensor_mode(self, name: str) -> Member:
        """A TensorIOMode: INPUT or OUTPUT."""
        ...

    def get_tensor_dtype(self, name: str) -> Member:
        """A DataType."""
        ...

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        """-1 for the dynamic axes."""
        ...

    def create_execution_context(self, strategy: Member) -> ExecutionContext | None:
        """A context, whose scratch memory is as ``strategy`` says: an ExecutionContextAllocationStrategy."""
        ...


class Runtime(Protocol):
    """Runtime."""

    engine_host_code_allowed: bool

    def deserialize_cuda_engine(self, serialized_engine: mmap.mmap) -> CudaEngine | None:
        """An engine from the bytes of its file."""
        ...


def load_module(backend: Backend) -> Any:
    """The Python module of a backend.

    Raises:
        MissingDependencyError: it is not installed, or only its types are (`tensorrt-stubs`).
        SessionError: it is installed but cannot be loaded.
    """
    try:
        module = import_module(backend.module)
    except ModuleNotFoundError:
        module = None
    except (ImportError, OSError, RuntimeError) as error:
        raise SessionError(
            f"{backend.words} is installed but cannot be loaded: {one_line(str(error))}; install it again"
        ) from error
    if not hasattr(module, "Runtime"):
        raise MissingDependencyError(backend.module, backend.extra, "running engines")
    return module


class EngineLoader:
    """The runtime of one backend, and what it has against an engine.

    Attributes:
        trt: the module.
        words: the backend in a sentence, with its version.
    """

    def __init__(self, backend: Backend, trt: Any) -> None:
        """Start the runtime.

        Raises:
            SessionError: it does not start.
        """
        self.trt, self.words = trt, f"{backend.words} {trt.__version__}"
        self._log = error_log(trt)
        self._log.errors.clear()
        try:
            self._runtime: Runtime = trt.Runtime(self._log)
        except (TypeError, RuntimeError) as error:  # pybind11's factory returned nothing
            raise SessionError(f"{self.words} cannot start: {self.reason(error)}; check the GPU's driver") from error

    def load(self, path: Path, host_code: bool = False) -> CudaEngine:
        """The engine in a file, read where it is mapped: engines of many GB need no second copy.

        Args:
            path: the file.
            host_code: it brings its runtime along, as version-compatible engines do, which no other may.

        Raises:
            ArtifactError: the file cannot be read.
            SessionError: it holds no engine for this runtime.
        """
        self._log.errors.clear()
        self._runtime.engine_host_code_allowed = host_code
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                engine = self._runtime.deserialize_cuda_engine(mapped)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise ArtifactError(f"{path} cannot be read ({error}); run 'rwkv-edge build' again") from error
        if engine is None:
            raise SessionError(f"{self.words} cannot load {path}: {self.reason()}; run 'rwkv-edge build' again")
        return engine

    def context(self, engine: CudaEngine, name: str) -> ExecutionContext:
        """A context of an engine whose scratch memory the caller provides.

        Raises:
            SessionError: it cannot be made.
        """
        context = engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise SessionError(f"{self.words} cannot run {name}: {self.reason()}; is the GPU's memory full?")
        return context

    def reason(self, error: Exception | None = None) -> str:
        """The library's first error since it was last asked, else the exception's words."""
        words = reason_of(self._log, error)
        self._log.errors.clear()
        return words
