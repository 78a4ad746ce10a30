"""Random checkpoints in the official key names: for parity tests, and for benchmarks of shapes whose weights are not
at hand.

The magnitudes are chosen so that every part of a model matters: decays spread over their range, low-rank parts and the
feed-forward output are not near zero, and activations stay of order one over long sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

Weights = dict[str, torch.Tensor]


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


@dataclass(frozen=True)
class Shape:
    """Dimensions of an RWKV-4, 5 or 6 checkpoint; ``n_att`` is the attention's width where it is not ``n_embd``.

    ``ranks`` are those of the dynamic mixes and of the decay in RWKV-6.
    """

    n_layer: int = 2
    n_embd: int = 128
    vocab_size: int = 256
    head_size: int = 64
    ffn_mult: float = 3.5
    n_att: int | None = None
    ranks: tuple[int, int] = (32, 64)

    @property
    def inner(self) -> int:
        """Width of the attention."""
        return self.n_att or self.n_embd


def random_v4(shape: Shape, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights of an RWKV-4 model, by official names."""
    draw = _Draw(seed, dtype)

    def att(name: str) -> Weights:
        return {
            **{f"{name}.time_mix_{x}": draw.uniform(0, 1, 1, 1, shape.n_embd) for x in "kvr"},
            f"{name}.time_decay": draw.uniform(-6, 2, shape.inner),
            f"{name}.time_first": draw.normal(shape.inner, std=0.5),
            **_linears(draw, name, shape),
        }

    return _model(draw, shape, att, "time_mix")


def random_v5(
    shape: Shape, form: str = "5.2", seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Random weights of an RWKV-5 model of ``form`` '5.0', '5.1' or '5.2', by official names."""
    draw = _Draw(seed, dtype)
    n_head = shape.inner // shape.head_size
    heads = (n_head, shape.head_size) if form == "5.2" else (n_head,)
    first = "time_first" if form == "5.0" else "time_faaaa"
    gates = () if form == "5.0" else ("gate",)

    def att(name: str) -> Weights:
        return {
            **draw.norm(f"{name}.ln_x", shape.inner),
            **{f"{name}.{x}.weight": draw.matrix(shape.inner, shape.n_embd) for x in gates},
            **{f"{name}.time_mix_{x}": draw.uniform(0, 1, 1, 1, shape.n_embd) for x in ("kvr" + "g" * len(gates))},
            f"{name}.time_decay": draw.uniform(-6, 1, *heads),
            f"{name}.{first}": draw.normal(*heads, std=0.5),
            **_linears(draw, name, shape),
        }

    return _model(draw, shape, att, "time_mix")


def random_v6(shape: Shape, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights of an RWKV-6 model, by official names."""
    draw = _Draw(seed, dtype)
    d, (mix_rank, decay_rank) = shape.n_embd, shape.ranks

    def att(name: str) -> Weights:
        return {
            **draw.norm(f"{name}.ln_x", shape.inner),
            f"{name}.gate.weight": draw.matrix(shape.inner, d),
            **{f"{name}.time_maa_{x}": draw.uniform(0, 1, 1, 1, d) for x in "xwkvrg"},
            f"{name}.time_maa_w1": draw.normal(d, 5 * mix_rank, std=d**-0.5),
            f"{name}.time_maa_w2": draw.normal(5, mix_rank, d, std=0.5 * mix_rank**-0.5),
            f"{name}.time_decay": draw.uniform(-6, 1, 1, 1, shape.inner),
            f"{name}.time_decay_w1": draw.normal(d, decay_rank, std=d**-0.5),
            f"{name}.time_decay_w2": draw.normal(decay_rank, shape.inner, std=0.5 * decay_rank**-0.5),
            f"{name}.time_faaaa": draw.normal(shape.inner // shape.head_size, shape.head_size, std=0.5),
            **_linears(draw, name, shape),
        }

    return _model(draw, shape, att, "time_maa")


def random_v7(
    shape: Shape7, seed: int = 0, dtype: torch.dtype = torch.float32, deep_embed: int = 0
) -> dict[str, torch.Tensor]:
    """Random weights of an RWKV-7 model, by official names.

    Args:
        shape: dimensions.
        seed: of the generator.
        dtype: dtype of every tensor.
        deep_embed: rank of DeepEmbed, which makes it a 7a model; the `rwkv` package only takes 32.
    """
    draw = _Draw(seed, dtype)
    d, n_ffn, rank = shape.n_embd, int(shape.n_embd * shape.ffn_mult), deep_embed
    weights = {"emb.weight": draw.normal(shape.vocab_size, d)}
    for i in range(shape.n_layer):
        block = f"blocks.{i}"
        for name in ("ln0", "ln1", "ln2") if i == 0 else ("ln1", "ln2"):
            weights |= draw.norm(f"{block}.{name}", d)
        weights |= _att7(draw, f"{block}.att", shape, i)
        weights[f"{block}.ffn.x_k"] = draw.uniform(0, 1, 1, 1, d)
        weights[f"{block}.ffn.key.weight"] = draw.matrix(n_ffn, d)
        weights[f"{block}.ffn.value.weight"] = draw.matrix(d, n_ffn, 0.5)
        if rank:
            weights[f"{block}.ffn.s_emb.weight"] = draw.normal(shape.vocab_size, rank * rank, std=rank**-0.5)
            weights[f"{block}.ffn.s_emb_x.weight"] = draw.normal(rank * rank, d, std=(d * rank) ** -0.5)
            weights[f"{block}.ffn.s1"] = draw.normal(d, rank, std=d**-0.5)
            weights[f"{block}.ffn.s2"] = draw.normal(rank, n_ffn, std=rank**-0.5)
            weights[f"{block}.ffn.s0"] = draw.uniform(0.5, 1.5, 1, 1, n_ffn)
    weights |= draw.norm("ln_out", d)
    weights["head.weight"] = draw.matrix(shape.vocab_size, d)
    return weights


def tiled_v7(shape: Shape7, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """As `random_v7`, but every block from the third on is the second one, in the same memory.

    For benchmarks of large shapes: two blocks are drawn in place of all, `save_pth` writes them once, and an export has
    every block at a place of its own. What a step reads, and how the magnitudes lie, is as with blocks of their own.
    """
    drawn = random_v7(replace(shape, n_layer=min(shape.n_layer, 2)), seed, dtype)
    second = {name.removeprefix("blocks.1."): t for name, t in drawn.items() if name.startswith("blocks.1.")}
    return drawn | {f"blocks.{i}.{name}": t for i in range(2, shape.n_layer) for name, t in second.items()}


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


def _linears(draw: _Draw, att: str, shape: Shape) -> Weights:
    weights = {f"{att}.{x}.weight": draw.matrix(shape.inner, shape.n_embd) for x in ("receptance", "key", "value")}
    return weights | {f"{att}.output.weight": draw.matrix(shape.n_embd, shape.inner, 0.5)}


def _model(draw: _Draw, shape: Shape, att: Callable[[str], Weights], mix: str) -> Weights:
    """A whole model around the attention part that one version has, with the feed-forward part of RWKV-4 to 6."""
    d, n_ffn = shape.n_embd, int(shape.n_embd * shape.ffn_mult)
    weights = {"emb.weight": draw.normal(shape.vocab_size, d)}
    for i in range(shape.n_layer):
        block = f"blocks.{i}"
        for name in ("ln0", "ln1", "ln2") if i == 0 else ("ln1", "ln2"):
            weights |= draw.norm(f"{block}.{name}", d)
        weights |= att(f"{block}.att")
        weights |= {f"{block}.ffn.{mix}_{x}": draw.uniform(0, 1, 1, 1, d) for x in "kr"}
        weights[f"{block}.ffn.key.weight"] = draw.matrix(n_ffn, d)
        weights[f"{block}.ffn.value.weight"] = draw.matrix(d, n_ffn, 0.5)
        weights[f"{block}.ffn.receptance.weight"] = draw.matrix(d, d)
    weights |= draw.norm("ln_out", d)
    weights["head.weight"] = draw.matrix(shape.vocab_size, d)
    return weights


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
