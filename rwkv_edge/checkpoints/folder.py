"""Hugging Face folders: one file of weights, or shards that an index names.

Nothing else in such a folder is read: shapes say what config.json says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_edge.checkpoints.base import Checkpoint, TensorInfo
from rwkv_edge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

OpenFile = Callable[[Path], Checkpoint]

_NAMES = ("model.safetensors", "pytorch_model.bin")
_CANONICAL = (*_NAMES, *(f"{name}.index.json" for name in _NAMES))
_SUFFIXES = (".safetensors", ".st", ".pth", ".pt", ".bin")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")
_TRAINER_FILES = ("training_args.bin", "optimizer", "scheduler", "scaler", "rng_state")  # beside weights, not weights
_MAX_INDEX = 100_000_000  # bytes; the index of a 7B model has 100 kB


def open_folder(folder: Path, open_file: OpenFile) -> Checkpoint:
    """Map the weights of a folder.

    Args:
        folder: with ``model.safetensors`` or ``pytorch_model.bin``, with the index and shards of either, or with
            exactly one other file of weights.
        open_file: opens one file.

    Raises:
        CheckpointError: no weights, several, or an index that does not fit its shards.
    """
    found = weight_files(folder)
    if not found:
        hint = "; it is an exported artifact" if "manifest.json" in _names_in(folder) else ""
        raise CheckpointError(f"{folder} should hold {' or '.join(_NAMES)}, but holds no weights{hint}")
    if len(found) > 1:
        names = ", ".join(found[:4]) + (", …" if len(found) > 4 else "")
        if all(_SHARD.search(name) for name in found):
            index = _CANONICAL[3 if found[0].endswith(".bin") else 2]
            raise CheckpointError(f"{folder} holds shards ({names}) without their index; download {index} too")
        raise CheckpointError(
            f"{folder} holds several files of weights ({names}): pass one of them instead of the folder"
        )
    path = folder / found[0]
    return ShardedCheckpoint(folder, _read_index(path), open_file) if is_index(path) else open_file(path)


def weight_files(folder: Path) -> list[str]:
    """Names of the files that could be meant by a folder: those that transformers looks for, else all weights.

    Raises:
        CheckpointError: the folder cannot be listed.
    """
    names = _names_in(folder)
    canonical = [name for name in _CANONICAL if name in names]
    if canonical:
        return canonical
    if "manifest.json" in names:
        return []  # an artifact; its weights.bin is no checkpoint
    return [name for name in names if name.lower().endswith(_SUFFIXES) and not name.startswith(_TRAINER_FILES)]


def is_folder(path: Path) -> bool:
    """Whether the path is a folder; False where the system does not say."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_index(path: Path) -> bool:
    """Whether the name is that of an index of shards."""
    return path.name.endswith(".index.json")


def open_index(path: Path, open_file: OpenFile) -> Checkpoint:
    """Map the shards that an index (``*.index.json``) names.

    Raises:
        CheckpointError: the index is damaged, leaves its folder, or names a shard or a tensor that is not there.
    """
    return ShardedCheckpoint(path, _read_index(path), open_file)


class ShardedCheckpoint:
    """Several files that one index joins."""

    def __init__(self, path: Path, weight_map: Mapping[str, str], open_file: OpenFile) -> None:
        """Opens every shard and checks that it holds what the index says; loads nothing.

        Args:
            path: the folder, or the index in it.
            weight_map: tensor name → file name in the folder.
            open_file: opens one file.

        Raises:
            CheckpointError: a shard or a tensor is missing, or a shard cannot be read.
        """
        self.path = path
        folder = path.parent if is_index(path) else path
        present = _names_in(folder)
        self._places = weight_map
        self._shards: dict[str, Checkpoint] = {}
        for shard in sorted(set(weight_map.values())):
            if shard not in present:
                raise CheckpointError(f"{path}: the index names the shard '{shard}', which is missing; download it too")
            self._shards[shard] = open_file(folder / shard)
        tensors: dict[str, TensorInfo] = {}
        for name, shard in weight_map.items():
            if name not in self._shards[shard].tensors:
                raise CheckpointError(f"{path}: the index says that tensor '{name}' is in '{shard}', but it is not")
            tensors[name] = self._shards[shard].tensors[name]
        self.tensors: Mapping[str, TensorInfo] = tensors

    @property
    def layout(self) -> str:
        """Such as 'safetensors in 3 shards'."""
        kinds = sorted({shard.layout for shard in self._shards.values()})
        return f"{' and '.join(kinds)} in {len(self._shards)} shards"

    def load(self, name: str) -> torch.Tensor:
        """The mapped tensor, in its stored dtype."""
        return self._shards[self._places[name]].load(name)

    def release(self, name: str) -> None:
        """Drop the tensor's resident pages."""
        self._shards[self._places[name]].release(name)


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if not entry.is_dir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error


def _read_index(path: Path) -> dict[str, str]:
    """weight_map, with file names that stay in the folder."""
    try:
        if path.stat().st_size > _MAX_INDEX:
            raise CheckpointError(
                f"{path} should be an index of a few hundred kB, but is larger than {_MAX_INDEX} bytes"
            )
        index: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a JSON index ({error}); download it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path} has no 'weight_map' from tensor names to files; is it the index of a checkpoint?"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or re.search(r"[/\\:\0]", file) or file in (".", ".."):
            raise CheckpointError(f"{path} puts tensor '{name}' into '{file}', which is not a file of its folder")
    return weight_map
