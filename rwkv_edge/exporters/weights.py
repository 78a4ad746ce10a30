"""Writing weights.bin: parameter by parameter, chunk by chunk, hashed on the way."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_edge.checkpoints.base import Checkpoint
from rwkv_edge.exporters.layout import WeightLayout

if TYPE_CHECKING:
    import torch

Progress = Callable[[int], None]
"""Called with the number of bytes written since the last call."""


class Sink:
    """A file that is written and hashed by a thread, while the caller converts the next chunk.

    Writing and sha256 both release the interpreter. An error of the disk is raised by the next `put` or by `close`.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._queue: queue.Queue[bytes | memoryview | None] = queue.Queue(maxsize=2)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (block := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._write(memoryview(block))
                except Exception as error:  # usually a full disk; the caller raises it
                    self._error = error  # keep emptying the queue, so that the caller is not held up

    def _write(self, block: memoryview) -> None:
        while len(block):
            block = block[self._write_some(block) :]

    def _write_some(self, block: memoryview) -> int:
        written = self._file.write(block)
        self._digest.update(block[:written])
        return written

    def put(self, block: bytes | memoryview) -> None:
        """Append a block, which must not change until `close`."""
        if self._error is not None:
            raise self._error
        self._queue.put(block)

    def close(self) -> str:
        """Wait for the last block; returns sha256 in hex."""
        self._queue.put(None)
        self._thread.join()
        self._file.close()
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()


def write_weights(
    layout: WeightLayout, checkpoint: Checkpoint, path: Path, progress: Progress
) -> tuple[str, list[str]]:
    """Stream all parameters into one file.

    Memory stays near the largest stored tensor: sources are mapped, converted in chunks, written, and their pages
    dropped.

    Args:
        layout: places and dtypes.
        checkpoint: the source of values.
        path: the file to create.
        progress: told the bytes as they are written.

    Returns:
        sha256 of the file in hex, and the names of tensors that hold NaN or infinity.

    Raises:
        OSError: the disk is full or not writable.
    """
    import torch

    spoiled: list[str] = []
    sink = Sink(path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the copies are bound by memory; measured, more threads only get in the sink's way
    try:
        position = 0
        for place in layout.placed.values():
            sink.put(bytes(place.offset - position))
            written, finite = 0, True
            for chunk in place.param.chunks(checkpoint, getattr(torch, place.dtype)):
                block = _bytes_of(chunk)
                sink.put(block)
                progress(len(block))
                written += len(block)
                finite = finite and _is_finite(chunk)
            if written != place.length:
                raise RuntimeError(f"parameter '{place.param.name}' has {written} bytes, its place {place.length}")
            position = place.offset + place.length
            if not finite:
                bad = [n for n in place.param.sources if not torch.isfinite(checkpoint.load(n)).all()]
                spoiled += bad or [f"{place.param.name} (overflows {place.dtype})"]
            for name in place.param.sources:
                checkpoint.release(name)
    finally:
        torch.set_num_threads(threads)
        digest = sink.close()
    return digest, spoiled


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    import torch

    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type, unused-ignore]


def _is_finite(chunk: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; a sum finds that out at the speed of memory."""
    import torch

    total = chunk.sum() if chunk.element_size() > 2 else chunk.sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(chunk).all())
