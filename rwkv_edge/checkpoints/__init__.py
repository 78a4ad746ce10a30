"""Readers of checkpoints: what a file is gets decided by its first bytes, and said plainly if it is something else."""

from __future__ import annotations

import struct
from pathlib import Path

from rwkv_edge.checkpoints.base import Checkpoint, TensorInfo
from rwkv_edge.checkpoints.folder import is_folder, is_index, open_folder, open_index
from rwkv_edge.checkpoints.layouts import with_official_names
from rwkv_edge.errors import CheckpointError, MissingDependencyError
from rwkv_edge.hub import local_checkpoint

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint", "open_stored"]

_SUFFIXES = {".pth": "pth", ".pt": "pth", ".bin": "pth", ".safetensors": "safetensors", ".st": "safetensors"}
_NAMES = {"pth": "a PyTorch file", "safetensors": "a safetensors file"}
_FOREIGN = (
    (b"GGUF", "a GGUF file of llama.cpp: export the original .pth or .safetensors instead"),
    (b"fmgg", "a GGML file of rwkv.cpp: export the original .pth instead"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights: run 'git lfs pull'"),
    (b"\x80", "a pickle of an old torch.save: load it with torch and save it again, which writes the zip format"),
    (b"<", "an HTML or XML page, not weights: the download answered with a web page"),
    (b"{", "JSON text, not weights"),
)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Map a checkpoint without reading its weights, under the official names whatever its layout.

    Args:
        path: a ``.pth``, ``.bin`` or ``.safetensors`` (``.st``) file, a Hugging Face folder, the index of shards,
            or any of these on the hub, as ``hf://OWNER/NAME[/FILE]``.

    Raises:
        CheckpointError: the file is missing, empty, cut off, or not a checkpoint; the message says what it is.
        MissingDependencyError: a ``.pth`` needs torch.
    """
    return with_official_names(open_stored(path))


def open_stored(path: str | Path) -> Checkpoint:
    """Like `open_checkpoint`, but with the names and shapes that are stored; adapters and tuned states open too."""
    path = local_checkpoint(path)
    if is_folder(path):
        return open_folder(path, _open_file)
    return open_index(path, _open_file) if is_index(path) else _open_file(path)


def _open_file(path: Path) -> Checkpoint:
    kind = _kind_of(path)
    if kind == "safetensors":
        from rwkv_edge.checkpoints.safetensors import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path)
    try:
        from rwkv_edge.checkpoints.pth import PthCheckpoint
    except ImportError as error:
        raise MissingDependencyError("torch", "export", "reading a .pth checkpoint") from error
    return PthCheckpoint(path)


def _kind_of(path: Path) -> str:
    """'pth' or 'safetensors', by the suffix and by the first bytes, which must agree."""
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; a checkpoint file (.pth or .safetensors) was expected")
        if path.exists() and not path.is_file():
            raise CheckpointError(
                f"{path} is a pipe or a device; a checkpoint file (.pth or .safetensors) was expected"
            )
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not head:
        raise CheckpointError(f"{path} is empty; copy or download it again")
    expected = _SUFFIXES.get(path.suffix.lower())
    if expected is None:
        raise CheckpointError(
            f"{path} should end in {', '.join(_SUFFIXES)}, but ends in '{path.suffix}'; "
            f"its content is {_describe(head, size)}"
        )
    if _sniff(head, size) != expected:
        raise CheckpointError(f"{path} should be {_NAMES[expected]}, but is {_describe(head, size)}")
    return expected


def _sniff(head: bytes, size: int) -> str | None:
    if head.startswith(b"PK\x03\x04"):
        return "pth"
    if len(head) > 8 and struct.unpack("<Q", head[:8])[0] <= max(size, 100_000_000) and head[8:9] == b"{":
        return "safetensors"
    return None


def _describe(head: bytes, size: int) -> str:
    kind = _sniff(head, size)
    if kind is not None:
        return f"{_NAMES[kind]}: rename it"
    for magic, text in _FOREIGN:
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(magic):
            return text
    if all(0x20 <= byte < 0x7F or byte in b"\t\r\n" for byte in head):
        return (
            f"text that begins with '{head[:32].decode().splitlines()[0]}': the download failed, or it is another file"
        )
    return f"no format that is known here (it begins with {head[:8].hex(' ')}): damaged, or not a checkpoint"
