"""Putting the exported folder in place, so that no half of it can be opened and nothing else is lost.

Everything is written into a folder of another name, the manifest last, which is then renamed: an export that was killed
leaves nothing that opens, and an artifact that stood there stays whole.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from rwkv_edge.artifact import FORMAT, MANIFEST, WEIGHTS
from rwkv_edge.errors import ArtifactError

_PARTS = re.compile(
    r"manifest\.json|weights\.(bin|json)|(step|prefill|score)[\w.-]*\.(onnx|engine)|initial_state\.safetensors|"
    r"tokenizer\.json|rwkv_vocab\w*\.txt|\.build-\d+"
)
"""Names that an export or a build writes: what a folder whose manifest cannot be read may hold, to be replaced."""


@contextlib.contextmanager
def artifact_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """A scratch folder beside ``target`` that takes its place when the block ends without an error.

    Args:
        target: the artifact's folder; may exist if it is empty or an artifact, which is replaced.
        nbytes: what will be written, roughly: checked against the free space first.

    Raises:
        ArtifactError: the target holds something else, or cannot be written, or the disk is full.
    """
    _check_target(target)
    place = Path(os.path.realpath(target))  # a link to an artifact stays a link
    scratch = place.parent / f".{place.name}.partial-{os.getpid()}"
    made: list[Path] = []
    try:
        with disk_errors(target):
            made += [folder for folder in place.parents if not folder.exists()]
            place.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(place)
            scratch.mkdir()
            free = shutil.disk_usage(place.parent).free
            if free < nbytes:
                raise ArtifactError(
                    f"{target} needs {nbytes / 1e6:.1f} MB, but only {free / 1e6:.1f} MB are free there"
                )
            yield scratch
            _replace(scratch, place)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # another program put something there
                folder.rmdir()
        raise


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn what the file system refuses into an ArtifactError that names ``target``."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise ArtifactError(f"{target} cannot be written: {reason}; nothing was changed there") from error


def _check_target(target: Path) -> None:
    try:
        found = _foreign_part(target) if target.is_dir() else "a file" if target.exists() else None
    except OSError as error:
        raise ArtifactError(f"{target} cannot be written: {error.strerror}") from error
    if found:
        raise ArtifactError(
            f"{target} exists and is {found}, not just an artifact, so it is left alone; choose another folder with -o"
        )


def _foreign_part(folder: Path) -> str | None:
    """What in ``folder`` would be lost if an export replaced it: nothing in an artifact, even in a damaged one."""
    names = {entry.name for entry in folder.iterdir()}
    if not names:
        return None
    try:
        data = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        data = {"format": FORMAT if WEIGHTS in names else None}
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        return "a folder of something else"
    listed = data["files"] if isinstance(data.get("files"), dict) else {}
    odd = sorted(name for name in names if name not in listed and not _PARTS.fullmatch(name))
    return f"a folder that holds '{odd[0]}'" if odd else None


def _remove_leftovers(target: Path) -> None:
    """Scratch folders of exports that were killed; an artifact that one of them had moved away goes back."""
    for leftover in sorted(target.parent.glob(f".{glob.escape(target.name)}.partial-*")):
        found = re.fullmatch(r".*\.partial-(\d+)(\.former)?", leftover.name, re.DOTALL)
        if not found or (int(found[1]) != os.getpid() and is_running(int(found[1]))):
            continue
        if found[2] and not target.exists():
            leftover.rename(target)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def is_running(pid: int) -> bool:
    """Whether a process has this number; True where that cannot be told."""
    if os.name != "posix":
        return True  # signal 0 would end the process there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _replace(scratch: Path, target: Path) -> None:
    """Move the finished folder into place; what stood there goes last."""
    former = scratch.with_name(scratch.name + ".former")
    try:
        if target.exists():
            target.rename(former)
        scratch.rename(target)
    except BaseException:  # Ctrl-C too
        if former.exists() and not target.exists():
            former.rename(target)
        raise
    shutil.rmtree(former, ignore_errors=True)
