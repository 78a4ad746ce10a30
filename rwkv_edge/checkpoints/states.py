"""Tuned states: the initial state that state tuning learns, in a file of its own or inside a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_edge.checkpoints import open_stored
from rwkv_edge.checkpoints.base import Checkpoint
from rwkv_edge.checkpoints.layouts import TUNED_STATE, layout_of, with_official_names
from rwkv_edge.errors import CheckpointError
from rwkv_edge.spec import ModelSpec

if TYPE_CHECKING:
    import torch

Places = dict[str, dict[int, str]]
_PLACES = {
    ("att", "time_state"): "wkv",
    ("attention", "time_state"): "wkv",
    ("att", "ts_state"): "att_shift",
    ("attention", "ts_state"): "att_shift",
    ("ffn", "ts_state"): "ffn_shift",
    ("feed_forward", "ts_state"): "ffn_shift",
}


@dataclass(frozen=True)
class TunedState:
    """The state before the first token, by layer, in the file's dtype and orientation.

    What RWKV-PEFT trains has for S [H, N, N] the axes [head, value, key] in every version: its kernels read row i for
    value i (`cuda/rwkv7_state_clampw.cu`, `cuda/wkv6state_cuda.cu`). So RWKV-7, whose S is [value, key], takes it as it
    is, and RWKV-5 and 6, whose S is [key, value], take its transpose (RWKV-Runner, `backend-python/utils/rwkv.py`, does
    just that).

    Attributes:
        wkv: layer → [H, N, N].
        att_shift: layer → [D], the token shift before time mixing; only where 'fullstate' tuning trained it.
        ffn_shift: layer → [D], before channel mixing.
        names: the tensors that were read.
    """

    wkv: Mapping[int, torch.Tensor]
    att_shift: Mapping[int, torch.Tensor]
    ffn_shift: Mapping[int, torch.Tensor]
    names: tuple[str, ...]


def is_tuned_state(stored: Checkpoint) -> bool:
    """Whether a file holds a tuned state and nothing else."""
    return all(TUNED_STATE.search(name) for name in stored.tensors)


def tuned_state_names(checkpoint: Checkpoint) -> Places:
    """State tensor ('wkv', 'att_shift', 'ffn_shift') → layer → name; reads no values.

    Raises:
        CheckpointError: two tensors are for one place.
    """
    found: Places = {"wkv": {}, "att_shift": {}, "ffn_shift": {}}
    for name in checkpoint.tensors:
        match = TUNED_STATE.search(name)
        place = _PLACES.get((match[2], match[3])) if match else None
        if match is None or place is None:
            continue
        layer = int(match[1])
        if layer in found[place]:
            raise CheckpointError(f"{checkpoint.path}: '{found[place][layer]}' and '{name}' are for one place")
        found[place][layer] = name
    return found


def load_tuned_state(source: str | Path | Checkpoint, spec: ModelSpec) -> TunedState:
    """Read a tuned state and check that it fits a model.

    A state file in web-rwkv's ``.st`` form stores S transposed; as nothing in it says so, the suffix does: ``.st`` is
    taken to be web-rwkv's, every other suffix to be as RWKV-PEFT trained it.

    Args:
        source: a file with ``blocks.i.att.time_state``, or an open checkpoint that has them inside.
        spec: the model.

    Raises:
        CheckpointError: no tuned state, one of another model, or one that leaves layers out.
    """
    checkpoint, transposed = _open(source)
    names = tuned_state_names(checkpoint)
    if not names["wkv"]:
        raise CheckpointError(
            f"{checkpoint.path} holds no tuned state: expected tensors such as 'blocks.0.att.time_state'"
        )
    square, width = (spec.n_head, spec.head_size, spec.head_size), (spec.n_embd,)
    for place, shape in (("wkv", square), ("att_shift", width), ("ffn_shift", width)):
        _check(checkpoint, names[place], shape, spec)
    wkv = {i: checkpoint.load(name) for i, name in sorted(names["wkv"].items())}
    return TunedState(
        wkv={i: tensor.transpose(-2, -1) for i, tensor in wkv.items()} if transposed else wkv,
        att_shift={i: checkpoint.load(name).reshape(width) for i, name in sorted(names["att_shift"].items())},
        ffn_shift={i: checkpoint.load(name).reshape(width) for i, name in sorted(names["ffn_shift"].items())},
        names=tuple(name for place in names.values() for _, name in sorted(place.items())),
    )


def _open(source: str | Path | Checkpoint) -> tuple[Checkpoint, bool]:
    """The checkpoint, and whether its S are transposed."""
    if not isinstance(source, (str, Path)):
        return source, False
    stored = open_stored(source)
    layout = layout_of(stored.tensors)
    if layout is None or not layout.refusal:
        return with_official_names(stored), False
    return stored, stored.path.suffix.lower() == ".st"


def _check(checkpoint: Checkpoint, names: Mapping[int, str], shape: tuple[int, ...], spec: ModelSpec) -> None:
    """Every layer, or none, and each of the shape that the model has."""
    for layer, name in names.items():
        found = checkpoint.tensors[name].shape
        if layer >= spec.n_layer or [n for n in found if n != 1] != [n for n in shape if n != 1]:
            raise CheckpointError(
                f"{checkpoint.path}: '{name}' {list(found)} does not fit the model, which has {spec.n_layer} layers "
                f"with states of shape {list(shape)}"
            )
    missing = sorted(set(range(spec.n_layer)) - set(names))
    if names and missing:
        raise CheckpointError(
            f"{checkpoint.path} has a tuned state of {len(names)} layers, but none of layer {missing[0]}"
        )
