"""Random checkpoints in the official key names: for parity tests, and for benchmarks of shapes whose weights are not
at hand.

The magnitudes are chosen so that every part of a model matters: decays spread over their range, low-rank parts and the
feed-forward output are not near zero, and activations stay of order one over long sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Shape7:
    """Dimensions of an RWKV-7 checkpoint; ``ranks`` are those of the w, a, v and g LoRAs."""

    n_layer: int = 2
    n_embd: int = 128
    vocab_size: int = 256
    head_size: int = 64
    ffn_mult: float = 4
    ranks: tuple[int, int, int, int] = (32, 32, 16, 32)
    value_residual_in_first_layer: bool = True


OFFICIAL_7 = {
    "0.1B": Shape7(12, 768, 65536, 64, 4, (64, 64, 32, 128)),
    "0.4B": Shape7(24, 1024, 65536, 64, 4, (64, 64, 32, 128)),
    "1.5B": Shape7(24, 2048, 65536, 64, 4, (96, 96, 64, 256)),
    "2.9B": Shape7(32, 2560, 65536, 64, 4, (96, 96, 64, 320)),
}
"""Shapes of the released RWKV-7 World models."""


def random_v7(shape: Shape7, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights of an RWKV-7 model, by official names.

    Args:
        shape: dimensions.
        seed: of the generator.
        dtype: dtype of every tensor.
    """
    draw = _Draw(seed, dtype)
    d, n_ffn = shape.n_embd, int(shape.n_embd * shape.ffn_mult)
    weights = {"emb.weight": draw.normal(shape.vocab_size, d)}
    for i in range(shape.n_layer):
        block = f"blocks.{i}"
        for name in ("ln0", "ln1", "ln2") if i == 0 else ("ln1", "ln2"):
            weights |= draw.norm(f"{block}.{name}", d)
        weights |= _att7(draw, f"{block}.att", shape, i)
        weights[f"{block}.ffn.x_k"] = draw.uniform(0, 1, 1, 1, d)
        weights[f"{block}.ffn.key.weight"] = draw.matrix(n_ffn, d)
        weights[f"{block}.ffn.value.weight"] = draw.matrix(d, n_ffn, 0.5)
    weights |= draw.norm("ln_out", d)
    weights["head.weight"] = draw.matrix(shape.vocab_size, d)
    return weights


def save_pth(weights: Mapping[str, torch.Tensor], path: Path) -> Path:
    """Write weights with ``torch.save``; returns ``path``."""
    torch.save(dict(weights), path)
    return path


class _Draw:
    """Random tensors of the shapes that checkpoints have."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype).normal_(0, std, generator=self._generator)

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype).uniform_(low, high, generator=self._generator)

    def matrix(self, rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        """[out, in] that keeps the variance, times ``gain``²."""
        return self.normal(rows, columns, std=gain / columns**0.5)

    def norm(self, name: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": self.uniform(0.5, 1.5, width), f"{name}.bias": self.normal(width, std=0.1)}


def _att7(draw: _Draw, att: str, shape: Shape7, layer: int) -> dict[str, torch.Tensor]:
    d, n_head = shape.n_embd, shape.n_embd // shape.head_size
    weights = {f"{att}.x_{x}": draw.uniform(0, 1, 1, 1, d) for x in "rwkvag"}
    for x, rank in zip("wavg", shape.ranks, strict=True):
        if x == "v" and layer == 0 and not shape.value_residual_in_first_layer:
            continue
        weights[f"{att}.{x}1"] = draw.normal(d, rank, std=d**-0.5)
        weights[f"{att}.{x}2"] = draw.normal(rank, d, std=rank**-0.5)
        if x != "g":
            weights[f"{att}.{x}0"] = draw.uniform(-6, 2, 1, 1, d) if x == "w" else draw.normal(1, 1, d)
    weights[f"{att}.k_k"] = draw.uniform(0.5, 1.2, 1, 1, d)
    weights[f"{att}.k_a"] = draw.uniform(0.5, 1.2, 1, 1, d)
    weights[f"{att}.r_k"] = draw.normal(n_head, shape.head_size, std=0.3)
    weights |= {f"{att}.{x}.weight": draw.matrix(d, d) for x in ("receptance", "key", "value")}
    weights[f"{att}.output.weight"] = draw.matrix(d, d, 0.5)
    return weights | draw.norm(f"{att}.ln_x", d)
