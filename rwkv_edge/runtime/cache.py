"""States of prompts on disk, by their tokens: a prompt that begins like an earlier one is not read again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from rwkv_edge.errors import FileError, InputError, StateError
from rwkv_edge.runtime.atomic import reason_of, remove_leftovers
from rwkv_edge.runtime.session import checked_tokens, chunk_plan
from rwkv_edge.runtime.snapshot import History, check_owner, read_snapshot, save_snapshot

if TYPE_CHECKING:
    from rwkv_edge.runtime.session import Session, State

S = TypeVar("S", bound="State")

DEFAULT_BYTES = 1_000_000_000
BOUNDARIES = 16  # the most ends of the longest chunk at which states of one prompt are kept
LEAST_CHUNK = 64  # tokens of a chunk that is worth a state at its end
_ENTRY = re.compile(r"([0-9a-f]{64})\.state")


@dataclass(frozen=True, eq=False)
class Prefilled(Generic[S]):
    """A prompt that was read.

    Attributes:
        state: of batch 1; it has consumed the whole prompt.
        logits: [V] float32 after the last token.
        reused: tokens that did not have to be read.
    """

    state: S
    logits: np.ndarray
    reused: int


@dataclass(frozen=True)
class CacheEntry:
    """One state on disk; ``used`` is when it was last needed, in seconds since 1970."""

    path: Path
    nbytes: int
    used: float


class PromptCache:
    """A folder of states with a limit on its size; who was not used for the longest time goes first.

    A state is found by the hash of all tokens that it has consumed, of the model, its tuned initial state and the
    backend. Only states are reused that reading the whole prompt would have passed through too, in the same chunks: so
    the bits, and the text, are those of an empty cache. Processes may share the folder.
    """

    def __init__(
        self, folder: str | Path, limit: int = DEFAULT_BYTES, warn: Callable[[str], None] = warnings.warn
    ) -> None:
        """Make the folder.

        Args:
            folder: of the cache; holds nothing else.
            limit: bytes that all states together may take.
            warn: told, in a line, of an entry that was damaged and removed, and of what could not be written.

        Raises:
            FileError: the folder cannot be made.
            InputError: the limit is below 0.
        """
        if limit < 0:
            raise InputError(f"the size of a cache must be at least 0 bytes, not {limit}")
        self.folder, self.limit = Path(folder), limit
        self._warn = warn
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"{folder} cannot be a folder for a cache: {reason_of(error)}") from error

    def prefill(self, session: Session[S], tokens: Sequence[int]) -> Prefilled[S]:
        """Read a prompt from the initial state on, or from the longest part of it that is known; keep what is new.

        States are kept at the prompt's end and where longer chunks end, of the longest ones at up to 16 places.

        Raises:
            InputError: no tokens, or one outside the vocabulary.
            StateError: a bare graph, which does not say which model it is.
        """
        if session.model_hash is None:
            raise StateError("a cache needs to know the model, but a bare graph does not say it; open its folder")
        ids = checked_tokens([tokens], 2, 1, session.spec)
        keys = _keys(session, ids[0])
        found = self._longest(session, ids[0], keys)
        if found is not None and found.reused == ids.shape[1]:
            return found
        state, start = (session.initial_state(1), 0) if found is None else (found.state, found.reused)
        keep = _kept(ids.shape[1], session.chunks)

        def watch(consumed: int, logits: np.ndarray) -> None:
            at = start + consumed
            if at in keep:
                self._store(session, state, ids[0, :at], logits[0], keys[at])

        logits = session.prefill(ids[:, start:], state, watch)[0]
        return Prefilled(state, logits, start)

    def _longest(self, session: Session[S], ids: np.ndarray, keys: dict[int, str]) -> Prefilled[S] | None:
        for at in sorted(keys, reverse=True):
            path = self._path(keys[at])
            if path.is_file():
                found = self._load(session, path, ids[:at])
                if found is not None:
                    return found
        return None

    def _load(self, session: Session[S], path: Path, ids: np.ndarray) -> Prefilled[S] | None:
        """An entry, or None where it is damaged, and then removed, or was removed by another process."""
        try:
            snapshot = read_snapshot(path)
            check_owner(snapshot, session, path)
            logits = snapshot.extra.get("logits")
            if (
                snapshot.streams != (History().after(ids.tolist()),)
                or logits is None
                or logits.shape != (session.spec.vocab_size,)
            ):
                raise StateError(f"{path} is not of these tokens")
            os.utime(path)
        except (StateError, OSError) as error:
            if path.exists():
                self._warn(f"a damaged entry of the cache is ignored and removed: {error}")
                with contextlib.suppress(OSError):
                    path.unlink()
            return None
        return Prefilled(session.import_state(snapshot.arrays), logits, len(ids))

    def _store(self, session: Session[S], state: S, ids: np.ndarray, logits: np.ndarray, key: str) -> None:
        if session.spec.state_nbytes + logits.nbytes > self.limit:
            return
        history = History().after(ids.tolist())
        remove_leftovers(self.folder)
        try:
            save_snapshot(self._path(key), session, state, [history], extra={"logits": logits.copy()})
            self.shrink(self.limit)
        except (StateError, FileError) as error:
            self._warn(f"the cache keeps nothing of this prompt: {error}")

    def shrink(self, nbytes: int) -> None:
        """Remove entries until the rest takes at most ``nbytes``."""
        entries = sorted(cache_entries(self.folder), key=lambda entry: entry.used)
        total = sum(entry.nbytes for entry in entries)
        for entry in entries:
            if total <= nbytes:
                return
            with contextlib.suppress(OSError):
                entry.path.unlink()
            total -= entry.nbytes

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.state"


def cache_entries(folder: str | Path) -> list[CacheEntry]:
    """All entries of a cache.

    Raises:
        FileError: there is no such folder.
    """
    try:
        return list(_entries(Path(folder)))
    except OSError as error:
        raise FileError(f"{folder} is not the folder of a cache: {reason_of(error)}") from error


def clear_cache(folder: str | Path) -> int:
    """Remove all entries, and nothing else that may be in the folder; returns the bytes they took.

    Raises:
        FileError: there is no such folder.
    """
    entries = cache_entries(folder)
    remove_leftovers(Path(folder))
    for entry in entries:
        entry.path.unlink(missing_ok=True)
    return sum(entry.nbytes for entry in entries)


def _entries(folder: Path) -> Iterator[CacheEntry]:
    for item in os.scandir(folder):
        if _ENTRY.fullmatch(item.name):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                status = item.stat()
                yield CacheEntry(Path(item.path), status.st_size, status.st_mtime)


def _keys(session: Session[Any], ids: np.ndarray) -> dict[int, str]:
    """Number of tokens → key, wherever a piece of the prompt ends."""
    identity = (session.model_hash, session.initial_hash, session.chunks, session.numerics)
    digest = hashlib.sha256(repr(identity).encode())
    keys, start = {}, 0
    for at in accumulate(chunk_plan(len(ids), session.chunks)):
        digest.update(ids[start:at].astype("<i8").tobytes())
        keys[at], start = digest.copy().hexdigest(), at
    return keys


def _kept(length: int, chunks: Sequence[int]) -> set[int]:
    """Where a prompt's states are kept: at its end, and where longer chunks end.

    For the longest chunk the distance doubles until there are few enough of them, so that prompts of similar lengths
    keep the same ones.
    """
    longest = distance = max(chunks, default=length)
    while length // distance > BOUNDARIES:
        distance *= 2
    least = min(longest, LEAST_CHUNK)
    kept, at = {length}, 0
    for piece in chunk_plan(length, chunks):
        at += piece
        if least <= piece < longest or (piece == longest and at % distance == 0):
            kept.add(at)
    return kept
