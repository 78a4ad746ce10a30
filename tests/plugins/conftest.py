"""A GPU for the tests marked `gpu`, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def gpu() -> Iterator[str]:
    """The device of torch's tensors, with its context current."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU")
    pytest.importorskip("cuda.bindings")
    torch.zeros(1, device="cuda")
    yield "cuda"
    torch.cuda.synchronize()


@pytest.fixture(scope="session")
def nvrtc_architectures() -> tuple[int, ...]:
    """The compute capabilities that the installed NVRTC knows."""
    from rwkv_edge.errors import MissingDependencyError
    from rwkv_edge.plugins import nvrtc

    try:
        return nvrtc.supported_capabilities()
    except MissingDependencyError as error:
        pytest.skip(str(error))
