"""Helpers of parity tests: export to a folder, run, compare."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.session import open_session


def exported_session(checkpoint: Path, folder: Path, **options: object) -> OrtSession:
    """Export a checkpoint, without chunks unless they are asked for, and open the artifact on one thread."""
    choices = ExportOptions(**{"tokenizer": "none", "chunks": (), **options})  # type: ignore[arg-type]
    export_checkpoint(open_checkpoint(checkpoint), folder, choices)
    session = open_session(folder, threads=1)
    assert isinstance(session, OrtSession)
    return session


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest |difference| over the largest |expected|; NaN is infinite."""
    difference = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)
    return float(difference) if np.isfinite(difference) else float("inf")


def worst_state(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest `relative` of all state tensors and its name."""
    assert set(found) == set(expected)
    return max((relative(found[name].reshape(expected[name].shape), expected[name]), name) for name in expected)


def random_tokens(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Uniform tokens."""
    return [int(t) for t in np.random.default_rng(seed).integers(0, vocab_size, length)]
