"""The table of versions: tensor names decide which file of this package describes a checkpoint.

The order matters: later architectures keep most names of earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module

from rwkv_edge.checkpoints.base import Checkpoint, TensorInfo
from rwkv_edge.errors import CheckpointError, UnsupportedVersionError
from rwkv_edge.models.architecture import Architecture
from rwkv_edge.models.params import Header, Param
from rwkv_edge.spec import ModelSpec

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Signature:
    """How a version is recognised, and the module of this package that implements it or the reason why none does."""

    version: str
    matches: Callable[[Tensors], bool]
    module: str | None
    refusal: str = ""


def _has(part: str) -> Callable[[Tensors], bool]:
    return lambda tensors: any(part in name for name in tensors)


def _per_channel_decay(tensors: Tensors) -> bool:
    decay = next((info for name, info in tensors.items() if name.endswith("att.time_decay")), None)
    return _has("att.ln_x")(tensors) and decay is not None and len(decay.shape) == 2 and decay.shape[1] > 1


SIGNATURES = (
    Signature("8", _has("ffn.enn.weight"), None, "release candidates of RWKV-8 change from file to file"),
    Signature("7b", _has("qkv."), None, "its attention keeps a cache that grows, so there is no state of fixed size"),
    Signature(
        "6a", _has("att.gate_w1"), None, "x060a is an experiment with a low-rank gate that no released model uses"
    ),
    Signature(
        "6b/6c", _has("att.time_maa_rkvw_w1"), None, "x060b and x060c are experiments that no released model uses"
    ),
    Signature("7a", _has("ffn.s_emb.weight"), "v7"),
    Signature("7", _has("att.r_k"), "v7"),
    Signature("6", _has("att.time_maa_x"), "v6"),
    Signature("5.2", _per_channel_decay, "v5"),
    Signature("5.1", lambda t: _has("att.ln_x")(t) and _has("att.gate.weight")(t), "v5"),
    Signature("5.0", _has("att.ln_x"), "v5"),
    Signature("4", _has("att.time_decay"), "v4"),
)


def signature_of(tensors: Tensors, path: object) -> Signature:
    """The first row of the table that matches.

    Raises:
        CheckpointError: the tensors are not those of an RWKV model.
    """
    for signature in SIGNATURES:
        if signature.matches(tensors):
            return signature
    sample = ", ".join(sorted(tensors)[:3])
    raise CheckpointError(
        f"{path} is not an RWKV checkpoint: expected names such as 'blocks.0.att.r_k', found {sample}"
    )


def architecture_of(tensors: Tensors, path: object) -> Architecture:
    """The version's implementation.

    Raises:
        CheckpointError: not an RWKV model.
        UnsupportedVersionError: a version that cannot be exported, with the reason.
    """
    signature = signature_of(tensors, path)
    if signature.module is None:
        raise UnsupportedVersionError(
            f"{path} is RWKV-{signature.version}, which cannot be exported: {signature.refusal}"
        )
    architectures: dict[str, Architecture] = import_module(f"rwkv_edge.models.{signature.module}").ARCHITECTURES
    return architectures[signature.version]


def architecture_named(version: str) -> Architecture:
    """The implementation of a version by its name in a spec.

    Raises:
        UnsupportedVersionError: this release knows none of that name.
    """
    module = next((s.module for s in SIGNATURES if s.version == version), None)
    if module is None:
        raise UnsupportedVersionError(
            f"RWKV-{version} is not known here; use the version of rwkv-edge that exported it"
        )
    architectures: dict[str, Architecture] = import_module(f"rwkv_edge.models.{module}").ARCHITECTURES
    return architectures[version]


@dataclass(frozen=True)
class Model:
    """A checkpoint together with the description of what it holds."""

    checkpoint: Checkpoint
    architecture: Architecture
    spec: ModelSpec
    params: tuple[Param, ...]


def model_from_checkpoint(
    checkpoint: Checkpoint, precision: str = "fp32", batch: int | None = 1, rescale: int | None = None
) -> Model:
    """Recognise the version, derive the dimensions and check every tensor's shape; reads no weight.

    Args:
        checkpoint: an open checkpoint.
        precision: 'fp32', 'fp16' or 'bf16': what an export would store.
        batch: batch size of an export, or None for dynamic.
        rescale: layers after which the residual stream is halved, 0 for never; None for what the version needs in this
            precision.

    Raises:
        CheckpointError: not an RWKV model, a tensor is missing, or has a shape that does not fit.
        UnsupportedVersionError: a version that cannot be exported.
    """
    architecture = architecture_of(checkpoint.tensors, checkpoint.path)
    header = Header(checkpoint.tensors, checkpoint.path)
    spec = architecture.describe(header, precision, batch)
    if rescale is None:
        rescale = architecture.fp16_rescale if precision == "fp16" else 0
    spec = replace(spec, rescale=rescale)
    return Model(checkpoint, architecture, spec, tuple(architecture.params(header, spec)))
