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
    from rwkv_edge.runtime.cache import PromptCache
    from rwkv_edge.runtime.loop import Generation, generate_step, generate_text
    from rwkv_edge.runtime.open import OpenModel, open_model
    from rwkv_edge.runtime.pool import StatePool, Stream
    from rwkv_edge.runtime.sampling import Sampler, SamplerConfig
    from rwkv_edge.runtime.session import Session, open_session
    from rwkv_edge.runtime.snapshot import History, Snapshot, load_snapshot, save_snapshot
    from rwkv_edge.spec import ModelSpec, StateTensor

_HOMES = {
    "Artifact": "rwkv_edge.artifact",
    "ExportOptions": "rwkv_edge.exporters.onnx",
    "Generation": "rwkv_edge.runtime.loop",
    "History": "rwkv_edge.runtime.snapshot",
    "ModelSpec": "rwkv_edge.spec",
    "OpenModel": "rwkv_edge.runtime.open",
    "PromptCache": "rwkv_edge.runtime.cache",
    "RwkvEdgeError": "rwkv_edge.errors",
    "Sampler": "rwkv_edge.runtime.sampling",
    "SamplerConfig": "rwkv_edge.runtime.sampling",
    "Session": "rwkv_edge.runtime.session",
    "Snapshot": "rwkv_edge.runtime.snapshot",
    "StatePool": "rwkv_edge.runtime.pool",
    "StateTensor": "rwkv_edge.spec",
    "Stream": "rwkv_edge.runtime.pool",
    "export_checkpoint": "rwkv_edge.exporters.onnx",
    "generate_step": "rwkv_edge.runtime.loop",
    "generate_text": "rwkv_edge.runtime.loop",
    "load_snapshot": "rwkv_edge.runtime.snapshot",
    "open_checkpoint": "rwkv_edge.checkpoints",
    "open_model": "rwkv_edge.runtime.open",
    "open_session": "rwkv_edge.runtime.session",
    "save_snapshot": "rwkv_edge.runtime.snapshot",
    "verify_artifact": "rwkv_edge.evaluation.verify",
}

__all__ = [
    "Artifact",
    "ExportOptions",
    "Generation",
    "History",
    "ModelSpec",
    "OpenModel",
    "PromptCache",
    "RwkvEdgeError",
    "Sampler",
    "SamplerConfig",
    "Session",
    "Snapshot",
    "StatePool",
    "StateTensor",
    "Stream",
    "export_checkpoint",
    "generate_step",
    "generate_text",
    "load_snapshot",
    "open_checkpoint",
    "open_model",
    "open_session",
    "save_snapshot",
    "verify_artifact",
]


def __getattr__(name: str) -> Any:
    """Import a public name where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rwkv_edge' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
