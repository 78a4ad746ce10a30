"""The state before the first token: what an artifact carries where state tuning gave it one, else fill values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rwkv_edge.artifact import Artifact
from rwkv_edge.errors import ArtifactError
from rwkv_edge.spec import ModelSpec, stored_from_float32


def initial_arrays(artifact: Artifact) -> dict[str, np.ndarray]:
    """State tensors by name, float32 without a batch axis; those that are absent begin with their fill value.

    Raises:
        ArtifactError: the file is damaged or of another model.
    """
    if artifact.manifest.initial_state is None:
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = artifact.path / artifact.manifest.initial_state
    try:
        arrays: dict[str, np.ndarray] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); export the checkpoint again") from error
    shapes = {t.name: t.shape for t in artifact.manifest.spec.state}
    for name, array in arrays.items():
        if shapes.get(name) != array.shape or array.dtype != np.float32 or not np.isfinite(array).all():
            raise ArtifactError(f"{path}: '{name}' does not fit the model; export the checkpoint again")
    return arrays


def stored_initial(spec: ModelSpec, tuned: Mapping[str, np.ndarray], batch: int) -> dict[str, np.ndarray]:
    """State tensors [B, …] in the dtypes that the graphs take, for ``batch`` streams that begin alike.

    Args:
        spec: names, shapes, dtypes and fill values.
        tuned: from `initial_arrays`.
        batch: number of streams.
    """
    stored = {}
    for t in spec.state:
        value = np.full(t.shape, t.fill, np.float32) if t.name not in tuned else tuned[t.name]
        stored[t.name] = stored_from_float32(np.repeat(value[None], batch, axis=0), t.dtype)
    return stored
