"""What fine-tuners add to a weight: formulas on row chunks of W [out, in], and the shapes that each of them accepts.

Sources: RWKV-PEFT (github.com/JL-er/RWKV-PEFT) `merge/merge_lora.py`, `merge/merge_disha.py` and their forerunner
`merge/merge_bone.py`; Hugging Face PEFT `tuners/lora/layer.py`, `tuners/miss/layer.py`, and `tuners/bone/layer.py` of
releases before March 2026.

Every class has ``rank``, ``names`` (the tensors of the adapter that it needs), ``rows`` (a chunk has a multiple of that
many) and ``merge(rows, start, load)``: rows ``start``… of the changed weight, from those of W in a wide dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rwkv_edge.checkpoints.base import TensorInfo

if TYPE_CHECKING:
    import torch

Load = Callable[[str], "torch.Tensor"]
Parts = Mapping[str, str]
"""Part of a target ('lora_A', 'disha', …) → name of the tensor in the adapter."""

BLOCK_PARTS = ("disha", "bone", "miss_block", "bone_block")


@dataclass(frozen=True)
class LowRank:
    """LoRA: W + B·A·α/r, A [r, in] (web-rwkv stores it transposed), B [out, r]."""

    a: str
    b: str
    rank: int
    scale: float
    a_transposed: bool
    rows: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """A and B."""
        return (self.a, self.b)

    def merge(self, rows: torch.Tensor, start: int, load: Load) -> torch.Tensor:
        """See the module."""
        a = load(self.a).to(rows.dtype)
        b = load(self.b)[start : start + rows.shape[0]].to(rows.dtype)
        return rows + (b @ (a.t() if self.a_transposed else a)) * self.scale


@dataclass(frozen=True)
class Blocks:
    """DiSHA and Bone in mode 'bat', 3-D: W in r×r blocks, each W_ij + W_ij·b + b.

    RWKV-PEFT's b is [in/r, r, r], one for each block column; PEFT's is [out/r, r, r], one for each block row.
    """

    name: str
    rank: int
    by_column: bool

    @property
    def rows(self) -> int:
        """Whole blocks."""
        return self.rank

    @property
    def names(self) -> tuple[str, ...]:
        """b."""
        return (self.name,)

    def merge(self, rows: torch.Tensor, start: int, load: Load) -> torch.Tensor:
        """See the module."""
        r, (height, width) = self.rank, rows.shape
        stored = load(self.name).to(rows.dtype)
        b = stored[None] if self.by_column else stored[start // r : (start + height) // r, None]
        blocks = rows.reshape(height // r, r, width // r, r).transpose(1, 2)
        return rows + (blocks @ b + b).transpose(1, 2).reshape(height, width)


@dataclass(frozen=True)
class Shards:
    """MiSS (earlier: DiSHA or Bone in mode 'bone'), 2-D: W[o, i] + d[i mod r, o mod m], d [r, m].

    m is out, or a divisor of it in PEFT's mode 'mini'. The last shard of W may be narrower than r.
    """

    name: str
    rank: int
    rows: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """d."""
        return (self.name,)

    def merge(self, rows: torch.Tensor, start: int, load: Load) -> torch.Tensor:
        """See the module."""
        import torch

        d = load(self.name).to(rows.dtype)
        out = torch.arange(start, start + rows.shape[0]) % d.shape[1]
        inner = torch.arange(rows.shape[1]) % d.shape[0]
        return rows + d[:, out].t()[:, inner]


Delta = LowRank | Blocks | Shards


def delta_of(parts: Parts, tensors: Mapping[str, TensorInfo], out: int, inner: int, alpha: float | None) -> Delta:
    """The change that the parts describe for a weight [out, in].

    Args:
        parts: of one target.
        tensors: of the adapter.
        out: rows of the weight.
        inner: columns of the weight.
        alpha: of LoRA; a caller checks that it is there.

    Raises:
        ValueError: the parts do not belong together, or a shape does not fit; the text follows the target's name.
    """
    blocks = [part for part in BLOCK_PARTS if part in parts]
    if len(blocks) == 1 and len(parts) == 1:
        return _block_delta(blocks[0], parts[blocks[0]], tensors[parts[blocks[0]]].shape, out, inner)
    for first, second in (("lora_A", "lora_B"), ("lora.0", "lora.1")):
        if set(parts) == {first, second}:
            return _low_rank(parts[first], parts[second], tensors, out, inner, alpha, first == "lora.0")
        for part, other in ((first, second), (second, first)):
            if set(parts) == {part}:
                raise ValueError(f"has a {part} ('{parts[part]}') without a {other}")
    raise ValueError(f"has parts that do not belong together: {', '.join(parts)}")


def _low_rank(
    a: str, b: str, tensors: Mapping[str, TensorInfo], out: int, inner: int, alpha: float | None, transposed: bool
) -> LowRank:
    shape_a, shape_b = tensors[a].shape, tensors[b].shape
    if transposed:
        shape_a = shape_a[::-1]
    rank = shape_a[0] if shape_a else 0
    if rank < 1 or shape_a != (rank, inner) or shape_b != (out, rank):
        raise ValueError(
            f"is [{out}, {inner}], which '{a}' {list(tensors[a].shape)} and '{b}' {list(shape_b)} do not fit"
        )
    return LowRank(a, b, rank, (alpha or 0.0) / rank, transposed)


def _block_delta(part: str, name: str, shape: tuple[int, ...], out: int, inner: int) -> Delta:
    """By the number of dimensions; for three of them the part's name says which axis of W the blocks are of."""
    if len(shape) == 3 and shape[1] == shape[2] > 0 and not out % shape[1] and not inner % shape[1]:
        rank, by_column = shape[1], part in ("disha", "bone")
        if shape[0] == (inner if by_column else out) // rank:
            return Blocks(name, rank, by_column)
    elif len(shape) == 2 and 0 < shape[0] <= inner:
        mini = part == "miss_block" and shape[1] > 0 and not out % shape[1]
        if shape[1] == out or mini:
            return Shards(name, shape[0])
    expected = "[in/r, r, r]" if part in ("disha", "bone") else "[out/r, r, r]"
    raise ValueError(f"is [{out}, {inner}], which '{name}' {list(shape)} does not fit: expected {expected} or [r, out]")
