"""A double of the part of TensorRT's modules that runs engines: what it enqueues is the artifact's ONNX graph, computed
by ONNX Runtime on the CPU in the memory of `cuda_double.Driver`. So a session over it is compared bit for bit.

It has only names that the stubs of TensorRT 10.13 and `tensorrt_rtx` document (test_trt_names compares them), and it
holds the caller to what they say: every address and every dynamic shape is set before a run, scratch memory is large
enough, and nothing is captured that has not run before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import cuda_double
import numpy as np
import onnx
import pytest

from rwkv_edge.artifact import Artifact, FileEntry, sha256_of, write_manifest
from rwkv_edge.engines import ENGINE_BACKENDS, EngineEntry
from rwkv_edge.runtime.ort_graph import ONNX_TYPE, open_graph
from rwkv_edge.runtime.ort_providers import CPU

MAGIC = b"engine "
SCRATCH = 1000
TYPES = {1: "FLOAT", 10: "HALF", 16: "BF16", 7: "INT64"}
DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32"}

Port = tuple[str, str, tuple[int, ...]]


def add_engines(folder: Path, backend: str = "tensorrt", most: int = 8, sample_k: int = 0, **changed: Any) -> Artifact:
    """Give an artifact engines that `RuntimeDouble` runs, one a graph for GPUs; ``changed`` goes into their entries."""
    artifact = Artifact.open(folder)
    manifest = artifact.manifest
    engines, files = [], dict(manifest.files)
    for graph in manifest.graphs:
        if graph.target not in ("gpu", "any"):
            continue
        entry = EngineEntry(
            f"{Path(graph.file).stem}.engine", graph.file, graph.kind, graph.tokens, manifest.spec.batch or most,
            backend, "10.13.3.9", ("sm90",), graph.wkv, manifest.model_hash, 1.0,
        )  # fmt: skip
        entry = replace(entry, sample_k=sample_k if graph.kind == "step" else 0, **changed)
        path = folder / entry.file
        text = json.dumps({"graph": str(folder / graph.file), "entry": asdict(entry)})
        path.write_bytes(MAGIC + text.encode() + b"\nend")
        files[entry.file] = FileEntry(path.stat().st_size, sha256_of(path))
        engines.append(entry)
    write_manifest(folder, replace(manifest, engines=tuple(engines), files=files))
    return Artifact.open(folder)


class Member:
    """Of an enumeration."""

    def __init__(self, name: str) -> None:
        self.name = name


def ports_of(graph: str) -> dict[str, Port]:
    """Inputs and outputs of an ONNX graph as an engine has them."""
    model = onnx.load(graph, load_external_data=False).graph
    found: dict[str, Port] = {}
    for mode, values in (("INPUT", model.input), ("OUTPUT", model.output)):
        for value in values:
            tensor = value.type.tensor_type
            shape = tuple(-1 if dim.dim_param else dim.dim_value for dim in tensor.shape.dim)
            found[value.name] = (mode, TYPES[tensor.elem_type], shape)
    return found


class ICudaEngine:
    __slots__ = ("_file", "_module", "_ports", "_session")

    def __init__(self, module: RuntimeDouble, file: dict[str, Any]) -> None:
        self._module, self._file, self._ports = module, file, ports_of(file["graph"])
        if count := file["entry"]["sample_k"]:
            batch = self._ports["logits"][2][0]
            self._ports["candidates.logits"] = ("OUTPUT", "FLOAT", (batch, count))
            self._ports["candidates.tokens"] = ("OUTPUT", "INT32", (batch, count))
            self._ports["candidates.norm"] = ("OUTPUT", "FLOAT", (batch, 1))
        self._session = open_graph(Path(file["graph"]), [(CPU, {})], module.threads, None)
        module.change_ports(self._ports)

    @property
    def num_io_tensors(self) -> int:
        return len(self._ports)

    @property
    def device_memory_size_v2(self) -> int:
        return SCRATCH

    def get_tensor_name(self, index: int) -> str:
        return list(self._ports)[index]

    def get_tensor_mode(self, name: str) -> Member:
        return Member(self._ports[name][0])

    def get_tensor_dtype(self, name: str) -> Member:
        return Member(self._ports[name][1])

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        return list(self._ports[name][2])

    def create_execution_context(self, strategy: Any) -> IExecutionContext | None:
        assert strategy is self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        self._module.contexts += 1
        return None if self._module.fails == "context" else IExecutionContext(self, self._module)


class IExecutionContext:
    __slots__ = ("_addresses", "_engine", "_module", "_scratch", "_shapes", "_warm")

    def __init__(self, engine: ICudaEngine, module: RuntimeDouble) -> None:
        self._engine, self._module, self._warm = engine, module, False
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self._shapes = {name: port[2] for name, port in engine._ports.items()}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        _, _, known = self._engine._ports[name]
        most = self._engine._file["entry"]["batch"]
        if len(shape) != len(known) or any(k not in (-1, n) for k, n in zip(known, shape, strict=True)):
            return False
        if shape[0] > most:
            self._module.log("IExecutionContext::setInputShape: Error Code 3: not in the profile")
            return False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % 256 == 0
        assert name in self._engine._ports
        self._addresses[name] = memory
        return self._module.fails != "address"

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        self._scratch = (memory, size)

    def execute_async_v3(self, stream_handle: int) -> bool:
        driver = cuda_double.Driver.streams[stream_handle]
        fails, recording = self._module.fails, driver.recording is not None
        batch = {shape[0] for name, shape in self._shapes.items() if self._engine._ports[name][0] == "INPUT"}
        assert len(batch) == 1
        assert batch != {-1}, "a dynamic shape was not set"
        assert set(self._addresses) == set(self._engine._ports), "a tensor has no memory"
        assert self._scratch[1] >= SCRATCH
        driver.memory(*self._scratch)
        if fails == "enqueue" or (recording and (fails == "capture" or not self._warm)):
            self._module.log("IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (operation not permitted)")
            return False
        if recording and fails == "capture writes":  # to the state, at once, and what no graph can hold
            for name, (mode, dtype, shape) in self._engine._ports.items():
                if mode == "INPUT" and dtype != "INT64":
                    driver.view(self._addresses[name], (*batch, *shape[1:]), DTYPES[dtype])[...] = 1
            return False
        self._warm = True
        driver.enqueue(lambda: self._run(driver, *batch))
        return True

    def _run(self, driver: cuda_double.Driver, batch: int) -> None:
        binding = self._engine._session.io_binding()
        self._module.runs += 1
        for name, (mode, dtype, shape) in self._engine._ports.items():
            if name.startswith("candidates."):
                continue
            bind = binding.bind_input if mode == "INPUT" else binding.bind_output
            array = driver.view(self._addresses[name], (batch, *shape[1:]), DTYPES[dtype])
            bind(name, "cpu", 0, ONNX_TYPE[DTYPES[dtype]], list(array.shape), array.ctypes.data)
        self._engine._session.run_with_iobinding(binding)
        if self._module.wrong:
            driver.view(self._addresses["logits"], (batch,))[...] += 1000
        if self._engine._file["entry"]["sample_k"]:
            self._find_candidates(driver, batch)

    def _find_candidates(self, driver: cuda_double.Driver, batch: int) -> None:
        """What the layers of `rwkv_edge.exporters.trt_candidates` compute."""
        count = self._engine._file["entry"]["sample_k"]
        logits = driver.view(self._addresses["logits"], (batch, self._engine._ports["logits"][2][1]))
        order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
        peak = logits.max(1, keepdims=True)
        found = {
            "candidates.logits": (np.take_along_axis(logits, order, 1), "float32"),
            "candidates.tokens": (order, "int32"),
            "candidates.norm": (np.log(np.exp(logits - peak).sum(1, keepdims=True)) + peak, "float32"),
        }
        for name, (values, dtype) in found.items():
            driver.view(self._addresses[name], values.shape, dtype)[...] = values


class RuntimeDouble:
    """The module; ``runs`` counts runs of engines, ``contexts`` those that were made.

    Args:
        version: what it says of itself.
        threads: of ONNX Runtime.
        fails: where it fails: 'start', 'load', 'context', 'address', 'enqueue', 'capture' or 'capture writes'.
        ports: changes of what engines say of their tensors; None takes one away.
        wrong: logits are not those of the graph.
    """

    def __init__(
        self,
        version: str = "10.13.3.9",
        threads: int = 1,
        fails: str = "",
        ports: dict[str, Port | None] | None = None,
        wrong: bool = False,
    ) -> None:
        self.__version__, self.threads, self.fails, self.wrong = version, threads, fails, wrong
        self.runs = self.contexts = 0
        self._changes = ports or {}
        self.loggers: list[Any] = []
        severity = IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])
        self.ILogger = type("ILogger", (), {"__init__": lambda self: None, "Severity": severity})
        self.ExecutionContextAllocationStrategy = IntEnum(
            "ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"], start=0
        )
        self.Runtime = _runtime(self)

    def change_ports(self, ports: dict[str, Port]) -> None:
        for name, port in self._changes.items():
            if port is None:
                del ports[name]
            else:
                ports[name] = port

    def log(self, message: str) -> None:
        for logger in self.loggers:
            logger.log(self.ILogger.Severity.ERROR, message)

    def install(self, patch: pytest.MonkeyPatch, backend: str = "tensorrt", capability: Any = (9, 0)) -> RuntimeDouble:
        """Be the backend's module, on a GPU of numpy."""
        patch.setitem(sys.modules, ENGINE_BACKENDS[backend].module, self)  # type: ignore[arg-type]
        patch.setattr("rwkv_edge.runtime.tensorrt.Driver", cuda_double.Driver)
        patch.setattr("rwkv_edge.runtime.tensorrt.device_capability", lambda ordinal=0: capability)
        return self


def _runtime(module: RuntimeDouble) -> type:
    class Runtime:
        __slots__ = ("engine_host_code_allowed",)

        def __init__(self, logger: Any) -> None:
            self.engine_host_code_allowed = False
            module.loggers = [logger]
            if module.fails == "start":
                module.log("createInferRuntime: Error Code 6: CUDA initialization failure: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
            data = bytes(memoryview(serialized_engine))
            if module.fails == "load" or not (data.startswith(MAGIC) and data.endswith(b"end")):
                module.log("IRuntime::deserializeCudaEngine: Error Code 1: Serialization (no engine)")
                return None
            file = json.loads(data[len(MAGIC) : -3])
            if file["entry"]["version_compatible"] and not self.engine_host_code_allowed:
                module.log("IRuntime::deserializeCudaEngine: Error Code 3: engineHostCodeAllowed is false")
                return None
            return ICudaEngine(module, file)

    return Runtime
