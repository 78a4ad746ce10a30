"""Random checkpoints whose blocks are one block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SHAPE

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.synthetic import Shape7, random_v7, save_pth, tiled_v7
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint

DEEP = Shape7(6, SHAPE.n_embd, SHAPE.vocab_size, ranks=SHAPE.ranks)


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_a_tiled_checkpoint_has_the_tensors_of_a_drawn_one(layers: int) -> None:
    shape = Shape7(layers, SHAPE.n_embd, SHAPE.vocab_size, ranks=SHAPE.ranks)
    tiled, drawn = tiled_v7(shape), random_v7(shape)
    assert {name: t.shape for name, t in tiled.items()} == {name: t.shape for name, t in drawn.items()}


def test_its_blocks_are_written_once_and_exported_apart(tmp_path: Path) -> None:
    sizes = [save_pth(w(DEEP), tmp_path / "model.pth").stat().st_size for w in (random_v7, tiled_v7)]
    assert sizes[1] < 0.5 * sizes[0]
    options = ExportOptions(chunks=(), tokenizer="none")
    export_checkpoint(open_checkpoint(tmp_path / "model.pth"), tmp_path / "artifact", options)
    weights = np.fromfile(tmp_path / "artifact" / "weights.bin", np.uint8)
    key = tiled_v7(DEEP)["blocks.1.ffn.key.weight"].T.contiguous().view(torch.uint8).numpy().tobytes()
    assert weights.tobytes().count(key) == DEEP.n_layer - 1
