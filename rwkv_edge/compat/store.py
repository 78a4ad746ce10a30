"""Artifacts of checkpoints, exported when they are first asked for and kept in the user's cache folder.

The folder is ``$RWKV_EDGE_CACHE``, else ``rwkv-edge`` in the platform's cache folder; artifacts lie in its subfolder
``artifacts`` as ``<checkpoint>-<form>-<key>/<stamp>``. The key is of the checkpoint's path and the options, the
stamp of sizes and times of its files: one that was replaced is exported again, and its former artifact removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from rwkv_edge.artifact import FORMAT_VERSION, MANIFEST
from rwkv_edge.compat.strategy import Strategy
from rwkv_edge.errors import ArtifactError, CheckpointError, MissingDependencyError

_DIGITS = 16  # of a sha256 in names: no chance of a clash among the models of one machine


def cache_folder() -> Path:
    """Where artifacts are kept; it need not exist.

    Raises:
        ArtifactError: this user has no home, and ``RWKV_EDGE_CACHE`` is not set.
    """
    named = os.environ.get("RWKV_EDGE_CACHE")
    if named:
        return Path(named)
    try:
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "rwkv-edge" / "Cache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "rwkv-edge"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkv-edge"
    except RuntimeError as error:
        raise ArtifactError("there is no home folder for the cache; set RWKV_EDGE_CACHE to a folder") from error


def stored_artifact(checkpoint: Path, plan: Strategy, tell: Callable[[str], None], again: bool = False) -> Path:
    """The artifact of a checkpoint in the cache, exported now if it is not there; processes wait for each other.

    Args:
        checkpoint: a file or a Hugging Face folder.
        plan: the precision, and the device where weights are quantized for one.
        tell: told, in a line, of an export that begins.
        again: export even if it is there, since it turned out to be damaged.

    Raises:
        CheckpointError: the checkpoint is not a model that can be exported.
        ArtifactError: the cache cannot be written.
        MissingDependencyError: what exports is not installed.
    """
    place = cache_folder() / "artifacts" / _name(checkpoint, plan)
    target = place / _stamp(checkpoint)
    if (target / MANIFEST).is_file() and not again:
        return target
    with _alone(place):
        if again or not (target / MANIFEST).is_file():  # else another process was first
            tell(f"exporting {checkpoint} in {_form(plan)} to {target}, once")
            _export(checkpoint, plan, target)
            _remove_former(place, target)
    return target


def _export(checkpoint: Path, plan: Strategy, target: Path) -> None:
    try:
        from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
    except ImportError as error:
        purpose = f"exporting {checkpoint} (or export it elsewhere and pass the artifact's folder as the model)"
        raise MissingDependencyError((error.name or "torch").partition(".")[0], "export", purpose) from error
    from rwkv_edge.checkpoints import open_checkpoint

    # The tokenizer is the pipeline's; all logits are for `full_output`.
    options = ExportOptions(precision=plan.precision, tokenizer="none", all_logits=True)
    if not plan.int8:
        export_checkpoint(open_checkpoint(checkpoint), target, options)
        return
    scratch = target.parent / ".float"  # nobody else is here; one that was left is replaced
    try:
        export_checkpoint(open_checkpoint(checkpoint), scratch, options)
        _quantize(scratch, target, plan)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _quantize(artifact: Path, target: Path, plan: Strategy) -> None:
    """int8 weights, in the form that the device runs fastest."""
    try:
        from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
        from rwkv_edge.calibration.schemes import SchemeOptions
    except ImportError as error:
        raise MissingDependencyError((error.name or "onnx").partition(".")[0], "quantize", "quantizing") from error
    scheme = SchemeOptions("w8", target="cpu" if plan.device == "cpu" else "any")
    quantize_artifact(artifact, target, QuantizeOptions(scheme))


def _form(plan: Strategy) -> str:
    return f"{plan.precision}i8" if plan.int8 else plan.precision


def _name(checkpoint: Path, plan: Strategy) -> str:
    form = (_form(plan), plan.device if plan.int8 else "any")
    identity = (os.path.realpath(checkpoint), form, FORMAT_VERSION, version("rwkv-edge"))
    readable = "".join(c if c.isalnum() or c in "._-" else "_" for c in checkpoint.stem)[:80]
    return f"{readable}-{_form(plan)}-{_digest(identity)}"


def _stamp(checkpoint: Path) -> str:
    """Changes whenever a file of the checkpoint does."""
    try:
        files = sorted(path for path in checkpoint.iterdir() if path.is_file()) if checkpoint.is_dir() else [checkpoint]
        facts = [(path.name, status.st_size, status.st_mtime_ns) for path in files for status in (path.stat(),)]
    except OSError as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {error.strerror}") from error
    return _digest(facts)


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode(errors="surrogatepass")).hexdigest()[:_DIGITS]


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """While no other process exports there; where files cannot be locked, the last to finish wins, which is no harm."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = (place / ".lock").open("ab")
    except OSError as error:
        raise ArtifactError(
            f"{place} cannot be written: {error.strerror}; set RWKV_EDGE_CACHE to a folder for exported models"
        ) from error
    with lock:
        with contextlib.suppress(ImportError, OSError):  # Windows; a file system without locks
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_former(place: Path, target: Path) -> None:
    """Artifacts of what the checkpoint was before."""
    for entry in place.iterdir():
        if entry != target and len(entry.name) == _DIGITS and (entry / MANIFEST).is_file():
            shutil.rmtree(entry, ignore_errors=True)
