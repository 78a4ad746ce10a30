"""Files that are replaced whole: who is killed while writing leaves the former file, and garbage only until the next
write."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from pathlib import Path

from rwkv_edge.errors import FileError

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

_SCRATCH = re.compile(r"\.(.+)\.partial-[0-9a-f]{16}", re.DOTALL)


def write_whole(path: Path, data: bytes) -> None:
    """Replace ``path``, or what it links to, by ``data``, durably; scratch files of writers that were killed go.

    Raises:
        OSError: it cannot be written; the former file is as it was.
    """
    place = Path(os.path.realpath(path))
    remove_leftovers(place.parent, place.name)
    descriptor, scratch = _new_scratch(place)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if fcntl:
                scratch.replace(place)  # while the lock is held, so that nobody takes it for a leftover
        if not fcntl:
            scratch.replace(place)
    except BaseException:  # Ctrl-C too
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
    _sync_folder(place.parent)


def write_file(path: Path, data: bytes) -> None:
    """`write_whole` for what a user asked to be written there.

    Raises:
        FileError: it cannot be written; the former file is as it was.
    """
    try:
        write_whole(path, data)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {reason_of(error)}") from error


def require_writable(path: Path) -> None:
    """Refuse at once a place at which `write_file` would fail after the work.

    Raises:
        FileError: it cannot be written.
    """
    reason = check_writable(path)
    if reason:
        raise FileError(f"{path} cannot be written: {reason}")


def check_writable(path: Path) -> str | None:
    """Why `write_whole` would fail at once; None if it would not, as far as can be told without writing."""
    place = Path(os.path.realpath(path))
    try:
        if place.exists() and not place.is_file():
            return "it is a folder or a device, not a file"
        if not place.parent.is_dir():
            return f"there is no folder {place.parent}"
        if not os.access(place.parent, os.W_OK):
            return f"the folder {place.parent} is not writable"
    except (OSError, ValueError) as error:
        return reason_of(error)
    return None


def reason_of(error: OSError | ValueError) -> str:
    """What the file system said, in words."""
    if not isinstance(error, OSError):
        return str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    return error.strerror or str(error)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the scratch files of dead writers, of files called ``name`` or of all: those that nobody has locked."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = _SCRATCH.fullmatch(entry.name)
            if found and name in (None, found[1]):
                _remove_if_dead(Path(entry.path))


def _new_scratch(place: Path) -> tuple[int, Path]:
    """A new file beside ``place``, open and locked; the lock ends with the process."""
    while True:
        scratch = place.with_name(f".{place.name}.partial-{secrets.token_hex(8)}")
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if not fcntl:
            return descriptor, scratch
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, scratch
        os.close(descriptor)  # taken for a leftover before it was locked


def _remove_if_dead(scratch: Path) -> None:
    with contextlib.suppress(OSError):  # locked by its writer, or gone
        if not fcntl:
            scratch.unlink()
            return
        descriptor = os.open(scratch, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            scratch.unlink()
        finally:
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make the new name durable, where folders can be synced."""
    if not fcntl:
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
