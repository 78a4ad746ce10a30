"""What the installed NVRTC knows."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def nvrtc_architectures() -> tuple[int, ...]:
    """The compute capabilities that the installed NVRTC knows."""
    from rwkv_edge.errors import MissingDependencyError
    from rwkv_edge.plugins import nvrtc

    try:
        return nvrtc.supported_capabilities()
    except MissingDependencyError as error:
        pytest.skip(str(error))
