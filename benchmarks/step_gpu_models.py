"""What `step_gpu.py` needs beside the clock: artifacts of random weights, the reference on the CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from rwkv_edge.artifact import Artifact
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.describe import describe
from rwkv_edge.evaluation.synthetic import OFFICIAL_7, Shape7, save_pth, tiled_v7
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.models.torch_ops import TorchOps
from rwkv_edge.models.versions import architecture_named
from rwkv_edge.spec import ModelSpec

SHAPES = OFFICIAL_7 | {"tiny": Shape7(3, 64, 256, ranks=(8, 8, 8, 8))}


def artifact_of(size: str, layers: int | None, work: Path) -> Path:
    """An fp16 artifact of random weights, made once; see `tiled_v7` for what is random in it."""
    shape = SHAPES[size]
    if layers:
        shape = dataclasses.replace(shape, n_layer=layers)
    artifact = work / f"step-gpu-tiled-{size}-{shape.n_layer}"
    if not artifact.exists():
        path = save_pth(tiled_v7(shape, dtype=torch.float16), work / f"{artifact.name}.pth")
        choices = ExportOptions(precision="fp16", chunks=(256,), tokenizer="none")
        export_checkpoint(open_checkpoint(path), artifact, choices)
        path.unlink()
    return artifact


def facts(artifact: Path) -> tuple[int, float]:
    """Nodes of the step, and the bytes that it moves: all weights but the embedding table, and the state twice."""
    found = describe(artifact, 1e6)  # GB/s, so many that the rounding of tokens/s does not matter
    return found["graphs"][0]["nodes"], 1e15 / float(found["tokens_per_second_bound"]["fp16"]["this machine"])


class Reference:
    """Eager torch in float32 on the CPU, with the weights of an artifact: rounded to its precision, then widened."""

    def __init__(self, artifact: Path) -> None:
        """Reads and widens weights.bin: 4 bytes for every 2 of it."""
        spec = Artifact.open(artifact).manifest.spec
        self._stored = spec
        self.spec: ModelSpec = dataclasses.replace(spec, precision="fp32")
        self._architecture = architecture_named(spec.version)
        data = np.memmap(artifact / "weights.bin", np.uint8, mode="c")  # torch warns about memory it may not write
        self._params = {
            entry["name"]: torch.from_numpy(data[entry["offset"] : entry["offset"] + entry["nbytes"]])
            .view(getattr(torch, entry["dtype"]))
            .view(entry["shape"])
            .float()
            for entry in json.loads((artifact / "weights.json").read_bytes())
        }

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """[T] → [T, V], each token after the one before it, from the initial state."""
        state = {t.name: torch.full((1, *t.shape), t.fill) for t in self._stored.state}
        ops, rows = TorchOps(self._params, self.spec, 1, torch.float32), []
        for token in tokens:
            row, state = self._architecture.step(ops, self.spec, torch.tensor([int(token)]), state)
            rows.append(row.numpy())
        return np.concatenate(rows)
