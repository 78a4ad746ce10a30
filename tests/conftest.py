"""Fixtures that several files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RWKV_JIT_ON", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each worker: more would wait for each other, spinning
    os.environ.setdefault("OMP_NUM_THREADS", "1")
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The test models beside the checkout."""
    folder = SHARED / "models"
    if not folder.is_dir():
        pytest.skip("../shared/models is absent")
    return folder


@pytest.fixture(scope="session")
def shared_text() -> Path:
    """The texts beside the checkout."""
    folder = SHARED / "text"
    if not folder.is_dir():
        pytest.skip("../shared/text is absent")
    return folder


@pytest.fixture(scope="session")
def gpu() -> Iterator[str]:
    """The device of torch's tensors, with its context current."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU")
    pytest.importorskip("cuda.bindings")
    torch.zeros(1, device="cuda")
    yield "cuda"
    torch.cuda.synchronize()
