"""States in files: safetensors that say which model they belong to and what its streams have read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from rwkv_edge.errors import StateError
from rwkv_edge.runtime.atomic import check_writable, reason_of, write_whole
from rwkv_edge.runtime.session import stored_from_named

if TYPE_CHECKING:
    from rwkv_edge.runtime.session import Session, State

S = TypeVar("S", bound="State")

KEY = "rwkv_edge.state"  # of the metadata; one key only, since safetensors writes several in random order
FORMAT_VERSION = 1
LAST_TOKENS = 64
EXTRA = "extra."  # prefix of tensors that are no part of the state


@dataclass(frozen=True)
class History:
    """What one stream has read.

    Attributes:
        tokens: number of tokens that the state has consumed since the beginning.
        last: the last 64 of them.
        pending: tokens that belong to the text but that the state has not consumed: put them before the next prompt.
    """

    tokens: int = 0
    last: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()

    def after(self, consumed: Sequence[int], pending: Sequence[int] = ()) -> History:
        """The history when the state has consumed these tokens too (among them those that were pending)."""
        last = (*self.last, *map(int, consumed))[-LAST_TOKENS:]
        return History(self.tokens + len(consumed), last, tuple(map(int, pending)))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state of B streams and whose it is.

    Attributes:
        model_hash: sha256 of the weights.
        initial_hash: sha256 of the tuned state with which the model begins; None without one.
        version: of RWKV.
        precision: of the model.
        streams: one history per stream.
        arrays: state tensors by name, each [B, …]; bfloat16 ones as float32.
        extra: other tensors, for whoever wrote them.
        notes: JSON values, likewise.
    """

    model_hash: str
    initial_hash: str | None
    version: str
    precision: str
    streams: tuple[History, ...]
    arrays: Mapping[str, np.ndarray]
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


def save_snapshot(
    path: str | Path,
    session: Session[S],
    state: S | Mapping[str, np.ndarray],
    streams: Sequence[History],
    *,
    extra: Mapping[str, np.ndarray] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write the state of one or several streams; ``path`` holds the former snapshot or the new one, never a part.

    Args:
        path: the file.
        session: whose state it is.
        state: a state of the session, or the arrays that it exported.
        streams: what each stream has read.
        extra: tensors to keep with it.
        notes: JSON values to keep with it.

    Raises:
        StateError: it cannot be written, or the state holds NaN; the former file is as it was.
    """
    arrays = state if isinstance(state, Mapping) else session.export_state(state)
    if session.model_hash is None:
        raise StateError(f"{path} cannot be written: a bare graph does not say which weights it has; open its folder")
    spec = session.spec
    try:
        stored_from_named(arrays, spec)
    except StateError as error:
        raise StateError(f"{path} was not written: {error}") from error
    _check_streams(path, streams, arrays)
    snapshot = Snapshot(
        session.model_hash, session.initial_hash, spec.version, spec.precision, tuple(streams), arrays,
        extra or {}, notes or {},
    )  # fmt: skip
    check_target(path)
    try:
        write_whole(Path(path), _content(snapshot))
    except (OSError, ValueError) as error:
        raise StateError(f"{path} cannot be written: {reason_of(error)}; nothing was changed there") from error


def check_target(path: str | Path) -> None:
    """Whether a snapshot can be written to ``path``, as far as can be told before.

    Raises:
        StateError: the folder does not exist or is not writable, or ``path`` is no file.
    """
    problem = check_writable(Path(path))
    if problem:
        raise StateError(f"{path} cannot be written: {problem}")


def load_snapshot(path: str | Path, session: Session[S]) -> Snapshot:
    """Read a snapshot of the session's model; `Session.import_state` makes a state of its ``arrays``.

    Raises:
        StateError: there is none, it is cut or damaged, belongs to another model, has other shapes, or holds NaN.
    """
    snapshot = read_snapshot(path)
    check_owner(snapshot, session, path)
    return snapshot


def check_owner(snapshot: Snapshot, session: Session[S], path: str | Path) -> None:
    """Whether a snapshot fits a session.

    Raises:
        StateError: it belongs to another model, has other shapes, or holds NaN; names ``path``.
    """
    if session.model_hash is None:
        raise StateError(f"{path} belongs to a model, but a bare graph does not say which it is; open its folder")
    if snapshot.model_hash != session.model_hash:
        raise StateError(
            f"{path} is a state of another model: its weights have sha256 {snapshot.model_hash[:12]}…, expected "
            f"{session.model_hash[:12]}…; load it with the artifact that it was saved from"
        )
    if snapshot.initial_hash != session.initial_hash:
        found, expected = (h[:12] + "…" if h else "none" for h in (snapshot.initial_hash, session.initial_hash))
        raise StateError(
            f"{path} is a state of the same weights with another tuned initial state: {found}, expected {expected}; "
            "load it with the artifact that it was saved from"
        )
    try:
        stored_from_named(snapshot.arrays, session.spec)
    except StateError as error:
        raise StateError(f"{path}: {error}") from error


def read_snapshot(path: str | Path) -> Snapshot:
    """Read a snapshot of any model.

    Raises:
        StateError: there is none, or it is cut or damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        if not path.is_file():
            found = "is not a file" if path.exists() else "does not exist"
            raise StateError(f"{path} {found}; a snapshot is the file that --state-out or save_snapshot wrote")
        with safe_open(path, framework="numpy") as file:
            facts = _facts((file.metadata() or {}).get(KEY), path)
            tensors = {name: np.asarray(file.get_tensor(name)) for name in sorted(file.keys())}
    except (OSError, ValueError) as error:
        raise StateError(f"{path} cannot be read: {reason_of(error)}") from error
    except (SafetensorError, TypeError) as error:
        raise StateError(f"{path} is no snapshot, or was cut: {_line(error)}; save it again") from error
    if facts.pop("sha256", None) != _digest(facts, tensors):
        raise StateError(f"{path} is damaged: its content is not what was written; save it again")
    return _snapshot(facts, tensors, path)


def _facts(text: str | None, path: Path) -> dict[str, Any]:
    """The metadata, if it is of this format."""
    if text is None:
        raise StateError(f"{path} is not a snapshot: it was not written by --state-out or save_snapshot")
    try:
        facts = dict(json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise StateError(f"{path} is damaged: {_line(error)}; save it again") from error
    if facts.get("format_version") != FORMAT_VERSION:
        raise StateError(
            f"{path} has format version {str(facts.get('format_version'))[:40]}, expected {FORMAT_VERSION}; "
            "use the version of rwkv-edge that wrote it"
        )
    return facts


def _snapshot(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray], path: Path) -> Snapshot:
    arrays = {name: array for name, array in tensors.items() if not name.startswith(EXTRA)}
    try:
        streams = tuple(History(s["tokens"], tuple(s["last"]), tuple(s["pending"])) for s in facts["streams"])
        found = Snapshot(
            model_hash=facts["model_hash"],
            initial_hash=facts["initial_hash"],
            version=facts["version"],
            precision=facts["precision"],
            streams=streams,
            arrays=arrays,
            extra={name.removeprefix(EXTRA): a for name, a in tensors.items() if name.startswith(EXTRA)},
            notes=facts["notes"],
        )
    except (KeyError, TypeError) as error:
        raise StateError(f"{path} is damaged: {_line(error)}; save it again") from error
    _check_streams(path, streams, arrays)
    return found


def _check_streams(path: str | Path, streams: Sequence[History], arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if array.shape[:1] != (len(streams),):
            raise StateError(f"{path}: '{name}' has shape {list(array.shape)}, but there are {len(streams)} histories")


def _content(snapshot: Snapshot) -> bytes:
    from safetensors.numpy import save

    tensors = {name: np.ascontiguousarray(array) for name, array in snapshot.arrays.items()}
    tensors |= {EXTRA + name: np.ascontiguousarray(array) for name, array in snapshot.extra.items()}
    facts = {
        "format_version": FORMAT_VERSION,
        "model_hash": snapshot.model_hash,
        "initial_hash": snapshot.initial_hash,
        "version": snapshot.version,
        "precision": snapshot.precision,
        "streams": [asdict(stream) for stream in snapshot.streams],
        "notes": dict(snapshot.notes),
    }
    content: bytes = save(tensors, {KEY: json.dumps(facts | {"sha256": _digest(facts, tensors)})})
    return content


def _digest(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 over everything in the file but itself."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
