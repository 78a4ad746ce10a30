"""Sessions over ONNX Runtime."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rwkv_edge.artifact import MANIFEST, Artifact, GraphEntry
from rwkv_edge.errors import ArtifactError, RwkvEdgeError
from rwkv_edge.runtime.initial import initial_arrays
from rwkv_edge.runtime.ort_graph import (
    CPU,
    OrtGraph,
    SharedWeights,
    checked_graph,
    checked_providers,
    onnxruntime_module,
    open_graph,
    spec_of,
)
from rwkv_edge.runtime.ort_state import OrtState
from rwkv_edge.runtime.session import (
    Watch,
    checked_batch,
    checked_tokens,
    chunk_plan,
    named_from_stored,
    stored_from_named,
)
from rwkv_edge.spec import ModelSpec, stored_from_float32

WEIGHTS_FILE = "weights.bin"
INDEX_FILE = "weights.json"


class OrtSession:
    """`rwkv_edge.runtime.session.Session` over ONNX Runtime.

    The graphs of chunks are opened when a prompt first needs them. In fp32 on the CPU they stay open, since all graphs
    read the same mapped weights. In half precisions that provider widens the weights for every graph; there they are
    dropped after the prompt, so that decoding holds one copy.
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
        self._providers, self._threads, self._prepack = checked_providers(providers), threads, prepack
        self._target = "cpu" if self._providers[0] == CPU else "gpu"
        self._artifact: Artifact | None = artifact
        self.spec = artifact.manifest.spec
        self.model_hash: str | None = artifact.manifest.model_hash
        initial = artifact.manifest.initial_state
        self.initial_hash = None if initial is None else artifact.manifest.files[initial].sha256
        step = artifact.graph("step", self._target)
        if check_content:  # small files first: a damaged graph can crash the parser
            artifact.check_content(*(name for name in artifact.exported_files if name != WEIGHTS_FILE))
        check = _ContentCheck(artifact) if check_content else None
        try:
            self._weights = self._shared_weights(artifact)
            self._step = self._open(step)
        finally:
            if check is not None:
                check.join()  # a damaged file explains what the backend says about it
        if spec_of(self._step.session, artifact.path / step.file) != self.spec:
            raise ArtifactError(
                f"{artifact.path / MANIFEST} describes another model than {step.file}; export the checkpoint again"
            )
        self._start = initial_arrays(artifact)
        self._chunks: dict[str, OrtGraph] = {}
        self._keep_chunks = self._target != "cpu" or self.spec.precision == "fp32"

    def initial_state(self, batch: int = 1) -> OrtState:
        """See `Session.initial_state`, as for all that follows."""
        checked_batch(batch, self.spec)
        stored = {}
        for t in self.spec.state:
            value = np.full(t.shape, t.fill, np.float32) if t.name not in self._start else self._start[t.name]
            stored[t.name] = stored_from_float32(np.repeat(value[None], batch, axis=0), t.dtype)
        return OrtState(self.spec, stored)

    def step(self, tokens: Sequence[int] | np.ndarray, state: OrtState) -> np.ndarray:
        """One token for each stream."""
        return state.run(self._step, checked_tokens(tokens, 1, state.batch, self.spec)).copy()

    def step_rows(self, tokens: Sequence[int] | np.ndarray, state: OrtState) -> np.ndarray:
        """One token for each of the first streams, as many as there are tokens; the others keep their state.

        Theirs stays in the set of tensors that was current, see `OrtState`.
        """
        array = checked_tokens(tokens, 1, len(tokens), self.spec)
        return state.run(self._step, array, len(array)).copy()

    @property
    def chunks(self) -> tuple[int, ...]:
        """Those of the artifact's prefill graphs."""
        return tuple(entry.tokens for entry in self._chunk_entries("prefill"))

    @property
    def numerics(self) -> str:
        """Threads count too: ONNX Runtime splits its sums by them."""
        threads = self._threads or f"{os.cpu_count()} (automatic)"
        name = f"onnxruntime {onnxruntime_module().__version__}, {', '.join(self._providers)}, threads {threads}"
        return f"{name}, prepacked" if self._prepack else name

    def prefill(
        self, tokens: Sequence[Sequence[int]] | np.ndarray, state: OrtState, watch: Watch | None = None
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
                logits = state.run(self._step, array[:, at])
            at += length
            if watch is not None:
                watch(at, logits)
        self._drop_chunks()
        return logits.copy()

    def score(self, tokens: Sequence[Sequence[int]] | np.ndarray, state: OrtState) -> np.ndarray:
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
            logits[:, t] = state.run(self._step, array[:, t])
        self._drop_chunks()
        return logits

    def copy_state(self, state: OrtState) -> OrtState:
        """A state of its own memory."""
        return OrtState(self.spec, {n: a.copy() for n, a in state.sets[state.current].items()})

    def export_state(self, state: OrtState) -> dict[str, np.ndarray]:
        """Copies by name."""
        return named_from_stored(state.sets[state.current], self.spec)

    def import_state(self, arrays: Mapping[str, np.ndarray]) -> OrtState:
        """A state with these values."""
        stored = stored_from_named(arrays, self.spec)
        checked_batch(stored[self.spec.state[0].name].shape[0], self.spec)
        return OrtState(self.spec, stored)

    def close(self) -> None:
        """Drop all graphs and the mapping of the weights."""
        self._chunks.clear()
        for name in ("_step", "_weights"):
            if hasattr(self, name):
                delattr(self, name)

    def _shared_weights(self, artifact: Artifact) -> SharedWeights | None:
        if self._target != "cpu":
            return None  # other providers copy them to their device
        return SharedWeights(artifact.path / INDEX_FILE, artifact.path / WEIGHTS_FILE)

    def _open(self, entry: GraphEntry) -> OrtGraph:
        assert self._artifact is not None
        path = self._artifact.path / entry.file
        prepack = self._prepack and entry.kind == "step"  # a copy of the weights for every graph
        session = open_graph(path, self._providers, self._threads, self._weights, prepack)
        return checked_graph(session, self.spec, path, entry.tokens, entry.kind == "score")

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
        self._providers, self._threads, self._prepack = checked_providers(providers), threads, prepack
        self._target = "cpu" if self._providers[0] == CPU else "gpu"
        self._artifact = None
        self._weights = None
        session = open_graph(path, self._providers, threads, None, prepack)
        self.spec: ModelSpec = spec_of(session, path)
        self.model_hash = None
        self.initial_hash = None
        self._step = checked_graph(session, self.spec, path)
        self._start = {}
        self._chunks = {}
        self._keep_chunks = True


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
