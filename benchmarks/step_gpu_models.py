"""What `step_gpu.py` needs beside the clock: artifacts of random weights, and the reference.

Two blocks are drawn, exported and quantized; the artifacts of all sizes repeat the second of them (`repeated`), byte by
byte as an export and a quantization of the whole model would, which a test proves.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rwkv_edge.artifact import WEIGHTS, Artifact, file_entry, write_manifest
from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
from rwkv_edge.calibration.schemes import SchemeOptions
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.roofline import bytes_per_token
from rwkv_edge.evaluation.synthetic import OFFICIAL_7, Shape7, save_pth, tiled_v7
from rwkv_edge.exporters.folder import artifact_folder
from rwkv_edge.exporters.layout import INDEX_FILE, PAGE, PAGE_FROM
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.exporters.weights import Sink
from rwkv_edge.models.torch_ops import TorchOps
from rwkv_edge.models.versions import architecture_named
from rwkv_edge.spec import matrix_state

SHAPES = OFFICIAL_7 | {"tiny": Shape7(3, 64, 256, ranks=(8, 8, 8, 16))}
FLOAT = "fp16"
SCHEMES = {"W8": SchemeOptions("w8"), "W4": SchemeOptions("w4")}
"""What the fused kernels run beside `FLOAT`: as `rwkv-edge quantize` writes it without a calibration."""

BRAIN = ("emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias")
"""bfloat16 in every checkpoint, as in the released ones: Albatross takes no other dtype here."""

Entry = dict[str, Any]


def shape_of(size: str, layers: int | None) -> Shape7:
    """A shape of `SHAPES`, with only so many layers."""
    return dataclasses.replace(SHAPES[size], n_layer=layers) if layers else SHAPES[size]


def drawn(shape: Shape7) -> dict[str, torch.Tensor]:
    """Random weights in float16 by official names; see `tiled_v7`."""
    weights = tiled_v7(shape, dtype=torch.float16)
    return weights | {name: weights[name].to(torch.bfloat16) for name in BRAIN}


def place_of(size: str, layers: int | None, form: str, work: Path) -> Path:
    """The folder of an artifact."""
    return work / f"step-gpu-{size}-{shape_of(size, layers).n_layer}-{form}"


def checkpoint_place(size: str, layers: int | None, work: Path) -> Path:
    """The .pth of all layers; repeated blocks lie in it once."""
    place = place_of(size, layers, FLOAT, work)
    return place.with_name(f"{place.name}.pth")  # "0.1B" holds a dot


def float_artifact(size: str, layers: int | None, work: Path) -> Path:
    """The checkpoint, its first two blocks as an artifact, and the artifact of all blocks; made once."""
    artifact, checkpoint = place_of(size, layers, FLOAT, work), checkpoint_place(size, layers, work)
    if not artifact.exists():
        torch.set_num_threads(4)  # other sizes are made beside this one
        shape = shape_of(size, layers)
        weights = save_pth(drawn(shape), checkpoint)
        tile = checkpoint.with_name(f"{checkpoint.stem}-tile.pth")
        kept = torch.load(weights, mmap=True)
        save_pth({n: t for n, t in kept.items() if not re.match(r"blocks\.([2-9]|\d\d)", n)}, tile)
        export_checkpoint(open_checkpoint(tile), tile.with_suffix(""), _export((), None))
        repeated(tile.with_suffix(""), artifact, shape.n_layer)
    return artifact


def quantized_artifact(size: str, layers: int | None, form: str, work: Path) -> Path:
    """The artifact of a scheme in `SCHEMES`, after `float_artifact`; made once."""
    artifact = place_of(size, layers, form, work)
    if not artifact.exists():
        tile = place_of(size, layers, FLOAT, work)
        tile, target = tile.with_name(f"{tile.name}-tile"), artifact.with_name(f"{artifact.name}-tile")
        quantize_artifact(tile, target, QuantizeOptions(SCHEMES[form]))
        repeated(target, artifact, shape_of(size, layers).n_layer)
    return artifact


def artifact_with_graphs(size: str, layers: int | None, work: Path) -> Path:
    """The float artifact with the graphs that ONNX Runtime runs, of one stream; made once."""
    artifact = place_of(size, layers, f"{FLOAT}-onnx", work)
    if not artifact.exists():
        export_checkpoint(open_checkpoint(checkpoint_place(size, layers, work)), artifact, _export((256,), 1))
    return artifact


def _export(chunks: tuple[int, ...], batch: int | None) -> ExportOptions:
    return ExportOptions(precision=FLOAT, chunks=chunks, batch=batch, tokenizer="none")


def prepared(
    sizes: Sequence[str],
    layers: int | None,
    forms: Sequence[str],
    work: Path,
    workers: int,
    ready: Callable[[Path], object] | None = None,
) -> None:
    """Make all artifacts, side by side; with ``workers`` 0 in this process, one after another.

    ``ready`` is called with each, where there are workers: in one of them.
    """
    if not workers:
        for size in sizes:
            for form in (FLOAT, *forms):
                _made(size, layers, form, work, None)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        floats = {pool.submit(float_artifact, size, layers, work): size for size in reversed(sizes)}  # large ones first
        rest: list[Future[None]] = []
        for done in as_completed(floats):
            done.result()
            rest += [pool.submit(_made, floats[done], layers, form, work, ready) for form in forms]
        for future in rest:
            future.result()


def _made(size: str, layers: int | None, form: str, work: Path, ready: Callable[[Path], object] | None) -> None:
    """An artifact, and what shall be done with it."""
    artifact = float_artifact(size, layers, work) if form == FLOAT else quantized_artifact(size, layers, form, work)
    if ready is not None:
        ready(artifact)


def repeated(tile: Path, target: Path, layers: int) -> None:
    """Write the artifact whose blocks from the third on are the second of ``tile``, an artifact of two; no graphs.

    What the manifest says of weights, files and formats is that of the whole model.
    """
    artifact = Artifact.open(tile)
    former = artifact.manifest
    data = np.memmap(tile / WEIGHTS, np.uint8, mode="r")
    placed = list(_placed(json.loads((tile / INDEX_FILE).read_bytes()), layers))
    spec = former.spec
    state = matrix_state(layers, spec.n_embd, spec.n_head, spec.head_size, spec.precision)
    with artifact_folder(target, sum(entry["nbytes"] for entry, _ in placed)) as folder:
        lines = ",\n".join(json.dumps(entry) for entry, _ in placed)
        (folder / INDEX_FILE).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        sink, position = Sink(folder / WEIGHTS), 0
        for entry, start in placed:
            sink.put(bytes(entry["offset"] - position))
            sink.put(memoryview(data[start : start + entry["nbytes"]]))  # type: ignore[arg-type, unused-ignore]
            position = entry["offset"] + entry["nbytes"]
        digest = sink.close()
        files = {
            WEIGHTS: file_entry(folder / WEIGHTS, digest),
            INDEX_FILE: file_entry(folder / INDEX_FILE),
        }
        manifest = dataclasses.replace(
            former, spec=dataclasses.replace(spec, n_layer=layers, state=state), graphs=(), files=files,
            model_hash=digest, quantization=_repeated_formats(former.quantization, layers),
        )  # fmt: skip
        write_manifest(folder, manifest)


def _placed(entries: Sequence[Entry], layers: int) -> Iterator[tuple[Entry, int]]:
    """Entries of the whole model in the order of its file, each with the place of its bytes in the tile's."""
    second = [entry for entry in entries if entry["name"].startswith("blocks.1.")]
    order = [entry for entry in entries if entry not in second]
    after = next((at for at, entry in enumerate(order) if entry["name"].startswith("ln_out.")), len(order))
    copies = [entry | {"name": renamed(entry["name"], i)} for i in range(1, layers) for entry in second]
    end = 0
    for entry in (*order[:after], *copies, *order[after:]):
        align = PAGE if entry["nbytes"] >= PAGE_FROM else 64
        offset = -(-end // align) * align
        end = offset + entry["nbytes"]
        yield entry | {"offset": offset}, entry["offset"]


def renamed(name: str, layer: int) -> str:
    """A tensor's name in the second block, as that of another block."""
    return f"blocks.{layer}.{name.removeprefix('blocks.1.')}"


def _repeated_formats(facts: Mapping[str, Any] | None, layers: int) -> dict[str, Any] | None:
    if facts is None:
        return None
    formats = dict(facts["formats"])
    second = {name: form for name, form in formats.items() if name.startswith("blocks.1.")}
    more = {renamed(name, i): form for i in range(2, layers) for name, form in second.items()}
    return {**facts, "formats": formats | more}


def moved_bytes(artifact: Path) -> int:
    """What a step of one stream moves: all weights but the embedding table, a row of that, and the state twice."""
    entries = json.loads((artifact / INDEX_FILE).read_bytes())
    table = sum(e["nbytes"] for e in entries if e["name"].partition(".")[0] == "emb")
    spec = Artifact.open(artifact).manifest.spec
    return bytes_per_token(sum(e["nbytes"] for e in entries), table, spec.vocab_size, spec.state_nbytes)


class Reference:
    """Eager torch in float64 with the weights of an artifact as they are stored: rounded or quantized, then widened.

    On a GPU where there is one: products in float64 know neither TF32 nor another order of sums that would matter.
    """

    def __init__(self, artifact: Path) -> None:
        """Takes 8 bytes for every weight."""
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._spec = Artifact.open(artifact).manifest.spec
        self._architecture = architecture_named(self._spec.version)
        data = np.memmap(artifact / WEIGHTS, np.uint8, mode="c")  # torch warns about memory it may not write
        entries = {e["name"]: e for e in json.loads((artifact / INDEX_FILE).read_bytes())}
        self._params = {
            name.removesuffix(".q"): self._values(name, entries, data)
            for name in entries
            if not (name.endswith(".scale") and f"{name.removesuffix('.scale')}.q" in entries)
        }

    def _values(self, name: str, entries: Mapping[str, Entry], data: np.ndarray) -> torch.Tensor:
        """A parameter in float64; of a quantized one, integers times scales."""
        entry = entries[name]
        raw = torch.from_numpy(data[entry["offset"] : entry["offset"] + entry["nbytes"]]).to(self._device)
        if not name.endswith(".q"):
            return raw.view(getattr(torch, entry["dtype"])).view(entry["shape"]).double()
        rows, columns = entry["shape"]
        if entry["dtype"] == "int4":
            raw = torch.stack([raw & 15, raw >> 4], 1).flatten()[: rows * columns]
            integers = (raw.to(torch.int8) ^ 8) - 8
        else:
            integers = raw.view(torch.int8)
        scales = self._values(f"{name.removesuffix('.q')}.scale", entries, data)
        if scales.ndim > 1:
            scales = scales.repeat_interleave(rows // scales.shape[0], 0)
        return integers.view(rows, columns).double() * scales

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """[T, B] → [T, B, V], each token after the one before it, from the initial state."""
        batch = tokens.shape[1]
        wide = {"dtype": torch.float64, "device": self._device}
        state = {t.name: torch.full((batch, *t.shape), t.fill, **wide) for t in self._spec.state}  # type: ignore[call-overload]
        ops, found = TorchOps(self._params, self._spec, batch, torch.float64), []
        for row in torch.from_numpy(tokens).to(self._device):
            logits, state = self._architecture.step(ops, self._spec, row, state)
            found.append(logits.float().cpu().numpy())
        return np.stack(found)
