"""What ``auto`` takes: engines, else our own CUDA kernels, else ONNX Runtime, by what fits and is there."""

from __future__ import annotations

from rwkv_edge.artifact import Artifact
from rwkv_edge.engines import ENGINE_BACKENDS
from rwkv_edge.errors import MissingDependencyError, SessionError

LEAST_CAPABILITY = (7, 5)
"""Of the GPUs for which the kernels compile."""


def engine_backend(artifact: Artifact, backend: str) -> str | None:
    """The backend whose engines run the artifact; None where there are none that fit, or another is asked for."""
    engines = artifact.manifest.engines
    if backend != "auto" or not engines:
        return backend if backend in ENGINE_BACKENDS else None
    from rwkv_edge.runtime.tensorrt import fitting_backend

    found = fitting_backend(artifact)
    if found is None and not artifact.manifest.graphs:
        return engines[0].backend  # there is nothing else in it: its refusal says what to do
    return found


def kernels_fit(artifact: Artifact) -> bool:
    """Whether our own kernels run the artifact on the first GPU: packages, driver, capability, version, form."""
    from rwkv_edge.plugins.nvrtc import nvrtc_version
    from rwkv_edge.runtime.cuda import checked_dimensions
    from rwkv_edge.runtime.cuda_driver import device_capability

    try:
        capability = device_capability()
        if capability is None or capability < LEAST_CAPABILITY:
            return False
        nvrtc_version()
        checked_dimensions(artifact)
    except (MissingDependencyError, SessionError):
        return False
    return True
