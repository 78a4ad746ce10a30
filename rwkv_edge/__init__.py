"""rwkv-edge: RWKV language models on edge devices.

The public names are loaded when they are first used, so that a program on the device imports no exporter::

    from rwkv_edge import open_model, generate_text, Sampler, SamplerConfig
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_edge.artifact import Artifact
    from rwkv_edge.checkpoints import open_checkpoint
    from rwkv_edge.errors import RwkvEdgeError
    from rwkv_edge.evaluation.verify import verify_artifact
    from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
    from rwkv_edge.runtime.loop import Generation, generate_step, generate_text
    from rwkv_edge.runtime.open import OpenModel, open_model
    from rwkv_edge.runtime.sampling import Sampler, SamplerConfig
    from rwkv_edge.runtime.session import Session, open_session
    from rwkv_edge.spec import ModelSpec, StateTensor

_HOMES = {
    "Artifact": "rwkv_edge.artifact",
    "ExportOptions": "rwkv_edge.exporters.onnx",
    "Generation": "rwkv_edge.runtime.loop",
    "ModelSpec": "rwkv_edge.spec",
    "OpenModel": "rwkv_edge.runtime.open",
    "RwkvEdgeError": "rwkv_edge.errors",
    "Sampler": "rwkv_edge.runtime.sampling",
    "SamplerConfig": "rwkv_edge.runtime.sampling",
    "Session": "rwkv_edge.runtime.session",
    "StateTensor": "rwkv_edge.spec",
    "export_checkpoint": "rwkv_edge.exporters.onnx",
    "generate_step": "rwkv_edge.runtime.loop",
    "generate_text": "rwkv_edge.runtime.loop",
    "open_checkpoint": "rwkv_edge.checkpoints",
    "open_model": "rwkv_edge.runtime.open",
    "open_session": "rwkv_edge.runtime.session",
    "verify_artifact": "rwkv_edge.evaluation.verify",
}

__all__ = [
    "Artifact",
    "ExportOptions",
    "Generation",
    "ModelSpec",
    "OpenModel",
    "RwkvEdgeError",
    "Sampler",
    "SamplerConfig",
    "Session",
    "StateTensor",
    "export_checkpoint",
    "generate_step",
    "generate_text",
    "open_checkpoint",
    "open_model",
    "open_session",
    "verify_artifact",
]


def __getattr__(name: str) -> Any:
    """Import a public name where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rwkv_edge' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
