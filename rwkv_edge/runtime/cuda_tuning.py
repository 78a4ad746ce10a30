"""Choices of the fused kernels for a GPU and a model: defaults, and what `rwkv-edge tune` found, in a file for each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_edge.errors import InputError
from rwkv_edge.plugins.fused_spec import EMBEDDING, Choice, Dimensions, Stored, Tuning
from rwkv_edge.plugins.nvrtc import cache_folder
from rwkv_edge.runtime.atomic import write_whole

FORMAT = 1
WIDE = 2048  # width D from which a model counts as large
SMALL = Tuning(
    time_mix_in=Choice(32), time_mix_out=Choice(32), channel_mix_in=Choice(128), channel_mix_out=Choice(32, 4),
    head=Choice(128), skip=False,
)  # fmt: skip
LARGE = Tuning(
    time_mix_in=Choice(64, ahead=24, threads=512), time_mix_out=Choice(32, 4), channel_mix_in=Choice(64),
    channel_mix_out=Choice(128, 8), head=Choice(128), skip=True,
)  # fmt: skip


WIDE_FROM = 5
"""Streams from which tensor cores are faster: a step of a few rows takes the wide kernels the time of 16, which a chain
of matrix-vector products, that grows with the streams, reaches at four to five (`benchmarks/wide_gpu.py`)."""


def default_tuning(dimensions: Dimensions, stored: Mapping[str, Stored]) -> Tuning:
    """The choices that were fastest on an H100; sources: `rwkv-edge tune`, `benchmarks/wide_gpu.py`."""
    found = SMALL if dimensions.width < WIDE else LARGE
    if any(name != EMBEDDING for name in stored):  # matrices in integers
        found = dataclasses.replace(found, eager=False)
    return found if dimensions.dtype == "float32" else dataclasses.replace(found, wide_from=WIDE_FROM)


def tuning_for(gpu: str, dimensions: Dimensions, stored: Mapping[str, Stored], cache: Path | None = None) -> Tuning:
    """What was found for this GPU and these kernels, else the defaults.

    Args:
        gpu: its name.
        dimensions: of the model.
        stored: how its matrices are stored.
        cache: folder of such files; see `rwkv_edge.plugins.nvrtc.cache_folder`.
    """
    path = tuning_file(gpu, dimensions, stored, cache)
    try:
        data = json.loads(path.read_bytes())
        return tuning_from_json(data["tuning"]) if data["format"] == FORMAT else default_tuning(dimensions, stored)
    except (OSError, ValueError, KeyError, TypeError, InputError):  # none, or a damaged one: speed alone depends on it
        return default_tuning(dimensions, stored)


def keep_tuning(
    gpu: str, dimensions: Dimensions, stored: Mapping[str, Stored], tuning: Tuning, cache: Path | None = None
) -> Path:
    """Write the file that `tuning_for` reads; returns it.

    Raises:
        OSError: it cannot be written.
    """
    path = tuning_file(gpu, dimensions, stored, cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"format": FORMAT, **_facts(gpu, dimensions, stored), "tuning": dataclasses.asdict(tuning)}
    write_whole(path, (json.dumps(data, indent=2) + "\n").encode())
    return path


def tuning_file(gpu: str, dimensions: Dimensions, stored: Mapping[str, Stored], cache: Path | None = None) -> Path:
    """Where the choices for a GPU and kernels are kept."""
    key = hashlib.sha256(json.dumps(_facts(gpu, dimensions, stored), sort_keys=True).encode()).hexdigest()
    return cache_folder(cache) / "tuning" / f"{key[:32]}.json"


def tuning_from_json(data: Mapping[str, Any]) -> Tuning:
    """The inverse of ``dataclasses.asdict``.

    Raises:
        InputError: fields are missing, unknown or of another type.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Tuning):
        value = data[field.name]
        if isinstance(value, Mapping):
            if not all(type(number) is int and number >= 1 for number in value.values()):
                raise InputError(f"{field.name} must hold positive integers; found {dict(value)}")
            value = Choice(**value)
        elif type(value) is not type(field.default):
            kind = "true or false" if isinstance(field.default, bool) else "a number of streams"
            raise InputError(f"{field.name} must be {kind}; found {value!r}")
        values[field.name] = value
    return Tuning(**values)


def _facts(gpu: str, dimensions: Dimensions, stored: Mapping[str, Stored]) -> dict[str, Any]:
    """What the choices are for: they do not depend on the number of layers."""
    parts = {(name.rpartition(".")[2], how.form, how.block) for name, how in stored.items()}
    return {"gpu": gpu, "dimensions": dataclasses.asdict(dimensions), "stored": sorted(map(str, parts))}
