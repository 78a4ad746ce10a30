"""Sessions over engines of TensorRT and TensorRT for RTX: state, tokens and logits stay in the GPU's memory."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from rwkv_edge.artifact import Artifact
from rwkv_edge.engines import (
    CANDIDATE_LOGITS,
    CANDIDATE_NORM,
    CANDIDATE_TOKENS,
    ENGINE_BACKENDS,
    EngineEntry,
    check_engine,
)
from rwkv_edge.errors import ArtifactError, InputError, RwkvEdgeError, SessionError
from rwkv_edge.runtime.candidates import Candidates
from rwkv_edge.runtime.cuda_driver import Driver, device_capability
from rwkv_edge.runtime.initial import initial_arrays, stored_initial
from rwkv_edge.runtime.session import (
    Watch,
    checked_batch,
    checked_tokens,
    chunk_plan,
    named_from_stored,
    stored_from_named,
)
from rwkv_edge.runtime.trt_graph import TrtGraph, open_graph
from rwkv_edge.runtime.trt_module import EngineLoader, load_module
from rwkv_edge.runtime.trt_state import Machine, Ports, TrtState
from rwkv_edge.spec import ModelSpec, numpy_dtype

KINDS = ("step", "prefill", "score")
ROOM_FOR_ENGINE = 1.2  # of its file's size: the weights as they are, activations, what the library takes


class TrtSession:
    """`rwkv_edge.runtime.session.Session` over the engines of an artifact.

    Every engine holds its own weights, so those of chunks are loaded when a prompt first needs them; then they stay.
    One that does not fit the GPU's memory is done without: shorter pieces read the prompt, and one warning says so.
    """

    def __init__(self, artifact: Artifact, backend: str, check_content: bool = True, device: int = 0) -> None:
        """Load the engine of steps.

        Args:
            artifact: with engines of this backend.
            backend: 'tensorrt' or 'tensorrt-rtx'.
            check_content: compare the sha256 of all its engines with the manifest.
            device: ordinal of the GPU.

        Raises:
            ArtifactError: an engine is damaged or missing.
            SessionError: there is no engine; or none for this GPU, this version of the backend, or these weights.
            MissingDependencyError: the backend or cuda-bindings is not installed.
        """
        manifest = artifact.manifest
        self.spec: ModelSpec = manifest.spec
        self.model_hash: str | None = manifest.model_hash
        initial = manifest.initial_state
        self.initial_hash = None if initial is None else manifest.files[initial].sha256
        self._artifact = artifact
        self._entries = engines_of(artifact, backend)
        self._step_entry = self._entries_of("step")[0]
        trt = load_module(ENGINE_BACKENDS[backend])
        capability = device_capability(device)
        for entry in self._entries:
            check_engine(entry, manifest.model_hash, backend, str(trt.__version__), capability)
            check_size(artifact, entry)
        if check_content:
            artifact.check_content(*(entry.file for entry in self._entries), *([initial] if initial else []))
        self._start = initial_arrays(artifact)
        self._driver = Driver(device)
        self._graphs: dict[str, TrtGraph] = {}
        self._told = False  # that an engine did not fit
        try:
            self._loader = EngineLoader(ENGINE_BACKENDS[backend], trt)
            self._machine = Machine(self._driver, self._loader, self.spec)
            self._graph(self._step_entry)
        except BaseException:
            self._driver.close()
            raise

    @property
    def chunks(self) -> tuple[int, ...]:
        """Those of the artifact's prefill engines."""
        return tuple(entry.tokens for entry in self._entries_of("prefill"))

    @property
    def max_batch(self) -> int:
        """Most streams of a state, where the artifact's batch is dynamic."""
        return min(entry.batch for entry in self._entries)

    @property
    def numerics(self) -> str:
        """Backend, GPU, and the build of the engines: TensorRT chooses kernels by what it measured then."""
        sha256 = self._artifact.manifest.files[self._step_entry.file].sha256
        wkv = self._step_entry.wkv
        return f"{self._loader.words}, {self._driver.name}, {self._step_entry.file} {sha256[:12]}, wkv {wkv}"

    def initial_state(self, batch: int = 1) -> TrtState:
        """See `Session.initial_state`, as for all that follows."""
        self._check_batch(batch)
        return self._uploaded(stored_initial(self.spec, self._start, batch))

    def step(self, tokens: Sequence[int] | np.ndarray, state: TrtState) -> np.ndarray:
        """One token for each stream."""
        step = self._graph(self._step_entry)
        ports = self._fed(tokens, state, step)
        state.run(step)
        self._driver.enqueue_download(ports.logits, ports.host_logits)
        self._driver.synchronize()
        return ports.host_logits.copy()

    @property
    def candidates(self) -> int:
        """How many of the largest logits the engine finds itself ('rwkv-edge build --sample-k'); 0 for none."""
        return self._step_entry.sample_k

    def step_candidates(self, tokens: Sequence[int] | np.ndarray, state: TrtState) -> list[Candidates]:
        """As `step`, but of the logits of each stream only the largest leave the GPU; the others on demand.

        Raises:
            SessionError: the engine has no candidates.
        """
        if not self.candidates:
            raise SessionError(f"{self._step_entry.file} has no candidates; run 'rwkv-edge build' with --sample-k 64")
        step = self._graph(self._step_entry)
        ports = self._fed(tokens, state, step)
        state.run(step)
        self._driver.enqueue_download(ports.candidates, ports.host_candidates)
        self._driver.synchronize()
        block = ports.host_candidates.copy()
        parts = {
            name: block[ports.offsets[name] :][: 4 * math.prod(shape)]
            .view(np.int32 if name == CANDIDATE_TOKENS else np.float32)
            .reshape(shape)
            for name, shape in step.candidate_shapes(state.batch).items()
        }
        return [
            Candidates(
                parts[CANDIDATE_TOKENS][row].astype(np.int64), parts[CANDIDATE_LOGITS][row],
                float(parts[CANDIDATE_NORM][row, 0]), self.spec.vocab_size,
                functools.partial(self._row_logits, state, step, row, state.runs),
            )
            for row in range(state.batch)
        ]  # fmt: skip

    def prefill(
        self, tokens: Sequence[Sequence[int]] | np.ndarray, state: TrtState, watch: Watch | None = None
    ) -> np.ndarray:
        """Largest chunks first, then smaller ones, then single steps; the host waits for the last only."""
        array = checked_tokens(tokens, 2, state.batch, self.spec)
        engines = {entry.tokens: entry for entry in self._loaded("prefill", array.shape[1])}
        lengths = list(chunk_plan(array.shape[1], tuple(engines)))
        at = 0
        graph = self._graph(self._step_entry)
        places = self._uploaded_pieces(array, lengths)
        try:
            for length in lengths:
                graph = self._graph(engines.get(length, self._step_entry))
                place, nbytes = places + 8 * state.batch * at, 8 * state.batch * length
                self._driver.copy(state.room.ports(graph).tokens, place, nbytes)
                state.run(graph)
                at += length
                if watch is not None:
                    watch(at, self._logits(state, graph))
        finally:
            self._driver.free(places)
        return self._logits(state, graph)

    def score(self, tokens: Sequence[Sequence[int]] | np.ndarray, state: TrtState) -> np.ndarray:
        """Chunks that give all logits where the artifact has such engines, then single steps."""
        array = checked_tokens(tokens, 2, state.batch, self.spec)
        logits = np.empty((*array.shape, self.spec.vocab_size), np.float32)
        at = 0
        for entry in self._loaded("score", array.shape[1]):
            while array.shape[1] - at >= entry.tokens:
                graph, part = self._graph(entry), slice(at, at + entry.tokens)
                self._feed(array[:, part], state, graph)
                state.run(graph)
                logits[:, part] = self._logits(state, graph)
                at += entry.tokens
        for t in range(at, array.shape[1]):
            logits[:, t] = self.step(array[:, t], state)
        return logits

    def copy_state(self, state: TrtState) -> TrtState:
        """A state of its own memory."""
        copied = self._state(state.batch)
        self._driver.copy(copied.room.sets[copied.side], state.room.sets[state.side], state.room.nbytes)
        return copied

    def export_state(self, state: TrtState) -> dict[str, np.ndarray]:
        """Copies by name."""
        stored = {}
        for t in self.spec.state:
            stored[t.name] = np.empty((state.batch, *t.shape), numpy_dtype(t.dtype))
            self._driver.download(state.address(t.name), stored[t.name])
        return named_from_stored(stored, self.spec)

    def import_state(self, arrays: Mapping[str, np.ndarray]) -> TrtState:
        """A state with these values."""
        stored = stored_from_named(arrays, self.spec)
        self._check_batch(stored[self.spec.state[0].name].shape[0])
        return self._uploaded(stored)

    def close(self) -> None:
        """Give the GPU's memory back: contexts, then engines, then the rest."""
        self._machine.close()
        self._graphs.clear()
        self._driver.close()

    def _entries_of(self, kind: str) -> list[EngineEntry]:
        """Engines of this kind, longest first."""
        return sorted((entry for entry in self._entries if entry.kind == kind), key=lambda entry: -entry.tokens)

    def _loaded(self, kind: str, length: int) -> list[EngineEntry]:
        """The engines of chunks that a text of ``length`` tokens needs and that fit the GPU's memory, longest first."""
        found = []
        for entry in self._entries_of(kind):
            if length >= entry.tokens and self._fits(entry):
                self._graph(entry)
                found.append(entry)
                length %= entry.tokens
        return found

    def _fits(self, entry: EngineEntry) -> bool:
        """Whether an engine is loaded, or can be beside those that are; a refusal is told once."""
        if entry.file in self._graphs:
            return True
        needed = int(self._artifact.manifest.files[entry.file].nbytes * ROOM_FOR_ENGINE)
        if self._driver.free_memory() < needed:
            self._machine.free_unused()
        free = self._driver.free_memory()
        if free >= needed:
            return True
        if not self._told:
            self._told = True
            warnings.warn(
                f"prompts are read in shorter pieces, which is slower: {entry.file} needs some {needed / 1e9:.1f} GB "
                f"of the GPU's memory, {free / 1e9:.1f} GB are free; export with fewer chunks",
                RuntimeWarning,
                stacklevel=4,
            )
        return False

    def _check_batch(self, batch: int) -> None:
        checked_batch(batch, self.spec)
        if batch > self.max_batch:
            raise InputError(
                f"the engines take up to {self.max_batch} streams, not {batch}; run 'rwkv-edge build' again with "
                f"--max-batch {batch}"
            )

    def _graph(self, entry: EngineEntry) -> TrtGraph:
        if entry.file not in self._graphs:
            self._graphs[entry.file] = open_graph(self._loader, self._driver, self.spec, entry, self._artifact.path)
        return self._graphs[entry.file]

    def _state(self, batch: int) -> TrtState:
        return TrtState(self._machine, batch)

    def _uploaded(self, stored: Mapping[str, np.ndarray]) -> TrtState:
        state = self._state(stored[self.spec.state[0].name].shape[0])
        for name, array in stored.items():
            self._driver.upload(np.ascontiguousarray(array), state.address(name))
        return state

    def _uploaded_pieces(self, tokens: np.ndarray, lengths: Sequence[int]) -> int:
        """Device memory with the tokens [B, T] piece by piece, each [B, its length]."""
        ends = np.cumsum(lengths)[:-1]
        flat = np.concatenate([piece.reshape(-1) for piece in np.split(tokens, ends, axis=1)])
        places = self._driver.allocate(flat.nbytes)
        self._driver.upload(flat, places)
        return places

    def _fed(self, tokens: Sequence[int] | np.ndarray, state: TrtState, step: TrtGraph) -> Ports:
        """Enqueue the copy of a step's tokens; its results will lie in these ports."""
        ports = state.room.ports(step)
        ports.host_tokens[:] = checked_tokens(tokens, 1, state.batch, self.spec)
        self._driver.enqueue_upload(ports.host_tokens, ports.tokens)
        return ports

    def _feed(self, tokens: np.ndarray, state: TrtState, graph: TrtGraph) -> None:
        self._driver.upload(np.ascontiguousarray(tokens), state.room.ports(graph).tokens)

    def _logits(self, state: TrtState, graph: TrtGraph) -> np.ndarray:
        logits = np.empty(graph.logits_shape(state.batch, self.spec), np.float32)
        self._driver.download(state.room.ports(graph).logits, logits)
        return logits

    def _row_logits(self, state: TrtState, step: TrtGraph, row: int, runs: int) -> np.ndarray:
        """The logits [V] of one stream after the step that was the state's run number ``runs``."""
        if state.runs != runs:
            raise SessionError("the stream has gone on since these candidates; ask for all logits before the next step")
        logits = np.empty(self.spec.vocab_size, np.float32)
        self._driver.download(state.room.ports(step).logits + logits.nbytes * row, logits)
        return logits


def engines_of(artifact: Artifact, backend: str) -> list[EngineEntry]:
    """The engines of a backend that a session can run; one of them is for steps.

    Raises:
        SessionError: there is none.
    """
    found = [entry for entry in artifact.manifest.engines if entry.backend == backend and entry.kind in KINDS]
    if not any(entry.kind == "step" for entry in found):
        words = ENGINE_BACKENDS[backend].words
        raise SessionError(
            f"{artifact.path} has no engines of {words}; run 'rwkv-edge build' on it with --backend {backend}"
        )
    return found


def check_size(artifact: Artifact, entry: EngineEntry) -> None:
    """Compare the size of an engine's file with the manifest: what is cut can crash the library.

    Raises:
        ArtifactError: it is missing, cut or replaced.
    """
    path, expected = artifact.path / entry.file, artifact.manifest.files[entry.file].nbytes
    try:
        found = path.stat().st_size
    except OSError as error:
        raise ArtifactError(f"{path} is missing ({error.strerror}); run 'rwkv-edge build' again") from error
    if found != expected:
        raise ArtifactError(
            f"{path} has {found} bytes, expected {expected}: it was cut or replaced; run 'rwkv-edge build' again"
        )


def fitting_backend(artifact: Artifact) -> str | None:
    """The first backend that is installed and has engines in this artifact for this GPU; None where there is none.

    Nothing is imported where the artifact has no engines, and nothing is loaded.
    """
    for name, backend in ENGINE_BACKENDS.items():
        try:
            entries = engines_of(artifact, name)
            capability = device_capability()
            if capability is None:
                return None
            version = str(load_module(backend).__version__)
            for entry in entries:
                check_engine(entry, artifact.manifest.model_hash, name, version, capability)
                check_size(artifact, entry)
        except RwkvEdgeError:
            continue
        return name
    return None
