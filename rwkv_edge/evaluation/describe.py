"""What `rwkv-edge info` tells about a checkpoint or an artifact, without loading weights."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rwkv_edge.artifact import Artifact, Manifest
from rwkv_edge.checkpoints import Checkpoint, open_checkpoint, open_stored
from rwkv_edge.checkpoints.adapters import is_adapter, read_adapter
from rwkv_edge.checkpoints.folder import is_folder, weight_files
from rwkv_edge.checkpoints.states import is_tuned_state, tuned_state_names
from rwkv_edge.evaluation.roofline import DEVICES, bytes_per_token, tokens_per_second
from rwkv_edge.models.versions import model_from_checkpoint
from rwkv_edge.spec import ITEM_SIZE, PRECISIONS, ModelSpec

WEIGHTS = "weights.bin"


def describe(path: Path, bandwidth: float | None = None) -> dict[str, Any]:
    """Facts about a checkpoint, an adapter, a tuned state or an artifact folder, as JSON values; ``kind`` says which.

    Args:
        path: what to describe.
        bandwidth: GB/s of this machine, to bound its tokens per second too.

    Raises:
        CheckpointError: not a readable checkpoint.
        ArtifactError: not a readable artifact.
    """
    if is_folder(path) and not weight_files(path):
        return _describe_artifact(path, bandwidth)
    stored = open_stored(path)
    if is_adapter(stored):
        return _describe_adapter(path, stored)
    if is_tuned_state(stored):
        return _describe_tuned_state(path, stored)
    return _describe_checkpoint(path, bandwidth)


def _describe_adapter(path: Path, stored: Checkpoint) -> dict[str, Any]:
    adapter = read_adapter(stored)
    return {
        "kind": "adapter",
        "method": adapter.kind,
        "ranks": adapter.ranks,
        "layers": adapter.layers,
        "targets": adapter.target_kinds,
        "whole_tensors": len(adapter.whole),
        "needs_alpha": adapter.is_lora,
        **_file(path, stored),
    }


def _describe_tuned_state(path: Path, stored: Checkpoint) -> dict[str, Any]:
    names = tuned_state_names(stored)
    first = next((stored.tensors[name].shape for name in names["wkv"].values()), ())
    return {
        "kind": "tuned state",
        "layers": sorted(names["wkv"]),
        "shape": list(first),
        "token_shifts": bool(names["att_shift"] or names["ffn_shift"]),
        **_file(path, stored),
    }


def _file(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    infos = checkpoint.tensors.values()
    return {
        "path": str(path),
        "layout": checkpoint.layout,
        "parameters": sum(info.numel for info in infos),
        "dtypes": sorted({info.dtype for info in infos}),
        "tensors": len(infos),
        "file_bytes": sum(info.nbytes for info in infos),
    }


def _describe_checkpoint(path: Path, bandwidth: float | None) -> dict[str, Any]:
    checkpoint = open_checkpoint(path)
    weights, tokens = {}, {}
    spec = model_from_checkpoint(checkpoint).spec
    for precision in PRECISIONS:
        model = model_from_checkpoint(checkpoint, precision)
        nbytes = sum(p.nbytes(model.spec.act_dtype) for p in model.params)
        weights[precision] = nbytes
        tokens[precision] = _bounds(nbytes, model.spec, bandwidth, model.spec.act_dtype)
    return {
        "kind": "checkpoint",
        **_file(path, checkpoint),
        **_dimensions(spec),
        "tuned_state_layers": len(tuned_state_names(checkpoint)["wkv"]),
        "weight_bytes": weights,
        "state_bytes": spec.state_nbytes,
        "tokens_per_second_bound": tokens,
    }


def _describe_artifact(path: Path, bandwidth: float | None) -> dict[str, Any]:
    artifact = Artifact.open(path)
    manifest, spec = artifact.manifest, artifact.manifest.spec
    nbytes = _weight_bytes(manifest)
    table = "int8" if (manifest.quantization or {}).get("embedding") == "int8" else spec.act_dtype
    label = f"{manifest.quantization['scheme']}, {spec.precision}" if manifest.quantization else spec.precision
    return {
        "kind": "artifact",
        "path": str(path),
        **_dimensions(spec),
        "precision": spec.precision,
        "batch": spec.batch if spec.batch is not None else "dynamic",
        "parameters": manifest.source.get("parameters"),
        "source": dict(manifest.source),
        "quantization": dict(manifest.quantization) if manifest.quantization else None,
        "weight_bytes": {label: nbytes},
        "state_bytes": spec.state_nbytes,
        "graphs": [
            {"file": g.file, "kind": g.kind, "tokens": g.tokens, "target": g.target, "nodes": g.nodes, "wkv": g.wkv}
            for g in manifest.graphs
        ],
        "engines": [
            {**asdict(engine), "targets": list(engine.targets), "bytes": manifest.files[engine.file].nbytes}
            for engine in manifest.engines
        ],
        "tokenizer": manifest.tokenizer["kind"] if manifest.tokenizer else None,
        "model_hash": manifest.model_hash,
        "tools": dict(manifest.tools),
        "warnings": list(manifest.warnings),
        "tokens_per_second_bound": {label: _bounds(nbytes, spec, bandwidth, table)},
    }


def _weight_bytes(manifest: Manifest) -> int:
    """Size of the weights; in an artifact of engines only, of the smallest engine, which holds them."""
    if WEIGHTS in manifest.files:
        return manifest.files[WEIGHTS].nbytes
    return min(manifest.files[engine.file].nbytes for engine in manifest.engines)


def _dimensions(spec: ModelSpec) -> dict[str, Any]:
    return {
        "version": spec.version,
        "layers": spec.n_layer,
        "width": spec.n_embd,
        "attention_width": spec.n_att,
        "ffn_width": spec.n_ffn,
        "heads": spec.n_head,
        "head_size": spec.head_size,
        "vocabulary": spec.vocab_size,
        **spec.extra,
    }


def _bounds(weight_bytes: int, spec: ModelSpec, bandwidth: float | None, embedding: str) -> dict[str, float]:
    table = math.prod((spec.vocab_size, spec.n_embd)) * ITEM_SIZE[embedding]
    nbytes = bytes_per_token(weight_bytes, table, spec.vocab_size, spec.state_nbytes)
    places = DEVICES | ({"this machine": bandwidth} if bandwidth else {})
    return {name: round(tokens_per_second(nbytes, value), 1) for name, value in places.items()}
