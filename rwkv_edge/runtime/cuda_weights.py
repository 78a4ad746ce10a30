"""weights.bin on the GPU, as it lies in the file; a head whose rows do not begin where loads do is widened."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_edge.artifact import Artifact
from rwkv_edge.errors import ArtifactError, SessionError
from rwkv_edge.plugins.fused_spec import Stored, head_columns, rounded_up
from rwkv_edge.runtime.cuda_driver import Driver
from rwkv_edge.spec import ITEM_SIZE

WEIGHTS_FILE = "weights.bin"
INDEX_FILE = "weights.json"
FORMATS = ("float", "w8", "w4")
PACKED = {"int4": 2}
"""Dtypes of which a byte holds several."""

INTEGERS = ".q"
SCALES = ".scale"
ALIGNMENT = 16  # bytes: what one load takes


@dataclass(frozen=True)
class Weights:
    """What lies on the device.

    Attributes:
        memory: address of all.
        address: of the tensors by name. A matrix in integers has the name of its parameter, and its scales NAME.scale;
            of one in float, NAME.scale is its own address.
        stored: how the matrices that are not float are stored.
    """

    memory: int
    address: Mapping[str, int]
    stored: Mapping[str, Stored]


def check_scheme(artifact: Artifact) -> None:
    """Refuse quantized artifacts whose meaning the kernels do not have.

    Raises:
        SessionError: int8 activations, or the form of ONNX Runtime's CPU provider.
    """
    facts = artifact.manifest.quantization
    if facts is None:
        return
    odd = ({*facts.get("formats", {}).values()} & {"w8a8"}) or ({"--target cpu"} & {f"--target {facts.get('target')}"})
    if odd:
        raise SessionError(
            f"the backend 'cuda' runs float, int8 and int4 weights (--scheme w8, w4), not {', '.join(sorted(odd))}; "
            "quantize again, or use another backend"
        )


def stored_forms(folder: Path) -> dict[str, Stored]:
    """How the matrices that are not float are stored, by weights.json.

    Raises:
        ArtifactError: it cannot be read.
    """
    with _readable(folder):
        return _stored(_index(folder))


def load_weights(driver: Driver, folder: Path) -> Weights:
    """Copy weights.bin to the device.

    Raises:
        ArtifactError: weights.json does not fit it.
        SessionError: the GPU has too little memory.
    """
    with _readable(folder):
        data = np.memmap(folder / WEIGHTS_FILE, np.uint8, mode="r")
        entries = _index(folder)
        offsets = {name: _checked_offset(entry, data.size) for name, entry in entries.items()}
        stored = _stored(entries)
        heads = _widened_head(data, entries)
    size = data.size
    for name, array in heads.items():
        offsets[name] = rounded_up(size, ALIGNMENT)
        size = offsets[name] + array.nbytes
    if driver.free_memory() < size:
        raise SessionError(
            f"the weights need {size / 1e9:.2f} GB of the GPU's memory; {driver.free_memory() / 1e9:.2f} are free"
        )
    memory = driver.allocate(size)
    driver.upload_file(data, memory)
    for name, array in heads.items():
        driver.upload(array, memory + offsets[name])
    address = {f"{name}{SCALES}": memory + offset for name, offset in offsets.items()}
    address |= {name.removesuffix(INTEGERS): memory + offset for name, offset in offsets.items()}
    return Weights(memory, address, stored)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Errors of reading as what they mean."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / INDEX_FILE} cannot be used ({error}); export the checkpoint again") from error


def _index(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Entries of weights.json by name."""
    return {str(entry["name"]): entry for entry in json.loads((folder / INDEX_FILE).read_bytes())}


def _checked_offset(entry: Mapping[str, Any], size: int) -> int:
    """Where a tensor begins; raises `ValueError` where it does not lie in the file as the kernels read it."""
    start, nbytes, dtype = int(entry["offset"]), int(entry["nbytes"]), str(entry["dtype"])
    count = int(np.prod([int(n) for n in entry["shape"]]))
    expected = -(-count // PACKED[dtype]) if dtype in PACKED else count * ITEM_SIZE[dtype]
    if nbytes != expected or start < 0 or start + nbytes > size or start % ALIGNMENT:
        raise ValueError(f"'{entry['name']}' does not lie inside {WEIGHTS_FILE}")
    return start


def _stored(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Stored]:
    """How the parameters are stored that have integers in their place; raises `ValueError` for what is neither."""
    found: dict[str, Stored] = {}
    for name, entry in entries.items():
        if not name.endswith(INTEGERS):
            continue
        parameter, shape = name.removesuffix(INTEGERS), [int(n) for n in entry["shape"]]
        scales = [int(n) for n in entries[f"{parameter}{SCALES}"]["shape"]]
        if entry["dtype"] == "int4":
            found[parameter] = Stored("int4", shape[0] // scales[0])
        elif entry["dtype"] == "int8":
            found[parameter] = Stored("int8")
        else:
            raise ValueError(f"'{name}' is {entry['dtype']}, neither int8 nor int4")
    return found


def _widened_head(data: np.ndarray, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The head, or its integers and scales, with columns of zeros behind; nothing where they are not needed."""
    found = {}
    for name in ("head", f"head{INTEGERS}", f"head{SCALES}"):
        if name not in entries:
            continue
        entry = entries[name]
        shape, start = [int(n) for n in entry["shape"]], int(entry["offset"])
        missing = head_columns(shape[-1]) - shape[-1]
        if missing:
            raw = np.asarray(data[start : start + int(entry["nbytes"])])
            found[name] = _widened(raw, shape, str(entry["dtype"]), missing)
    return found


def _widened(raw: np.ndarray, shape: Sequence[int], dtype: str, missing: int) -> np.ndarray:
    """The bytes of a tensor with ``missing`` zeros more along its last axis."""
    packed = dtype in PACKED
    if packed:
        values = np.stack([raw & 15, raw >> 4], -1).reshape(-1)[: int(np.prod(shape))]
    else:
        values = raw.view(f"u{ITEM_SIZE[dtype]}")
    wide = np.pad(values.reshape(shape), [*[(0, 0)] * (len(shape) - 1), (0, missing)])
    pairs = wide.reshape(-1)
    return np.ascontiguousarray(pairs[0::2] | pairs[1::2] << 4 if packed else wide)
