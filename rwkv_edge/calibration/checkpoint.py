"""Where a calibration that was killed goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rwkv_edge.runtime.atomic import write_whole


class Checkpoint:
    """A file beside the one that will be written, which is replaced whole.

    Args:
        target: the file that the work will give.
        digest: of everything that decides its content; a checkpoint of another is not used.
    """

    def __init__(self, target: Path, digest: str) -> None:
        self.path = target.with_name(f"{target.name}.partial")
        self._digest = digest

    def read(self) -> tuple[int, dict[str, np.ndarray]]:
        """Windows that were done, and arrays; 0 and nothing where there is no usable checkpoint."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="numpy") as file:
                done, _, digest = (file.metadata() or {}).get("rwkv_edge.checkpoint", "").partition(" ")
                if digest != self._digest:
                    return 0, {}
                return int(done), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError):  # none, or one that was damaged: begin anew
            return 0, {}

    def write(self, done: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace it.

        Raises:
            OSError: it cannot be written.
        """
        from safetensors.numpy import save

        write_whole(self.path, save(dict(arrays), {"rwkv_edge.checkpoint": f"{done} {self._digest}"}))

    def remove(self) -> None:
        """The work is done."""
        with contextlib.suppress(OSError):
            self.path.unlink()
