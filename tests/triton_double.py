"""What the Triton Inference Server does with a model repository, as far as implicit state goes, in a process.

The sequence batcher with the strategy 'oldest': a request with the start flag gives its sequence the initial state of
the config; steps take the oldest waiting requests, one of each sequence; outputs named as states are the inputs of the
sequence's next request; the end flag, or the idle limit, forgets it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

DTYPES = {"TYPE_FP32": np.float32, "TYPE_FP16": np.float16, "TYPE_INT64": np.int64}


@dataclass
class Request:
    """One token of one sequence."""

    sequence: int
    token: int
    start: bool = False
    end: bool = False
    at: float = 0.0  # seconds


@dataclass
class Refusal(Exception):
    """What the server answers instead."""

    reason: str


class TritonModel:
    """A model of a repository, loaded as the server would."""

    def __init__(self, folder: Path) -> None:
        self.config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        assert self.config.name == folder.name
        place = folder / "1" / self.config.default_model_filename
        path = place / self.config.default_model_filename if place.is_dir() else place
        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._initial = {s.input_name: self._initial_of(s, folder) for s in self.config.sequence_batching.state}
        self._states: dict[int, dict[str, np.ndarray]] = {}
        self._used: dict[int, float] = {}
        self.steps: list[list[int]] = []
        self._check_names_and_shapes()

    def _initial_of(self, state: Any, folder: Path) -> np.ndarray:
        (initial,) = state.initial_state
        assert initial.name
        assert initial.data_type == state.data_type
        assert list(initial.dims) == list(state.dims)
        dtype = DTYPES[model_config_pb2.DataType.Name(initial.data_type)]
        shape = ([1] if self.config.max_batch_size else []) + list(initial.dims)
        if initial.WhichOneof("state_data") == "zero_data":
            return np.zeros(shape, dtype)
        data = (folder / "initial_state" / initial.data_file).read_bytes()
        assert len(data) == np.prod(shape) * np.dtype(dtype).itemsize
        return np.frombuffer(data, dtype).reshape(shape)

    def _check_names_and_shapes(self) -> None:
        """As the backend does: every input and output has one entry, of the graph's shape and type."""
        batch = self.config.max_batch_size > 0
        types = {"tensor(float)": "TYPE_FP32", "tensor(float16)": "TYPE_FP16", "tensor(int64)": "TYPE_INT64"}
        states = self.config.sequence_batching.state
        inputs = [(i.name, i.dims if not i.HasField("reshape") else i.reshape.shape, i) for i in self.config.input]
        inputs += [(s.input_name, s.dims, s) for s in states]
        outputs = [(o.name, o.dims, o) for o in self.config.output] + [(s.output_name, s.dims, s) for s in states]
        for told, found in ((inputs, self._session.get_inputs()), (outputs, self._session.get_outputs())):
            graph = {x.name: x for x in found}
            assert sorted(name for name, _, _ in told) == sorted(graph)
            for name, dims, entry in told:
                shape = list(graph[name].shape)
                assert types[graph[name].type] == model_config_pb2.DataType.Name(entry.data_type), name
                assert isinstance(shape[0], str) == batch, (name, shape)  # a batch axis must have no fixed length
                assert (shape[1:] if batch else shape) == list(dims), (name, shape)

    def answers(self, waiting: list[Request]) -> Iterator[tuple[Request, np.ndarray | Refusal]]:
        """Answers to requests that have arrived in this order, [V] each, step by step."""
        queue = list(waiting)
        while queue:
            chosen: dict[int, Request] = {}
            for request in queue:
                if request.sequence not in chosen and len(chosen) < max(1, self.config.max_batch_size):
                    chosen[request.sequence] = request
            for request in chosen.values():
                queue.remove(request)
            refused = {r.sequence: self._refusal(r) for r in chosen.values()}
            yield from ((chosen[sequence], why) for sequence, why in refused.items() if why)
            yield from self._step([r for r in chosen.values() if not refused[r.sequence]])

    def _refusal(self, request: Request) -> Refusal | None:
        limit = self.config.sequence_batching.max_sequence_idle_microseconds / 1e6
        if request.at - self._used.get(request.sequence, request.at) > limit:
            del self._states[request.sequence]
        if not request.start and request.sequence not in self._states:
            return Refusal(f"sequence {request.sequence} must specify the START flag on the first request")
        return None

    def _step(self, requests: list[Request]) -> Iterator[tuple[Request, np.ndarray]]:
        if not requests:
            return
        self.steps.append([r.sequence for r in requests])
        for r in requests:
            self._used[r.sequence] = r.at
            if r.start:
                self._states[r.sequence] = dict(self._initial)
        feeds = {name: self._batch([self._states[r.sequence][name] for r in requests]) for name in self._initial}
        feeds["token"] = np.array([r.token for r in requests], np.int64)
        names = [s.output_name for s in self.config.sequence_batching.state]
        logits, *after = self._session.run(["logits", *names], feeds)
        for row, r in enumerate(requests):
            rows = slice(row, row + 1)
            states = zip(self.config.sequence_batching.state, after, strict=True)
            self._states[r.sequence] = {s.input_name: a[rows].copy() for s, a in states}
            if r.end:
                del self._states[r.sequence]
            yield r, logits[row]

    @staticmethod
    def _batch(arrays: list[np.ndarray]) -> np.ndarray:
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
