"""Artifacts whose states tests save and load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import SHAPE, write_artifact

from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.session import open_session


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """'one' and 'other' of batch 1, 'many' of any, 'half' in fp16, 'tuned' with an initial state; no chunks."""
    folder = tmp_path_factory.mktemp("artifacts")
    write_artifact(folder / "one")
    write_artifact(folder / "other", 1)
    write_artifact(folder / "many", 0, "--batch", "dynamic")
    write_artifact(folder / "half", 0, "--precision", "fp16", "--batch", "dynamic")
    heads = SHAPE.n_embd // SHAPE.head_size
    tuned = {f"blocks.{i}.att.time_state": torch.ones(heads, SHAPE.head_size, SHAPE.head_size) for i in range(2)}
    torch.save(tuned, folder / "time_state.pth")
    write_artifact(folder / "tuned", 0, "--state", str(folder / "time_state.pth"))
    return folder


@pytest.fixture(scope="session")
def session(artifacts: Path) -> OrtSession:
    """Of 'one'."""
    session = open_session(artifacts / "one", threads=1)
    assert isinstance(session, OrtSession)
    return session
