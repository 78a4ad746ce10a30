"""The exported folder: what is in it, and how it is checked.

An artifact holds graphs (``step.onnx``), ``weights.bin``, ``manifest.json`` and a tokenizer's file. How it is written,
so that no half of it can be opened: `rwkv_edge.exporters.folder`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rwkv_edge.engines import EngineEntry, engine_entry
from rwkv_edge.errors import ArtifactError
from rwkv_edge.spec import ModelSpec

FORMAT = "rwkv-edge artifact"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.bin"

_MOST = 1 << 48  # what no dimension, file size or count comes near; keeps arithmetic on damaged manifests finite


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
    of a tuned state. ``engines`` are what 'rwkv-edge build' added; their files may be gone or damaged without harm to
    the rest, so they are checked where one is used. ``quantization`` says how the weights were quantized, None where
    they are as exported: the scheme, the formats of linears by name, and the calibration.
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
    engines: tuple[EngineEntry, ...] = ()
    quantization: Mapping[str, Any] | None = None

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
            found = cls(
                spec=_checked_spec(ModelSpec.from_json(data["spec"])),
                graphs=tuple(_graph_entry(entry) for entry in data["graphs"]),
                files=_file_entries(data["files"]),
                tokenizer=None if data["tokenizer"] is None else _tokenizer_entry(data["tokenizer"]),
                model_hash=_sha256(data["model_hash"]),
                source=_source_entry(data["source"]),
                tools={str(name): str(version) for name, version in data["tools"].items()},
                warnings=tuple(str(w) for w in data["warnings"]),
                initial_state=None if data.get("initial_state") is None else _plain_name(data["initial_state"]),
                engines=tuple(_engine_entry(entry) for entry in data.get("engines", [])),
                quantization=None if data.get("quantization") is None else _quantization_entry(data["quantization"]),
            )
            _check_listed(found)
            return found
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ArtifactError) as error:
            missing = isinstance(error, KeyError)
            reason = (
                f"it lacks '{error.args[0]}'" if missing else str(error).removesuffix("; export the checkpoint again")
            )
            raise ArtifactError(f"{path} is damaged ({reason[:200]}); export the checkpoint again") from error


def _check_listed(manifest: Manifest) -> None:
    """What is not listed has no hash, and would reach a parser unchecked."""
    tokenizer = manifest.tokenizer["file"] if manifest.tokenizer else None
    graphs = (WEIGHTS, *(graph.file for graph in manifest.graphs)) if manifest.graphs or not manifest.engines else ()
    for name in (*graphs, *(engine.file for engine in manifest.engines), tokenizer, manifest.initial_state):
        if name is not None and name not in manifest.files:
            raise ValueError(f"it does not list '{name}'")


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


def _engine_entry(data: Any) -> EngineEntry:
    found = engine_entry(data)
    _plain_name(found.file)
    return found


def _file_entries(entries: Mapping[str, Any]) -> dict[str, FileEntry]:
    return {
        _plain_name(name): FileEntry(_count(entry["nbytes"], "nbytes"), _sha256(entry["sha256"]))
        for name, entry in entries.items()
    }


def _tokenizer_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    file = entry["file"]
    return {**entry, "kind": _text(entry["kind"], "kind"), "file": None if file is None else _plain_name(file)}


def _quantization_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    formats = {str(name): _text(form, "a format") for name, form in entry["formats"].items()}
    return {**entry, "scheme": _text(entry["scheme"], "the scheme"), "formats": formats}


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
        """Read the manifest and compare the size of every file with it (their content, and engines: `check_content`).

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
        for name in artifact.exported_files:
            artifact._check_size(name, artifact.manifest.files[name])
        return artifact

    @property
    def exported_files(self) -> tuple[str, ...]:
        """The files that the export wrote: all that are listed but engines."""
        engines = {engine.file for engine in self.manifest.engines}
        return tuple(name for name in self.manifest.files if name not in engines)

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
        """Compare the sha256 of files (`exported_files`, where none is named) with the manifest; reads them once.

        Raises:
            ArtifactError: a file is not the one that was exported or built.
        """
        exported = self.exported_files
        for name in names or exported:
            if name not in self.manifest.files:
                raise ArtifactError(f"{self.path / MANIFEST} does not list '{name}'; export the checkpoint again")
            try:
                found = sha256_of(self.path / name)
            except OSError as error:
                again = "" if name in exported else "; run 'rwkv-edge build' again"
                raise ArtifactError(f"{self.path / name} cannot be read: {error.strerror}{again}") from error
            if found != self.manifest.files[name].sha256:
                hashes = f"sha256 {found[:12]}…, expected {self.manifest.files[name].sha256[:12]}…"
                made, again = "exported", "export the checkpoint again"
                if name not in exported:
                    made, again = "built", "run 'rwkv-edge build' again"
                raise ArtifactError(f"{self.path / name} is not the file that was {made} ({hashes}); {again}")

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


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json."""
    text = json.dumps(manifest.to_json(), indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may be any bytes
