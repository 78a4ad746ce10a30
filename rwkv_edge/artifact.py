"""The exported folder: what is in it, how it is written so that no half of it can be opened, and how it is checked.

An artifact holds ``step.onnx``, ``weights.bin``, ``manifest.json`` and the tokenizer's file. The manifest is
written last into a folder of another name, which is then renamed: an export that was killed leaves nothing that opens.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rwkv_edge.errors import ArtifactError
from rwkv_edge.spec import ModelSpec

FORMAT = "rwkv-edge artifact"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.bin"

_MOST = 1 << 48  # what no dimension, file size or count comes near; keeps arithmetic on damaged manifests finite
_PARTS = re.compile(
    r"manifest\.json|weights\.bin|(step|prefill)[\w.-]*\.(onnx|engine)|tokenizer\.json|rwkv_vocab\w*\.txt"
)
"""Names that an export writes: what a folder whose manifest cannot be read may hold, to be replaced."""


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 in hex of one file of the artifact."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class GraphEntry:
    """One graph: its file, how many nodes it has, and what it is for.

    ``kind`` is 'step' (one token) or 'prefill'; ``tokens`` its sequence length; ``target`` is 'any', 'gpu', or 'cpu'
    for the form with widened weights that a CPU without bfloat16 arithmetic runs.
    """

    file: str
    kind: str
    tokens: int
    target: str
    nodes: int
    wkv: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    ``model_hash`` is the sha256 of weights.bin: states and engines belong to it. ``source`` describes the checkpoint,
    ``tools`` the versions that made the artifact, ``warnings`` what the export had to say, ``initial_state`` the file
    of a tuned state.
    """

    spec: ModelSpec
    graphs: tuple[GraphEntry, ...]
    files: Mapping[str, FileEntry]
    tokenizer: Mapping[str, Any] | None
    model_hash: str
    source: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    initial_state: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        data = asdict(self)
        data["spec"] = self.spec.to_json()
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **data}

    @classmethod
    def from_json(cls, data: Any, path: Path) -> Manifest:
        """The manifest that `to_json` wrote.

        Raises:
            ArtifactError: another format, a newer version, or a field that cannot be meant; names ``path``.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ArtifactError(f"{path} is not the manifest of an rwkv-edge artifact; export the checkpoint again")
        if data.get("format_version") != FORMAT_VERSION:
            raise ArtifactError(
                f"{path} has format version {str(data.get('format_version'))[:40]}, expected {FORMAT_VERSION}; "
                "export the checkpoint again with this version of rwkv-edge"
            )
        try:
            return cls(
                spec=_checked_spec(ModelSpec.from_json(data["spec"])),
                graphs=tuple(_graph_entry(entry) for entry in data["graphs"]),
                files=_file_entries(data["files"]),
                tokenizer=None if data["tokenizer"] is None else _tokenizer_entry(data["tokenizer"]),
                model_hash=_sha256(data["model_hash"]),
                source=_source_entry(data["source"]),
                tools={str(name): str(version) for name, version in data["tools"].items()},
                warnings=tuple(str(w) for w in data["warnings"]),
                initial_state=None if data.get("initial_state") is None else _plain_name(data["initial_state"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ArtifactError) as error:
            missing = isinstance(error, KeyError)
            reason = (
                f"it lacks '{error.args[0]}'" if missing else str(error).removesuffix("; export the checkpoint again")
            )
            raise ArtifactError(f"{path} is damaged ({reason[:200]}); export the checkpoint again") from error


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, not a text")
    return value


def _count(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MOST:
        raise ValueError(f"{name} is {value!r}, not a count")
    return value


def _plain_name(name: Any) -> str:
    """A file name that stays inside the folder."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", _text(name, "a file name")):
        raise ValueError(f"file name {name!r} leaves the folder")
    return str(name)


def _sha256(value: Any) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", _text(value, "a sha256")):
        raise ValueError(f"sha256 is {value!r}, not 64 hex digits")
    return str(value)


def _graph_entry(entry: Any) -> GraphEntry:
    expected = sorted(part.name for part in fields(GraphEntry))
    if not isinstance(entry, dict) or sorted(entry) != expected:
        raise ValueError(f"a graph should have the fields {', '.join(expected)}, but is {entry!r}")
    found = GraphEntry(**entry)
    _plain_name(found.file)
    for name in ("kind", "target", "wkv"):
        _text(getattr(found, name), name)
    for name in ("tokens", "nodes"):
        _count(getattr(found, name), name)
    return found


def _file_entries(entries: Mapping[str, Any]) -> dict[str, FileEntry]:
    if WEIGHTS not in entries:
        raise ValueError(f"it does not list {WEIGHTS}")
    return {
        _plain_name(name): FileEntry(_count(entry["nbytes"], "nbytes"), _sha256(entry["sha256"]))
        for name, entry in entries.items()
    }


def _tokenizer_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    file = entry["file"]
    return {**entry, "kind": _text(entry["kind"], "kind"), "file": None if file is None else _plain_name(file)}


def _source_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    parameters = entry.get("parameters")
    return {**entry, "parameters": None if parameters is None else _count(parameters, "parameters")}


def _checked_spec(spec: ModelSpec) -> ModelSpec:
    """The spec, if `info` can count with it; that it is the graph's spec is checked when the graph is opened."""
    _text(spec.version, "version")
    if spec.batch is not None:
        _count(spec.batch, "batch")
    for name in ("n_layer", "n_embd", "n_att", "n_ffn", "n_head", "head_size", "vocab_size"):
        _count(getattr(spec, name), name)
    if not isinstance(spec.extra, dict):
        raise ValueError(f"extra is {spec.extra!r}, not an object")
    for name, value in spec.extra.items():
        _count(value, name)
    for tensor in spec.state:
        _count(tensor.nbytes, tensor.name)
    return spec


@dataclass(frozen=True)
class Artifact:
    """An opened artifact folder."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Read the manifest and compare the size of every file with it (their content: `check_content`).

        Raises:
            ArtifactError: no artifact, incomplete, damaged or of another format.
        """
        path = Path(path)
        manifest_path = path / MANIFEST
        try:
            if not path.is_dir():
                found = "is a file" if path.exists() else "does not exist"
                raise ArtifactError(f"{path} {found}; an artifact is the folder that 'rwkv-edge export' wrote")
            data = json.loads(manifest_path.read_bytes())
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{path} has no {MANIFEST}; an artifact is the folder that 'rwkv-edge export' wrote"
            ) from error
        except OSError as error:
            raise ArtifactError(f"{manifest_path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{manifest_path} is damaged ({error}); export the checkpoint again") from error
        artifact = cls(path, Manifest.from_json(data, manifest_path))
        for name, entry in artifact.manifest.files.items():
            artifact._check_size(name, entry)
        return artifact

    def _check_size(self, name: str, entry: FileEntry) -> None:
        try:
            size = (self.path / name).stat().st_size
        except OSError as error:
            raise ArtifactError(
                f"{self.path / name} is missing ({error.strerror}); export the checkpoint again"
            ) from error
        if size != entry.nbytes:
            raise ArtifactError(
                f"{self.path / name} has {size} bytes, expected {entry.nbytes}: it was cut or replaced; export again"
            )

    def check_content(self, *names: str) -> None:
        """Compare the sha256 of files (all, where none is named) with the manifest; reads them once.

        Raises:
            ArtifactError: a file is not the one that was exported.
        """
        for name in names or tuple(self.manifest.files):
            if name not in self.manifest.files:
                raise ArtifactError(f"{self.path / MANIFEST} does not list '{name}'; export the checkpoint again")
            try:
                found = sha256_of(self.path / name)
            except OSError as error:
                raise ArtifactError(f"{self.path / name} cannot be read: {error.strerror}") from error
            if found != self.manifest.files[name].sha256:
                hashes = f"sha256 {found[:12]}…, expected {self.manifest.files[name].sha256[:12]}…"
                raise ArtifactError(
                    f"{self.path / name} is not the file that was exported ({hashes}); export the checkpoint again"
                )

    def graph(self, kind: str, target: str) -> GraphEntry:
        """The graph of this kind for 'cpu' or 'gpu': the one made for it, else the one for any.

        Raises:
            ArtifactError: there is none.
        """
        entries = [entry for entry in self.manifest.graphs if entry.kind == kind and entry.target in (target, "any")]
        if not entries:
            raise ArtifactError(f"{self.path} holds no {kind} graph for {target}; export the checkpoint again")
        return next((entry for entry in entries if entry.target == target), entries[0])


def sha256_of(path: Path) -> str:
    """sha256 of a file's content in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_entry(path: Path, sha256: str | None = None) -> FileEntry:
    """Size and hash of a written file; ``sha256`` where it is known already."""
    return FileEntry(path.stat().st_size, sha256 or sha256_of(path))


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
            free = shutil.disk_usage(place.parent).free
            if free < nbytes:
                raise ArtifactError(
                    f"{target} needs {nbytes / 1e6:.1f} MB, but only {free / 1e6:.1f} MB are free there"
                )
            scratch.mkdir()
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


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json."""
    text = json.dumps(manifest.to_json(), indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


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
        if not found or (int(found[1]) != os.getpid() and _is_running(int(found[1]))):
            continue
        if found[2] and not target.exists():
            leftover.rename(target)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(pid: int) -> bool:
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
