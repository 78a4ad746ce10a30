"""The CUDA driver as the step loop needs it: memory, copies, kernels and graphs on one stream, by cuda-bindings."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from rwkv_edge.errors import MissingDependencyError, SessionError

BLOCK = 64 << 20  # bytes of a weight file that are copied at a time
OWN_SHARED = 48 << 10  # bytes of shared memory that a kernel may use unasked
PROGRAMMATIC_LAUNCH = 90  # compute capability from which kernels may start before the one ahead has ended


class Driver:
    """One GPU, its primary context, and one stream on which everything runs in order.

    Attributes:
        capability: compute capability, 90 for 9.0.
        block_shared: bytes of shared memory that a block may ask for.
        multiprocessors: how many the GPU has.
        name: of the GPU.
    """

    def __init__(self, ordinal: int = 0) -> None:
        """Make the GPU's primary context current.

        Raises:
            MissingDependencyError: cuda-bindings is not installed.
            SessionError: there is no driver or no such GPU.
        """
        self._api = driver = _bindings()
        try:
            self._call("cuInit", 0)
            self._device = self._call("cuDeviceGet", ordinal)
        except (SessionError, RuntimeError) as error:  # RuntimeError: the driver's library is not there
            reason = error if isinstance(error, SessionError) else "no NVIDIA driver was found"
            raise SessionError(
                f"no NVIDIA GPU can be used here ({reason}); without one, models run on --backend onnxruntime"
            ) from error
        self._call("cuCtxSetCurrent", self._call("cuDevicePrimaryCtxRetain", self._device))
        attributes = driver.CUdevice_attribute
        major = self._attribute(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        minor = self._attribute(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        self.capability = major * 10 + minor
        self.block_shared = self._attribute(attributes.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        self.multiprocessors = self._attribute(attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        self.name = self._call("cuDeviceGetName", 96, self._device).decode().partition("\0")[0]
        self._stream = self._call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._configs = self._launch_config(early=False), self._launch_config(early=True)
        self._modules: list[Any] = []
        self._memory: set[int] = set()
        self._pinned: set[int] = set()
        self._graphs: set[Graph] = set()
        self._events: set[Event] = set()
        self._capturing = False
        self._given_up: list[Callable[[], None]] = []

    @property
    def stream(self) -> int:
        """The handle of the stream, for libraries that enqueue on it."""
        return int(self._stream)

    def allocate(self, nbytes: int) -> int:
        """Device memory of ``nbytes`` zeros.

        Raises:
            SessionError: there is not enough.
        """
        pointer = int(self._call("cuMemAlloc", max(nbytes, 16)))
        self._memory.add(pointer)
        self._call("cuMemsetD8Async", pointer, 0, max(nbytes, 16), self._stream)
        return pointer

    def free(self, *pointers: int) -> None:
        """Give memory back, once nothing uses it any more; after `close` there is nothing left to do."""
        if self.waits(partial(self.free, *pointers)):
            return
        if pointers and self._memory.issuperset(pointers):
            self.synchronize()
        for pointer in self._memory.intersection(pointers):
            self._memory.remove(pointer)
            self._call("cuMemFree", pointer)

    def free_memory(self) -> int:
        """Free bytes of the GPU."""
        free, _ = self._calls("cuMemGetInfo")
        return int(free)

    def upload(self, array: np.ndarray, to: int) -> None:
        """Copy a contiguous host array to device memory; it may change as soon as this returns."""
        self._call("cuMemcpyHtoDAsync", to, array.ctypes.data, array.nbytes, self._stream)
        self.synchronize()

    def upload_file(self, data: np.ndarray, to: int) -> None:
        """Copy mapped bytes, a block at a time."""
        for start in range(0, data.nbytes, BLOCK):
            self.upload(np.ascontiguousarray(data[start : start + BLOCK]), to + start)

    def download(self, pointer: int, array: np.ndarray) -> None:
        """Copy device memory into a contiguous host array, after all that was enqueued."""
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, pointer, array.nbytes, self._stream)
        self.synchronize()

    def pinned(self, nbytes: int) -> np.ndarray:
        """Bytes of the host that stay where they are, uint8 [nbytes] zeros, until `free_pinned` or `close`.

        Raises:
            SessionError: there is not enough memory.
        """
        pointer = int(self._call("cuMemHostAlloc", max(nbytes, 1), 0))
        self._pinned.add(pointer)
        array: np.ndarray = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer))
        array[:] = 0
        return array

    def free_pinned(self, *arrays: np.ndarray) -> None:
        """Give pinned bytes back, once nothing uses them any more; after `close` there is nothing left to do."""
        if self.waits(partial(self.free_pinned, *arrays)):
            return
        pointers = self._pinned.intersection(array.ctypes.data for array in arrays)
        if pointers:
            self.synchronize()
        for pointer in pointers:
            self._pinned.remove(pointer)
            self._call("cuMemFreeHost", pointer)

    def enqueue_upload(self, array: np.ndarray, to: int) -> None:
        """Enqueue a copy of contiguous pinned memory to the device; it must not change before that has run."""
        self._call("cuMemcpyHtoDAsync", to, array.ctypes.data, array.nbytes, self._stream)

    def enqueue_download(self, pointer: int, array: np.ndarray) -> None:
        """Enqueue a copy from the device into contiguous pinned memory; `synchronize` before it is read."""
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, pointer, array.nbytes, self._stream)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Enqueue a copy within the device."""
        self._call("cuMemcpyDtoDAsync", to, source, nbytes, self._stream)

    def synchronize(self) -> None:
        """Wait for everything that was enqueued.

        Raises:
            SessionError: a kernel failed.
        """
        self._call("cuStreamSynchronize", self._stream)

    def function(self, ptx: str, name: str, shared: int = 0) -> Any:
        """A kernel compiled by the driver, allowed ``shared`` bytes of dynamic shared memory."""
        module = self._call("cuModuleLoadData", ptx.encode() + b"\0")
        self._modules.append(module)
        function = self._call("cuModuleGetFunction", module, name.encode())
        attributes = self._api.CUfunction_attribute
        if (
            shared + self._call("cuFuncGetAttribute", attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
            > OWN_SHARED
        ):
            self._call(
                "cuFuncSetAttribute", function, attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared
            )
        # kernels that split a processor's memory differently could not run side by side on it
        self._call("cuFuncSetAttribute", function, attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)
        return function

    def launch(
        self, function: Any, grid: Sequence[int], threads: int, shared: int, pointers: Sequence[int], early: bool
    ) -> None:
        """Enqueue a kernel whose arguments are all pointers.

        Args:
            function: from `function`.
            grid: blocks along x, y and z.
            threads: of a block.
            shared: dynamic shared memory in bytes.
            pointers: arguments.
            early: it may start before the kernel ahead of it has ended, and waits for that itself.
        """
        config = self._configs[early and self.capability >= PROGRAMMATIC_LAUNCH]
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.sharedMemBytes = threads, shared
        values = tuple(pointers), (ctypes.c_void_p,) * len(pointers)
        self._call("cuLaunchKernelEx", config, function, values, 0)

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        """Record what is enqueued in the block, instead of running it; the graph is ready after the block."""
        graph = Graph(self)
        mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        self._capturing = True
        try:
            yield graph
        except BaseException:
            self._api.cuStreamEndCapture(self._stream)
            raise
        else:
            recorded = self._call("cuStreamEndCapture", self._stream)
        finally:
            self._capturing = False
            while self._given_up:
                self._given_up.pop(0)()
        graph.executable = self._call("cuGraphInstantiate", recorded, 0)
        self._graphs.add(graph)
        self._call("cuGraphDestroy", recorded)

    def waits(self, release: Callable[[], None]) -> bool:
        """Whether a release must wait for a capture to end, which it would spoil: then it is done afterwards.

        The collector of garbage may drop a state at any moment.
        """
        if self._capturing:
            self._given_up.append(release)
        return self._capturing

    def event(self) -> Event:
        """A mark for the stream; see `Event`."""
        event = Event(self)
        self._events.add(event)
        return event

    def elapsed_ms(self, work: Any) -> float:
        """Milliseconds that the stream took for what ``work()`` enqueues."""
        events = [self._call("cuEventCreate", 0) for _ in range(2)]
        self._call("cuEventRecord", events[0], self._stream)
        work()
        self._call("cuEventRecord", events[1], self._stream)
        self.synchronize()
        elapsed = float(self._call("cuEventElapsedTime", *events))
        for event in events:
            self._call("cuEventDestroy", event)
        return elapsed

    def close(self) -> None:
        """Unload kernels and give the stream and the context back."""
        self.synchronize()
        for graph in tuple(self._graphs):
            graph.close()
        for event in tuple(self._events):
            event.close()
        self.free(*self._memory)
        while self._pinned:
            self._call("cuMemFreeHost", self._pinned.pop())
        for module in self._modules:
            self._call("cuModuleUnload", module)
        self._modules.clear()
        self._call("cuStreamDestroy", self._stream)
        self._call("cuDevicePrimaryCtxRelease", self._device)

    def _launch_config(self, early: bool) -> Any:
        """What launches have in common; making one takes longer than a launch."""
        config = self._api.CUlaunchConfig()
        config.blockDimY, config.blockDimZ, config.hStream = 1, 1, self._stream
        if early:
            attribute = self._api.CUlaunchAttribute()
            attribute.id = self._api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        return config

    def _attribute(self, attribute: Any) -> int:
        return int(self._call("cuDeviceGetAttribute", attribute, self._device))

    def _call(self, name: str, *arguments: Any) -> Any:
        """The one value, or None, that a call of the driver gives."""
        values = self._calls(name, *arguments)
        return values[0] if values else None

    def _calls(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        status, *values = getattr(self._api, name)(*arguments)
        if int(status) != 0:
            raise SessionError(_sentence(name, status.name))
        return tuple(values)


def device_capability(ordinal: int = 0) -> tuple[int, int] | None:
    """Compute capability of a GPU, (8, 7) for sm87, without a context on it; None where there is no driver or no GPU.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
    """
    driver = _bindings()
    names = driver.CUdevice_attribute
    try:
        status, *_ = driver.cuInit(0)
        found, device = driver.cuDeviceGet(ordinal)
        if int(status) or int(found):
            return None
        major = driver.cuDeviceGetAttribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = driver.cuDeviceGetAttribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    except RuntimeError:  # the driver's library is not there
        return None
    return None if int(major[0]) or int(minor[0]) else (int(major[1]), int(minor[1]))


class Graph:
    """Kernels and copies that are enqueued with one call."""

    def __init__(self, driver: Driver) -> None:
        self.executable: Any = None
        self._driver = driver

    def launch(self) -> None:
        """Enqueue all of it."""
        self._driver._call("cuGraphLaunch", self.executable, self._driver._stream)

    def close(self) -> None:
        """Give its memory back."""
        if self.executable is not None and not self._driver.waits(self.close):
            self._driver._call("cuGraphExecDestroy", self.executable)
            self._driver._graphs.discard(self)
            self.executable = None


class Event:
    """A mark on the stream: the host can wait until everything before it has run, while more is enqueued behind it."""

    def __init__(self, driver: Driver) -> None:
        flags = driver._api.CUevent_flags
        self._driver = driver
        self._handle = driver._call(
            "cuEventCreate", int(flags.CU_EVENT_BLOCKING_SYNC) | int(flags.CU_EVENT_DISABLE_TIMING)
        )

    def record(self) -> None:
        """Put the mark behind all that was enqueued."""
        self._driver._call("cuEventRecord", self._handle, self._driver._stream)

    def wait(self) -> None:
        """Wait until the stream has reached the mark.

        Raises:
            SessionError: a kernel failed.
        """
        self._driver._call("cuEventSynchronize", self._handle)

    def close(self) -> None:
        """Give it back; more than once does no harm."""
        if self._handle is not None and not self._driver.waits(self.close):
            self._driver._call("cuEventDestroy", self._handle)
            self._driver._events.discard(self)
            self._handle = None


def _bindings() -> Any:
    """The driver's functions.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingDependencyError("cuda-bindings", "cuda", "running kernels on an NVIDIA GPU") from error
    return driver


def _sentence(call: str, status: str) -> str:
    """What a status of the driver means to a user."""
    known = {
        "CUDA_ERROR_OUT_OF_MEMORY": "the GPU has not enough free memory; close other programs or use a smaller model",
        "CUDA_ERROR_NO_DEVICE": "the driver sees no GPU",
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": (
            "NVRTC is newer than the driver; install the nvidia-cuda-nvrtc of the CUDA that nvidia-smi shows"
        ),
    }
    return f"the CUDA driver answered {status} to {call}" + (f": {known[status]}" if status in known else "")
