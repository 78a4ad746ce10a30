"""Sessions over ONNX Runtime."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_edge.artifact import Artifact
from rwkv_edge.errors import ArtifactError, MissingDependencyError, RwkvEdgeError, SessionError
from rwkv_edge.runtime.session import (
    checked_batch,
    checked_tokens,
    named_from_stored,
    spec_from_metadata,
    stored_from_named,
)
from rwkv_edge.spec import ModelSpec, stored_from_float32

if TYPE_CHECKING:
    import onnxruntime

SPEC_KEY = "rwkv_edge.spec"
CPU = "CPUExecutionProvider"
_ONNX_TYPE = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7}  # TensorProto.DataType


class OrtState:
    """Two sets of state tensors that take turns: a step reads one and writes the other.

    The shift states must not share memory with their outputs: ONNX Runtime may write an output before it read the
    input.
    """

    def __init__(self, session: onnxruntime.InferenceSession, spec: ModelSpec, stored: dict[str, np.ndarray]) -> None:
        """``stored`` becomes the current set; it is owned from now on."""
        self.batch = next(iter(stored.values())).shape[0]
        self.tokens = np.zeros(self.batch, np.int64)
        self.logits = np.zeros((self.batch, spec.vocab_size), np.float32)
        self.sets = (stored, {name: np.zeros_like(array) for name, array in stored.items()})
        self.current = 0
        self._bindings = [self._binding(session, spec, self.sets[i], self.sets[1 - i]) for i in (0, 1)]

    def _binding(
        self,
        session: onnxruntime.InferenceSession,
        spec: ModelSpec,
        before: Mapping[str, np.ndarray],
        after: Mapping[str, np.ndarray],
    ) -> Any:
        binding = session.io_binding()
        dtypes = {t.name: t.dtype for t in spec.state}
        inputs = [("token", "int64", self.tokens), *((n, dtypes[n], a) for n, a in before.items())]
        outputs = [("logits", "float32", self.logits), *((f"{n}.out", dtypes[n], a) for n, a in after.items())]
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, dtype, array in tensors:
                bind(name, "cpu", 0, _ONNX_TYPE[dtype], list(array.shape), array.ctypes.data)
        return binding

    def advance(self, session: onnxruntime.InferenceSession) -> None:
        """One step from ``tokens`` to ``logits``; the other set becomes the current one."""
        session.run_with_iobinding(self._bindings[self.current])
        self.current = 1 - self.current


class OrtSession:
    """`rwkv_edge.runtime.session.Session` over ONNX Runtime."""

    def __init__(
        self, artifact: Artifact, providers: Sequence[str] | None = None, threads: int = 0, check_content: bool = True
    ) -> None:
        """See `rwkv_edge.runtime.session.open_session`."""
        chosen = checked_providers(providers)
        entry = artifact.graph("step", "cpu" if chosen[0] == CPU else "gpu")
        self.model_hash: str | None = artifact.manifest.model_hash
        check = _ContentCheck(artifact) if check_content else None
        try:
            self._session = _open(artifact.path / entry.file, chosen, threads)
        finally:
            if check is not None:
                check.join()  # a damaged file explains what the backend says about it
        self.spec = artifact.manifest.spec
        _check_inputs(self._session, self.spec, artifact.path / entry.file)

    def initial_state(self, batch: int = 1) -> OrtState:
        """See `Session.initial_state`, as for all that follows."""
        checked_batch(batch, self.spec)
        stored = {
            t.name: stored_from_float32(np.full((batch, *t.shape), t.fill, np.float32), t.dtype)
            for t in self.spec.state
        }
        return OrtState(self._session, self.spec, stored)

    def step(self, tokens: Sequence[int] | np.ndarray, state: OrtState) -> np.ndarray:
        """One token for each stream."""
        state.tokens[:] = checked_tokens(tokens, 1, state.batch, self.spec)
        state.advance(self._session)
        return state.logits.copy()

    def prefill(self, tokens: Sequence[Sequence[int]] | np.ndarray, state: OrtState) -> np.ndarray:
        """T tokens for each stream, one step each."""
        columns = checked_tokens(tokens, 2, state.batch, self.spec).T
        for column in columns:
            state.tokens[:] = column
            state.advance(self._session)
        return state.logits.copy()

    def copy_state(self, state: OrtState) -> OrtState:
        """A state of its own memory."""
        return OrtState(self._session, self.spec, {n: a.copy() for n, a in state.sets[state.current].items()})

    def export_state(self, state: OrtState) -> dict[str, np.ndarray]:
        """Copies by name."""
        return named_from_stored(state.sets[state.current], self.spec)

    def import_state(self, arrays: Mapping[str, np.ndarray]) -> OrtState:
        """A state with these values."""
        stored = stored_from_named(arrays, self.spec)
        checked_batch(stored[self.spec.state[0].name].shape[0], self.spec)
        return OrtState(self._session, self.spec, stored)

    def close(self) -> None:
        """Drop the session."""
        if hasattr(self, "_session"):
            del self._session


def session_from_graph(path: Path, providers: Sequence[str] | None = None, threads: int = 0) -> OrtSession:
    """A session from a bare graph, described by its own metadata.

    Raises:
        SessionError: it cannot be opened, or does not describe itself.
    """
    session = OrtSession.__new__(OrtSession)
    session._session = _open(path, checked_providers(providers), threads)
    session.spec = spec_from_metadata(session._session.get_modelmeta().custom_metadata_map.get(SPEC_KEY), path)
    session.model_hash = None
    _check_inputs(session._session, session.spec, path)
    return session


def checked_providers(providers: Sequence[str] | None) -> list[str]:
    """The providers to use.

    Raises:
        SessionError: one is not available; the message lists those that are.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    ort = _onnxruntime()
    available = ort.get_available_providers()
    chosen = list(providers) if providers else [CPU]
    for provider in chosen:
        if provider not in available:
            raise SessionError(f"provider '{provider}' is not available here; available are {', '.join(available)}")
    return chosen


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "ort", "running a model on this backend") from error
    return onnxruntime


def _open(path: Path, providers: list[str], threads: int) -> Any:
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; warnings about fallbacks are checked below
    if not path.is_file():
        raise SessionError(f"{path} does not exist")
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        raise SessionError(f"ONNX Runtime cannot open {path}: {str(error).splitlines()[0][:300]}") from error
    if session.get_providers()[0] != providers[0]:
        raise SessionError(
            f"ONNX Runtime could not start '{providers[0]}' and would run on {session.get_providers()[0]} instead; "
            "check its driver and libraries, or name the other provider"
        )
    return session


def _check_inputs(session: Any, spec: ModelSpec, path: Path) -> None:
    """The graph must take and give what the spec says, since raw memory is bound to it."""
    found = {x.name: (x.type, tuple(x.shape[1:])) for x in (*session.get_inputs(), *session.get_outputs())}
    expected = {"token": ("tensor(int64)", ()), "logits": ("tensor(float)", (spec.vocab_size,))}
    kinds = {"float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}
    for t in spec.state:
        expected[t.name] = expected[f"{t.name}.out"] = (kinds[t.dtype], t.shape)
    if found != expected:
        odd = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))[0]
        raise SessionError(
            f"{path} has '{odd}' as {found.get(odd)}, but its spec says {expected.get(odd)}; export it again"
        )
    batch = session.get_inputs()[0].shape[0]
    if (batch if isinstance(batch, int) else None) != spec.batch:
        raise SessionError(f"{path} takes batch {batch}, but its spec says {spec.batch}; export it again")


class _ContentCheck:
    """`Artifact.check_content` beside the loading, which reads the same files."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._error: RwkvEdgeError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._artifact.check_content()
        except ArtifactError as error:
            self._error = error

    def join(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error
