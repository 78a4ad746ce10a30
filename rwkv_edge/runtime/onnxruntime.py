"""Sessions over ONNX Runtime."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_edge.artifact import MANIFEST, Artifact, GraphEntry
from rwkv_edge.errors import ArtifactError, RwkvEdgeError, SessionError
from rwkv_edge.runtime.initial import initial_arrays, stored_initial
from rwkv_edge.runtime.ort_device import CaptureError, DeviceMemory, DeviceState
from rwkv_edge.runtime.ort_graph import OrtGraph, SharedWeights, checked_graph, open_graph, spec_of
from rwkv_edge.runtime.ort_memory import Device
from rwkv_edge.runtime.ort_providers import (
    CPU,
    CUDA,
    NVIDIA,
    checked_providers,
    onnxruntime_module,
    preload_libraries,
    session_providers,
)
from rwkv_edge.runtime.ort_state import OrtState, StreamStates
from rwkv_edge.runtime.session import (
    Watch,
    checked_batch,
    checked_tokens,
    chunk_plan,
    named_from_stored,
    stored_from_named,
)
from rwkv_edge.spec import ModelSpec

WEIGHTS_FILE = "weights.bin"
INDEX_FILE = "weights.json"


class OrtSession:
    """`rwkv_edge.runtime.session.Session` over ONNX Runtime.

    The graphs of chunks are opened when a prompt first needs them. In fp32 on the CPU they stay open, since all graphs
    read the same mapped weights. In half precisions that provider widens the weights for every graph; there they are
    dropped after the prompt, so that decoding holds one copy.

    On NVIDIA's providers states stay in the memory of the GPU; CUDA's reads one copy of the weights in all graphs, and
    captures steps into CUDA graphs. What it cannot capture runs without, which one warning says. In bfloat16 it has
    kernels for all operators of the graphs, so it runs them as they are, not their widened twins.
    """

    def __init__(
        self,
        artifact: Artifact,
        providers: Sequence[str] | None = None,
        threads: int = 0,
        check_content: bool = True,
        prepack: bool = False,
    ) -> None:
        """See `rwkv_edge.runtime.session.open_session`."""
        quantized = artifact.manifest.quantization is not None  # its products are made for weights in another order
        self._choose(providers, threads, prepack or quantized)
        self._artifact: Artifact | None = artifact
        self.spec = artifact.manifest.spec
        self.model_hash: str | None = artifact.manifest.model_hash
        initial = artifact.manifest.initial_state
        self.initial_hash = None if initial is None else artifact.manifest.files[initial].sha256
        self._step_path = artifact.path / artifact.graph("step", self._target).file
        if check_content:  # small files first: a damaged graph can crash the parser
            artifact.check_content(*(name for name in artifact.exported_files if name != WEIGHTS_FILE))
        check = _ContentCheck(artifact) if check_content else None
        try:
            self._weights = self._shared_weights(artifact)
            session = self._step_session(self._step_path, self.spec.precision)
        finally:
            if check is not None:
                check.join()  # a damaged file explains what the backend says about it
        if spec_of(session, self._step_path) != self.spec:
            raise ArtifactError(
                f"{artifact.path / MANIFEST} describes another model than {self._step_path.name}; "
                "export the checkpoint again"
            )
        self._step = checked_graph(session, self.spec, self._step_path, captured=self._captures)
        self._start = initial_arrays(artifact)
        self._chunks: dict[str, OrtGraph] = {}
        self._keep_chunks = self._target != "cpu" or self.spec.precision == "fp32"
        self._memory = self._state_memory()

    def _choose(self, providers: Sequence[str] | None, threads: int, prepack: bool) -> None:
        """What does not depend on the model."""
        self._providers, self._threads, self._prepack = checked_providers(providers), threads, prepack
        first = self._providers[0]
        self._target = "cpu" if first.name == CPU else "gpu"
        self._captures = first.captures
        self._device = Device("cuda", first.device_id) if first.name in NVIDIA else None
        if self._device is not None:
            preload_libraries()

    def initial_state(self, batch: int = 1) -> StreamStates:
        """See `Session.initial_state`, as for all that follows."""
        checked_batch(batch, self.spec)
        return self._state_of(stored_initial(self.spec, self._start, batch))

    def step(self, tokens: Sequence[int] | np.ndarray, state: StreamStates) -> np.ndarray:
        """One token for each stream."""
        return self._stepped(state, checked_tokens(tokens, 1, state.batch, self.spec)).copy()

    def step_rows(self, tokens: Sequence[int] | np.ndarray, state: StreamStates) -> np.ndarray:
        """One token for each of the first streams, as many as there are tokens; the others keep their state.

        Theirs stays in the set of tensors that was current, see `OrtState`.
        """
        array = checked_tokens(tokens, 1, len(tokens), self.spec)
        return self._stepped(state, array, len(array)).copy()

    @property
    def chunks(self) -> tuple[int, ...]:
        """Those of the artifact's prefill graphs."""
        return tuple(entry.tokens for entry in self._chunk_entries("prefill"))

    @property
    def numerics(self) -> str:
        """Threads count too: ONNX Runtime splits its sums by them."""
        threads = self._threads or f"{os.cpu_count()} (automatic)"
        providers = ", ".join(map(str, self._providers))
        name = f"onnxruntime {onnxruntime_module().__version__}, {providers}, threads {threads}"
        return f"{name}, prepacked" if self._prepack else name

    def prefill(
        self,
        tokens: Sequence[Sequence[int]] | np.ndarray,
        state: StreamStates,
        watch: Watch | None = None,
    ) -> np.ndarray:
        """Largest chunks first, then smaller ones, then single steps."""
        array = checked_tokens(tokens, 2, state.batch, self.spec)
        graphs = {entry.tokens: entry for entry in self._chunk_entries("prefill")}
        at = 0
        logits = np.empty(0, np.float32)
        for length in chunk_plan(array.shape[1], tuple(graphs)):
            if length in graphs:
                logits = state.run(self._chunk(graphs[length]), array[:, at : at + length])
            else:
                logits = self._stepped(state, array[:, at])
            at += length
            if watch is not None:
                watch(at, logits)
        self._drop_chunks()
        return logits.copy()

    def score(self, tokens: Sequence[Sequence[int]] | np.ndarray, state: StreamStates) -> np.ndarray:
        """Chunks that give all logits where the artifact has them, then single steps."""
        array = checked_tokens(tokens, 2, state.batch, self.spec)
        logits = np.empty((*array.shape, self.spec.vocab_size), np.float32)
        at = 0
        for entry in self._chunk_entries("score"):
            while array.shape[1] - at >= entry.tokens:
                part = slice(at, at + entry.tokens)
                logits[:, part] = state.run(self._chunk(entry), array[:, part])
                at += entry.tokens
        for t in range(at, array.shape[1]):
            logits[:, t] = self._stepped(state, array[:, t])
        self._drop_chunks()
        return logits

    def copy_state(self, state: StreamStates) -> StreamStates:
        """A state of its own memory."""
        return state.copy()

    def export_state(self, state: StreamStates) -> dict[str, np.ndarray]:
        """Copies by name."""
        return named_from_stored(state.arrays(), self.spec)

    def import_state(self, arrays: Mapping[str, np.ndarray]) -> StreamStates:
        """A state with these values."""
        stored = stored_from_named(arrays, self.spec)
        checked_batch(stored[self.spec.state[0].name].shape[0], self.spec)
        return self._state_of(stored)

    def keep_chunks(self) -> None:
        """Never drop the graphs of chunks from now on: for very many prompts, at the price of memory."""
        self._keep_chunks = True

    def close(self) -> None:
        """Drop all graphs and the weights."""
        self._chunks.clear()
        if self._memory is not None:
            self._memory.close()
        for name in ("_step", "_weights"):
            if hasattr(self, name):
                delattr(self, name)

    def _shared_weights(self, artifact: Artifact) -> SharedWeights | None:
        if self._providers[0].name not in (CPU, CUDA) or artifact.manifest.quantization is not None:
            return None  # others, and products of quantized weights, keep their own copy, in their own form
        return SharedWeights(artifact.path / INDEX_FILE, artifact.path / WEIGHTS_FILE, self._device)

    def _state_memory(self) -> DeviceMemory | None:
        return None if self._device is None else DeviceMemory(self.spec, self._device)

    def _state_of(self, stored: dict[str, np.ndarray]) -> StreamStates:
        """A state with these values, where the session computes."""
        return OrtState(self.spec, stored) if self._memory is None else DeviceState(self._memory, stored)

    def _stepped(self, state: StreamStates, tokens: np.ndarray, rows: int | None = None) -> np.ndarray:
        """One token for the first streams; without CUDA graphs from now on, if they turn out to be impossible."""
        try:
            return state.run(self._step, tokens, rows)
        except CaptureError as error:
            self._no_capture(error)
        del self._step  # and its stream: nothing can be opened on the device while that may still capture
        session = self._open_step(self._step_path, self.spec.precision)
        self._step = checked_graph(session, self.spec, self._step_path)
        return state.run(self._step, tokens, rows)

    def _open(self, entry: GraphEntry) -> OrtGraph:
        assert self._artifact is not None
        path = self._artifact.path / entry.file
        providers = session_providers(self._providers, self.spec.precision, capture=False)
        prepack = self._artifact.manifest.quantization is not None  # else each would copy the weights
        session = open_graph(path, providers, self._threads, self._weights, prepack)
        return checked_graph(session, self.spec, path, entry.tokens, entry.kind == "score")

    def _step_session(self, path: Path, precision: str) -> Any:
        """ONNX Runtime's session of the step, which captures its runs if it can."""
        if self._captures:
            try:
                return self._open_step(path, precision)
            except SessionError as error:
                if "cannot use the" not in str(error):  # '… the graph capture feature as requested by the user'
                    raise
                self._no_capture(error)
        return self._open_step(path, precision)

    def _open_step(self, path: Path, precision: str) -> Any:
        providers = session_providers(self._providers, precision, self._captures)
        return open_graph(path, providers, self._threads, self._weights, self._prepack)

    def _no_capture(self, error: SessionError) -> None:
        self._captures = False
        warnings.warn(f"steps run without CUDA graphs, which is slower: {error}", RuntimeWarning, stacklevel=2)

    def _chunk_entries(self, kind: str) -> list[GraphEntry]:
        """Graphs of chunks for this target, longest first."""
        graphs = self._artifact.manifest.graphs if self._artifact else ()
        fitting = [g for g in graphs if g.kind == kind and g.target in (self._target, "any")]
        return sorted(fitting, key=lambda g: -g.tokens)

    def _chunk(self, entry: GraphEntry) -> OrtGraph:
        if entry.file not in self._chunks:
            self._chunks[entry.file] = self._open(entry)
        return self._chunks[entry.file]

    def _drop_chunks(self) -> None:
        if not self._keep_chunks:
            self._chunks.clear()


class _BareSession(OrtSession):
    """A session of a graph that lies beside its weights, without a manifest: single steps only."""

    def __init__(self, path: Path, providers: Sequence[str] | None, threads: int, prepack: bool) -> None:
        self._choose(providers, threads, prepack)
        self._artifact = None
        self._weights = None
        self._step_path = path
        session = self._step_session(path, "fp32")
        self.spec: ModelSpec = spec_of(session, path)
        self.model_hash = None
        self.initial_hash = None
        self._step = checked_graph(session, self.spec, path, captured=self._captures)
        self._start = {}
        self._chunks = {}
        self._keep_chunks = True
        self._memory = self._state_memory()


def session_from_graph(
    path: Path, providers: Sequence[str] | None = None, threads: int = 0, prepack: bool = False
) -> OrtSession:
    """A session from a bare step graph, described by its own metadata.

    Raises:
        SessionError: it cannot be opened, or does not describe itself.
    """
    return _BareSession(path, providers, threads, prepack)


class _ContentCheck:
    """`Artifact.check_content` of the weights beside the loading, which reads the same file."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._error: RwkvEdgeError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._artifact.check_content(WEIGHTS_FILE)
        except ArtifactError as error:
            self._error = error

    def join(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error
