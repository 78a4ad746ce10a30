"""What every backend offers: open an artifact, feed tokens, keep the state."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from rwkv_edge.artifact import Artifact
from rwkv_edge.errors import ArtifactError, InputError, SessionError, StateError
from rwkv_edge.runtime.auto import engine_backend, kernels_fit
from rwkv_edge.spec import ModelSpec, float32_from_stored, stored_from_float32

BACKENDS = ("auto", "onnxruntime", "cuda", "tensorrt", "tensorrt-rtx")
MAX_THREADS = 256  # a backend starts them all at once: a million is the end of the process


Watch = Callable[[int, np.ndarray], None]
"""Told of the tokens consumed by each stream, and the logits [B, V] after them: memory that the next piece reuses."""


class State(Protocol):
    """The memory of ``batch`` streams, owned by the session that made it and kept where that session computes."""

    @property
    def batch(self) -> int:
        """Number of streams."""
        ...


S = TypeVar("S", bound=State)


class Session(Protocol[S]):
    """A model that is ready to run."""

    @property
    def spec(self) -> ModelSpec:
        """Dimensions, state tensors, precision."""
        ...

    @property
    def model_hash(self) -> str | None:
        """sha256 of the weights, to which states belong; None for a graph that was opened without its manifest."""
        ...

    @property
    def initial_hash(self) -> str | None:
        """sha256 of the tuned state's file with which every stream begins; None where there is none."""
        ...

    @property
    def chunks(self) -> tuple[int, ...]:
        """Lengths of the chunks that `prefill` feeds before it goes on in single steps, longest first."""
        ...

    @property
    def numerics(self) -> str:
        """What decides the last bits of a result beside the model and the tokens: backend, provider, threads."""
        ...

    def initial_state(self, batch: int = 1) -> S:
        """The state before the first token.

        Raises:
            InputError: the graphs were exported for another batch size.
        """
        ...

    def step(self, tokens: Sequence[int] | np.ndarray, state: S) -> np.ndarray:
        """Feed one token to each stream.

        Args:
            tokens: [B] integers below the vocabulary size.
            state: advanced in place.

        Returns:
            Logits [B, V] float32, a new array.

        Raises:
            InputError: a token outside the vocabulary, or another number of tokens than streams.
        """
        ...

    def prefill(self, tokens: Sequence[Sequence[int]] | np.ndarray, state: S, watch: Watch | None = None) -> np.ndarray:
        """Feed tokens [B, T ≥ 1] to each stream, in the pieces that `chunk_plan` says.

        Args:
            tokens: as for `step`.
            state: advanced in place.
            watch: called after every piece; it may export or copy the state.

        Returns:
            Logits [B, V] float32 after the last token.
        """
        ...

    def score(self, tokens: Sequence[Sequence[int]] | np.ndarray, state: S) -> np.ndarray:
        """Feed tokens [B, T ≥ 1] to each stream; returns the logits [B, T, V] float32 after every one of them."""
        ...

    def copy_state(self, state: S) -> S:
        """An independent copy: the fork of a stream."""
        ...

    def export_state(self, state: S) -> dict[str, np.ndarray]:
        """Copies of the state tensors by name, each [B, …]; bfloat16 ones as float32."""
        ...

    def import_state(self, arrays: Mapping[str, np.ndarray]) -> S:
        """A state with these values.

        Raises:
            StateError: a tensor is missing, unknown, of another shape, or holds NaN.
        """
        ...

    def close(self) -> None:
        """Free the backend's memory; the session and its states cannot be used after it."""
        ...


def open_session(
    path: str | Path,
    backend: str = "auto",
    providers: Sequence[str] | None = None,
    threads: int = 0,
    check_content: bool = True,
    prepack: bool = False,
) -> Session[Any]:
    """Open an artifact folder, or a bare ``step.onnx`` that lies beside its weights.

    Args:
        path: the folder that ``rwkv-edge export`` wrote, or an ``.onnx`` file of it.
        backend: 'onnxruntime', 'cuda' for our own kernels on an NVIDIA GPU, 'tensorrt' or 'tensorrt-rtx' for engines
            that 'rwkv-edge build' made, or 'auto': engines that fit what is installed and the GPU, where there are any,
            else our own kernels where they run the model on a GPU that is there, else ONNX Runtime. What is ONNX
            Runtime's alone (providers, threads, prepack) chooses that.
        providers: execution providers of ONNX Runtime, in order, as 'cuda' or 'cuda:device_id=1'; the CPU's where none
            is named. On CUDA the state stays on the GPU and steps are CUDA graphs ('cuda:enable_cuda_graph=0': not).
        threads: compute threads; 0 leaves the choice to the backend.
        check_content: compare the files' sha256 with the manifest while they load.
        prepack: let ONNX Runtime keep a second copy of the weights, in the order in which it multiplies. On a CPU,
            steps of several streams are up to twice as fast, and a `StatePool` need not pad few streams.

    Raises:
        ArtifactError: the artifact is incomplete or damaged.
        SessionError: the backend cannot open the graph, or a provider is not available.
        MissingDependencyError: the backend is not installed.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, not '{backend}'")
    if not 0 <= threads <= MAX_THREADS:
        raise InputError(f"threads must be 0 (automatic) or up to {MAX_THREADS}, not {threads}")
    if providers and backend not in ("auto", "onnxruntime"):
        raise InputError(f"execution providers are ONNX Runtime's; name none, or another backend than '{backend}'")
    path = Path(path)
    if path.suffix == ".onnx" and backend in ("auto", "onnxruntime"):
        from rwkv_edge.runtime.onnxruntime import session_from_graph

        return session_from_graph(path, providers, threads, prepack)
    artifact = Artifact.open(path)
    if backend == "auto" and (providers or threads or prepack):
        backend = "onnxruntime"
    if engines := engine_backend(artifact, backend):
        from rwkv_edge.runtime.tensorrt import TrtSession

        return TrtSession(artifact, engines, check_content)
    if backend == "cuda" or (backend == "auto" and kernels_fit(artifact)):
        from rwkv_edge.runtime.cuda import CudaSession

        return CudaSession(artifact, check_content)
    from rwkv_edge.runtime.onnxruntime import OrtSession

    return OrtSession(artifact, providers, threads, check_content, prepack)


def spec_from_metadata(text: str | None, path: Path) -> ModelSpec:
    """The spec that a graph carries in its metadata.

    Raises:
        SessionError: the graph carries none.
    """
    if not text:
        raise SessionError(f"{path} does not describe itself, so it was not exported by rwkv-edge; export it again")
    try:
        return ModelSpec.from_json(json.loads(text))
    except (ValueError, OverflowError, RecursionError, ArtifactError) as error:
        raise SessionError(f"{path} has damaged metadata ({error}); export it again") from error


def checked_tokens(
    tokens: Sequence[int] | Sequence[Sequence[int]] | np.ndarray, ndim: int, batch: int, spec: ModelSpec
) -> np.ndarray:
    """Tokens as int64 of ``ndim`` axes, the first of them ``batch`` long.

    Raises:
        InputError: not integers, another shape, or a token outside the vocabulary.
    """
    try:
        array = np.asarray(tokens)
    except ValueError as error:
        raise InputError(f"tokens must be a rectangular array of integers: {error}") from error
    if array.size and array.dtype.kind not in "iu":
        raise InputError(f"tokens must be integers, not {array.dtype}")
    if array.ndim != ndim or array.shape[0] != batch or array.size == 0:
        expected = f"[{batch}]" if ndim == 1 else f"[{batch}, T ≥ 1]"
        raise InputError(f"tokens have shape {list(array.shape)}, expected {expected} for a state of {batch} streams")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= spec.vocab_size:
        raise InputError(f"token {low if low < 0 else high} is outside the vocabulary of {spec.vocab_size}")
    return array.astype(np.int64, copy=False)


def chunk_plan(length: int, chunks: Sequence[int]) -> Iterator[int]:
    """Lengths of the pieces in which `Session.prefill` feeds a prompt: longest chunks first, then single steps."""
    for chunk in sorted(chunks, reverse=True):
        while length >= chunk:
            yield chunk
            length -= chunk
    yield from [1] * length


def checked_batch(batch: int, spec: ModelSpec) -> int:
    """``batch``, if the graphs take it.

    Raises:
        InputError: they were exported for another number of streams.
    """
    if batch < 1:
        raise InputError(f"batch must be at least 1, not {batch}")
    if spec.batch is not None and batch != spec.batch:
        raise InputError(f"the model was exported for batch {spec.batch}, not {batch}; export it with --batch dynamic")
    return batch


def named_from_stored(stored: Mapping[str, np.ndarray], spec: ModelSpec) -> dict[str, np.ndarray]:
    """Copies of stored state tensors as numpy floats, bfloat16 widened to float32."""
    return {
        t.name: float32_from_stored(stored[t.name], t.dtype) if t.dtype == "bfloat16" else stored[t.name].copy()
        for t in spec.state
    }


def stored_from_named(arrays: Mapping[str, np.ndarray], spec: ModelSpec) -> dict[str, np.ndarray]:
    """Checked state tensors [B, …] in the dtypes that the graphs take.

    Raises:
        StateError: a tensor is missing, unknown, of another shape, or holds NaN.
    """
    names = {t.name for t in spec.state}
    if names != set(arrays):
        odd = sorted(names ^ set(arrays))[0]
        problem = f"lacks '{odd}'" if odd in names else f"has '{odd}', which the model does not know"
        raise StateError(f"the state is of another model: it {problem}")
    stored: dict[str, np.ndarray] = {}
    batch = int(np.shape(arrays[spec.state[0].name])[0]) if np.ndim(arrays[spec.state[0].name]) else 0
    for t in spec.state:
        array = np.asarray(arrays[t.name])
        if array.shape != (batch, *t.shape) or batch < 1:
            expected = f"[B, {', '.join(map(str, t.shape))}]"
            raise StateError(f"state tensor '{t.name}' has shape {list(array.shape)}, expected {expected}")
        if array.dtype.kind != "f" or np.isnan(array).any():
            raise StateError(f"state tensor '{t.name}' holds NaN or no floats; the snapshot is not usable")
        stored[t.name] = np.ascontiguousarray(stored_from_float32(array, t.dtype))
    return stored
