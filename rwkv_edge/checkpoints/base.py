"""What a checkpoint is to the rest of the package: names, shapes and dtypes at once, values one tensor at a time."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rwkv_edge.spec import ITEM_SIZE

if TYPE_CHECKING:
    import torch

FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")
"""dtypes that a weight may be stored in."""

_MADV_DONTNEED = 4  # linux/mman.h: drop the pages; a file mapping reads them again when they are touched


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor, known without reading its values."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.numel * ITEM_SIZE[self.dtype]


class Checkpoint(Protocol):
    """A file (or several) of named weights, mapped lazily."""

    @property
    def path(self) -> Path:
        """The file or folder that the user named."""
        ...

    @property
    def layout(self) -> str:
        """The file layout in words, for `info` and the manifest."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name → shape and dtype, in official RWKV key names."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype; its pages are mapped, not copied, where the file allows it."""
        ...

    def release(self, name: str) -> None:
        """Give the pages that `load` touched back to the system."""
        ...


def release_pages(tensor: torch.Tensor) -> None:
    """Drop the resident pages of a tensor that maps a file (Linux; elsewhere the system decides by itself).

    Only whole pages inside the tensor are dropped. Must not be called on memory that is not a file mapping: its content
    would be lost.
    """
    if not sys.platform.startswith("linux"):
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    stop = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if stop > start:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(_MADV_DONTNEED))
