"""PyTorch checkpoints (.pth): memory-mapped, and read by the unpickler that runs no code."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rwkv_edge.checkpoints.base import FLOAT_DTYPES, TensorInfo, release_pages
from rwkv_edge.errors import CheckpointError


class PthCheckpoint:
    """A dictionary of tensors that ``torch.save`` wrote in the zip format."""

    layout = "PyTorch .pth"

    def __init__(self, path: Path) -> None:
        """Maps the file; reads no weight.

        Raises:
            CheckpointError: not a zip of ``torch.save``, cut off, holds code, or holds something else than named
            tensors.
        """
        self.path = path
        _check_name(path)
        _check_zip(path)
        self._values = _tensors_of(path, _load_mapped(path))
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._values.items()
        }

    def load(self, name: str) -> torch.Tensor:
        """The mapped tensor, in its stored dtype."""
        return self._values[name]

    def release(self, name: str) -> None:
        """Drop the tensor's resident pages."""
        if self._values[name].is_contiguous():
            release_pages(self._values[name])


def _check_name(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path} has a name that is not UTF-8, which torch cannot open; rename it") from error


def _check_zip(path: Path) -> None:
    """Refuse what is cut off or compressed before torch maps it: a mapping past the end of a file is a crash."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"{path}: '{entry.filename}' is compressed; re-save the file with torch.save")
                if entry.header_offset + entry.file_size > size:
                    raise CheckpointError(f"{path} is cut off inside '{entry.filename}'; copy or download it again")
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"{path} is cut off or damaged ({error}); copy or download it again") from error


def _load_mapped(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about formats of other tools; the checks below decide
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises whatever a damaged pickle leads it to
        unpickling = isinstance(error, pickle.UnpicklingError)
        if unpickling and (found := re.search(r"GLOBAL (\S+)", str(error))):
            raise CheckpointError(
                f"{path} holds Python objects beside tensors ({found[1]}), which could run code when they are read, "
                "and is refused; re-save its plain dictionary of tensors, or use .safetensors"
            ) from error
        reason = "its pickle is broken" if unpickling else re.split(r"\.\s|\n", str(error))[0] or type(error).__name__
        raise CheckpointError(f"{path} is damaged ({reason[:200]}); copy or download it again") from error


def _tensors_of(path: Path, loaded: Any) -> dict[str, torch.Tensor]:
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{path} should hold a dictionary of named tensors, but holds a {type(loaded).__name__}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path} should map tensor names to tensors, but '{str(name)[:80]}' is a {type(value).__name__}"
            )
        if str(value.dtype).removeprefix("torch.") not in FLOAT_DTYPES or value.layout != torch.strided:
            raise CheckpointError(f"{path}: tensor '{name}' is {value.dtype}, expected dense fp32, fp16 or bf16")
        if value.device.type != "cpu" or value.is_neg():
            raise CheckpointError(f"{path}: tensor '{name}' has no values of its own; save the model's tensors again")
    return {name: value.detach() for name, value in loaded.items()}  # parameters are saved with their gradient's flag
