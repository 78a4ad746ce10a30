"""A tuned state as the initial state of an artifact."""

from __future__ import annotations

from pathlib import Path

from rwkv_edge.checkpoints.base import Checkpoint
from rwkv_edge.checkpoints.states import TunedState, load_tuned_state, tuned_state_names
from rwkv_edge.errors import CheckpointError
from rwkv_edge.models.versions import Model

STATE_FILE = "initial_state.safetensors"


def write_initial_state(model: Model, source: Path | None, folder: Path) -> bool:
    """Write the tuned state of a file, or else of the checkpoint itself, under the names of the state tensors.

    Tensors are float32 without a batch axis; those that tuning left out are not in the file.

    Args:
        model: what it must fit.
        source: a file with ``blocks.i.att.time_state``, or None.
        folder: where to write.

    Returns:
        Whether there was a tuned state.

    Raises:
        CheckpointError: it is of another model, or the version has no state that can be tuned.
    """
    found: Path | Checkpoint | None = source
    if found is None and any(tuned_state_names(model.checkpoint).values()):
        found = model.checkpoint
    if found is None:
        return False
    if not any(t.name == "wkv.0" for t in model.spec.state):
        raise CheckpointError(f"RWKV-{model.spec.version} has no matrix state that a tuned state could replace")
    _write(model, load_tuned_state(found, model.spec), folder / STATE_FILE)
    return True


def _write(model: Model, tuned: TunedState, path: Path) -> None:
    from safetensors.torch import save_file

    transpose = model.architecture.tuned_state_transposed
    tensors = {f"wkv.{i}": s.transpose(-2, -1) if transpose else s for i, s in tuned.wkv.items()}
    tensors |= {f"att_shift.{i}": x for i, x in tuned.att_shift.items()}
    tensors |= {f"ffn_shift.{i}": x for i, x in tuned.ffn_shift.items()}
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, path)
