"""Parameters of a graph: what they are called, what they look like, and how they come out of checkpoint tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rwkv_edge.checkpoints.base import Checkpoint, TensorInfo
from rwkv_edge.errors import CheckpointError
from rwkv_edge.spec import ITEM_SIZE, ModelSpec

if TYPE_CHECKING:
    import torch

    Function = Callable[[torch.Tensor], torch.Tensor]
    Recipe = Callable[[Sequence[torch.Tensor], torch.dtype], Iterator[torch.Tensor]]

_BLOCK = re.compile(r"blocks\.(\d{1,6})\.")

CHUNK_NUMEL = 1 << 21
"""Elements that a recipe converts at a time (8 MiB of float32): measured, the fastest from 2^16 to 2^22."""


@dataclass(frozen=True)
class Param:
    """One parameter: an initializer of the graphs and a tensor of the reference.

    Attributes:
        name: name in the graph and in weights.bin.
        shape: shape in the graph; linears are [in, out].
        dtype: 'act' (the precision of the export) or 'float32' (kept in every precision).
        role: 'linear', 'embedding' or 'vector'; what quantization may touch.
        sources: names of the checkpoint tensors it is made of.
        recipe: yields chunks of consecutive rows (axis 0), in the asked dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    sources: tuple[str, ...]
    recipe: Recipe

    def resolve_dtype(self, act_dtype: str) -> str:
        """The dtype in which an export with this activation dtype stores the parameter."""
        return act_dtype if self.dtype == "act" else self.dtype

    def nbytes(self, act_dtype: str) -> int:
        """Bytes in weights.bin."""
        count = 1
        for size in self.shape:
            count *= size
        return count * ITEM_SIZE[self.resolve_dtype(act_dtype)]

    def chunks(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The values, row chunk by row chunk, contiguous and in ``dtype``."""
        yield from self.recipe([checkpoint.load(name) for name in self.sources], dtype)


class Header:
    """Names and shapes of a checkpoint, with errors that name the tensor."""

    def __init__(self, tensors: Mapping[str, TensorInfo], path: object) -> None:
        """``path`` is what messages call the file."""
        self.tensors = tensors
        self.path = path

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor '{name}', which this RWKV version needs; is it complete?")
        return self.tensors[name].shape

    def count(self, name: str) -> int:
        """Number of elements."""
        self.shape(name)
        return self.tensors[name].numel

    def matrix(self, name: str) -> tuple[int, int]:
        """Shape of a two-dimensional tensor."""
        shape = self.shape(name)
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"{self.path}: tensor '{name}' has shape {list(shape)}, expected two dimensions")
        return shape[0], shape[1]

    def expect_matrix(self, name: str, rows: int, columns: int) -> None:
        """Check that a tensor is [rows, columns], in this order.

        Raises:
            CheckpointError: missing, or another shape.
        """
        if self.shape(name) != (rows, columns):
            raise CheckpointError(
                f"{self.path}: tensor '{name}' has shape {list(self.shape(name))}, "
                f"expected {[rows, columns]} to fit the other tensors"
            )

    def expect(self, name: str, shape: tuple[int, ...]) -> str:
        """``name``, once its shape was found to be ``shape`` (axes of length 1 do not count).

        Raises:
            CheckpointError: missing, or another shape.
        """
        found = self.shape(name)
        if [n for n in found if n != 1] != [n for n in shape if n != 1]:
            raise CheckpointError(
                f"{self.path}: tensor '{name}' has shape {list(found)}, expected {list(shape)} to fit the other tensors"
            )
        return name

    def n_layer(self) -> int:
        """Highest block index + 1.

        Raises:
            CheckpointError: a block is missing in between, or there is none.
        """
        indices = {int(found[1]) for name in self.tensors if (found := _BLOCK.match(name))}
        missing = sorted(set(range(max(indices, default=0) + 1)) - indices)
        if missing:
            raise CheckpointError(f"{self.path} has no tensors of block {missing[0]}; is it complete?")
        return len(indices)


def linear(
    header: Header, name: str, source: str, n_in: int, n_out: int, scale: float = 1.0, fp16_scale: float = 1.0
) -> Param:
    """A linear stored [out, in] in the checkpoint and [in, out] in the graph.

    ``scale`` multiplies it in every precision, ``fp16_scale`` in float16 only; both are powers of two, hence exact.
    """
    header.expect_matrix(source, n_out, n_in)

    def recipe(sources: Sequence[torch.Tensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        import torch

        columns = max(1, CHUNK_NUMEL // n_out)
        for start in range(0, n_in, columns):
            chunk = sources[0][:, start : start + columns].t()
            factor = scale * fp16_scale if dtype == torch.float16 else scale
            yield (chunk if factor == 1 else chunk.float() * factor).to(dtype).contiguous()

    return Param(name, (n_in, n_out), "act", "linear", (source,), recipe)


def low_rank(header: Header, name: str, source: str, n_in: int, n_out: int) -> Param:
    """A LoRA half, stored [in, out] in the checkpoint already."""
    header.expect_matrix(source, n_in, n_out)
    return Param(name, (n_in, n_out), "act", "linear", (source,), _as_stored((n_in, n_out)))


def vector(header: Header, name: str, source: str, shape: tuple[int, ...], dtype: str = "act") -> Param:
    """A small tensor, reshaped to ``shape``."""
    header.expect(source, shape)
    return Param(name, shape, dtype, "vector", (source,), _as_stored(shape))


def batched_low_rank(header: Header, name: str, source: str, count: int, n_in: int, n_out: int) -> Param:
    """The second halves of several LoRAs, [count, in, out] as stored."""
    header.expect(source, (count, n_in, n_out))
    return Param(name, (count, n_in, n_out), "act", "linear", (source,), _as_stored((count, n_in, n_out)))


def transformed(
    header: Header, name: str, source: str, shape: tuple[int, ...], function: Function, stored: tuple[int, ...] = ()
) -> Param:
    """``function`` of a tensor, taken in float32 and kept so; ``stored`` is its shape before it is broadcast."""
    header.expect(source, stored or shape)

    def recipe(sources: Sequence[torch.Tensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        yield function(sources[0].to(dtype)).reshape(stored or shape).expand(shape).contiguous()

    return Param(name, shape, "float32", "vector", (source,), recipe)


def by_head(header: Header, name: str, source: str, n_head: int, head_size: int) -> Param:
    """A vector of all heads, [H, N] in the graph and in float32: it meets the float32 inputs of the recurrence."""
    found = header.shape(source)
    if [n for n in found if n != 1] != [n for n in (n_head, head_size) if n != 1]:
        header.expect(source, (n_head * head_size,))
    return Param(name, (n_head, head_size), "float32", "vector", (source,), _as_stored((n_head, head_size)))


def stacked(header: Header, name: str, sources: Sequence[str], n_embd: int) -> Param:
    """Token-shift coefficients as one [count, 1, D], or [1, D] where there is one, for `Ops.mix`."""
    for source in sources:
        header.expect(source, (n_embd,))
    row = (1, 1, n_embd) if len(sources) > 1 else (1, n_embd)

    def recipe(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        for tensor in tensors:
            yield tensor.reshape(row).to(dtype)

    return Param(name, (len(sources), *row[1:]), "act", "vector", tuple(sources), recipe)


def ffn_pair(header: Header, ffn: str, spec: ModelSpec, scale: float = 1.0) -> list[Param]:
    """Key and value of a feed-forward part around relu².

    In float16 a key of 256 squares to infinity. There the key is stored times 1/8 and the value times 64, so that the
    square holds keys up to 2047; ``scale`` multiplies the value in every precision.
    """
    d, f = spec.n_embd, spec.n_ffn
    return [
        linear(header, f"{ffn}.key", f"{ffn}.key.weight", d, f, fp16_scale=0.125),
        linear(header, f"{ffn}.value", f"{ffn}.value.weight", f, d, scale, fp16_scale=64.0),
    ]


def rescaling(spec: ModelSpec, layer: int) -> float:
    """The factor on what ``layer`` adds to a residual stream that is halved every ``spec.rescale`` layers."""
    return 0.5 ** (layer // spec.rescale) if spec.rescale else 1.0


def norm(header: Header, name: str, source: str, n_embd: int) -> list[Param]:
    """Weight and bias of a LayerNorm."""
    return [vector(header, f"{name}.{part}", f"{source}.{part}", (n_embd,)) for part in ("weight", "bias")]


def normed_embedding(header: Header, name: str, vocab_size: int, n_embd: int) -> Param:
    """The embedding table with ln0 of the first block folded in: every row is normalised once, at export."""
    ln0 = [header.expect(f"blocks.0.ln0.{part}", (n_embd,)) for part in ("weight", "bias")]

    def recipe(sources: Sequence[torch.Tensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        for _, rows in _normed_rows(sources[0], sources[1], sources[2], dtype, n_embd):
            yield rows.to(dtype)

    return Param(name, (vocab_size, n_embd), "act", "embedding", ("emb.weight", *ln0), recipe)


def deep_embedding(header: Header, name: str, ffn: str, spec: ModelSpec, rank: int) -> Param:
    """RWKV-7a's table of a matrix per token, s_emb + LN(emb)·s_emb_xᵀ, folded once at export: [V, rank²]."""
    vocab_size, n_embd = spec.vocab_size, spec.n_embd
    header.expect_matrix(f"{ffn}.s_emb.weight", vocab_size, rank * rank)
    header.expect_matrix(f"{ffn}.s_emb_x.weight", rank * rank, n_embd)
    names = ("emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias", f"{ffn}.s_emb.weight", f"{ffn}.s_emb_x.weight")

    def recipe(sources: Sequence[torch.Tensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        width = max(n_embd, rank * rank)
        for start, rows in _normed_rows(sources[0], sources[1], sources[2], dtype, width):
            table = sources[3][start : start + rows.shape[0]].to(rows.dtype)
            yield (table + rows @ sources[4].to(rows.dtype).t()).to(dtype)

    return Param(name, (vocab_size, rank * rank), "act", "embedding", names, recipe)


def _normed_rows(
    table: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype, width: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Row chunks of LN(table) in float32 (float64 for it), with the index of their first row."""
    import torch

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    n_embd = table.shape[1]
    step = max(1, CHUNK_NUMEL // width)
    for start in range(0, table.shape[0], step):
        rows = table[start : start + step].to(wide)
        scale, shift = weight.reshape(n_embd).to(wide), bias.reshape(n_embd).to(wide)
        yield start, torch.nn.functional.layer_norm(rows, (n_embd,), scale, shift, 1e-5)


def _as_stored(shape: tuple[int, ...]) -> Recipe:
    def recipe(sources: Sequence[torch.Tensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        yield sources[0].reshape(shape).to(dtype).contiguous()

    return recipe
