"""The wide kernels of RWKV-7 and 7a: M = B·T rows at once, through tensor cores, for prompts and for large batches.

What is compiled for a model and a class of row counts, and in which order arguments go. Letters of shapes: B streams, T
tokens of each, D width, A = H·N inner width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final

from rwkv_edge.plugins.fused_spec import TYPES, Dimensions, FusedKernel, Stored

PRODUCTS: Final = 7
"""Products of one launch at most: receptance, key, value and the first halves of four LoRAs."""

AMPERE: Final = 80
"""Compute capability from which loads to shared memory run on their own, and bfloat16 has tensor cores."""

NORM_THREADS: Final = 256
NORM_ROWS: Final = 4  # of a block in a sequence: the row before them is normed twice
GATE_THREADS: Final = 256
STEP_THREADS: Final = 128
ARGMAX_THREADS: Final = 512
CHUNK: Final = 8  # tokens of a buffer of the recurrence
BUFFERS: Final = 2
SCALARS: Final = 4  # of a token in a buffer, padding included
PREPARING: Final = 128  # threads
CONSUMERS: Final = 64  # threads at most
EVERY_GRID: Final = (0, 0, 0)
"""In the place of a kernel's grid: that of a launch depends on its rows."""

LEAST_BLOCK: Final = 32  # inputs that share a scale in int4, at least
FLOAT: Final = 4  # bytes
HALF: Final = 2
WARP: Final = 32


class Finish(IntEnum):
    """What becomes of a sum, as in wide_product.cuh."""

    TO_FLOAT = 0
    TO_ACT = 1
    TO_TANH = 2
    TO_SIGMOID = 3
    TO_RELU_SQUARE = 4
    TO_DECAY = 5
    TO_RATE = 6
    TO_BLEND = 7
    TO_MULTIPLE = 8


class Form(IntEnum):
    """How a matrix is stored, as in wide_product.cuh."""

    IN_FLOAT = 0
    IN_INT8 = 1
    IN_INT4 = 2

    @classmethod
    def of(cls, stored: Stored | None) -> Form:
        """That of a matrix of an artifact; None for one in the model's dtype."""
        if stored is None:
            return cls.IN_FLOAT
        return cls.IN_INT8 if stored.form == "int8" else cls.IN_INT4


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a block, inputs of a stage, stages in shared memory, and how warps share the block.

    ``resident`` blocks should fit a multiprocessor at once.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    warps_m: int
    warps_n: int
    resident: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return WARP * self.warps_m * self.warps_n

    def shared(self, int4: bool) -> int:
        """Bytes of all stages; with matrices in int4, those of their scales too."""
        scales = self.depth // LEAST_BLOCK * self.columns if int4 else 0
        return self.stages * HALF * (self.depth * (self.rows + self.columns) + scales)

    @property
    def for_int4(self) -> Tile:
        """A warp has at least 32 columns: those that lie in 16 bytes."""
        warps = min(self.warps_n, self.columns // WARP)
        return replace(self, warps_n=warps)


TILES: Final = (
    Tile(16, 64, 64, 8, 1, 4, 2),
    Tile(32, 64, 64, 7, 2, 2, 2),
    Tile(64, 64, 64, 6, 2, 2, 2),
    Tile(128, 64, 64, 4, 4, 2, 2),
    Tile(128, 128, 64, 3, 2, 4, 2),
)
"""By the number of rows that they have, and more than 128 rows. All fit 99 KB, what sm_86 gives a block."""

TURING_TILE: Final = Tile(64, 64, 64, 2, 2, 2, 2)
PLAIN_TILE: Final = Tile(64, 64, 16, 1, 4, 2, 1)


def tile_for(rows: int, capability: int, dtype: str) -> Tile:
    """The tile of a number of rows."""
    if not uses_tensor_cores(capability, dtype):
        return PLAIN_TILE
    if capability < AMPERE:
        return TURING_TILE
    return next((tile for tile in TILES if rows <= tile.rows), TILES[-1])


def uses_tensor_cores(capability: int, dtype: str) -> bool:
    """Whether products of a dtype have tensor cores that add up in float32 without rounding inputs."""
    return dtype == "float16" or (dtype == "bfloat16" and capability >= AMPERE)


class WideKernels:
    """The wide kernels of a model for row counts up to ``rows``.

    Arguments of all of them are 8 bytes each, numbers and pointers in the order of a kernel's ``inputs``.
    """

    def __init__(self, dimensions: Dimensions, rows: int, capability: int, multiprocessors: int) -> None:
        """Nothing is compiled yet.

        Args:
            dimensions: of the model.
            rows: the largest M.
            capability: of the device, 90 for 9.0.
            multiprocessors: of the device.
        """
        self.dimensions, self.rows, self._capability = dimensions, rows, capability
        self.tile = tile_for(rows, capability, dimensions.dtype)
        self._tensor_cores = uses_tensor_cores(capability, dimensions.dtype)
        self._multiprocessors = multiprocessors

    def norm(self, mixes: int, parts: int, embed: Form | None, sequence: bool, plain: bool = False) -> FusedKernel:
        """Residual sum, norm and token-shift mixes; ``mixes`` = 0: the norm alone, of each stream's last rows.

        ``embed``: how the embedding is stored, where its rows are the stream; ``plain``: the normed rows themselves
        come after the mixes.
        """
        source = ("ids", "table", "table.scale") if embed is not None else ("stream", "parts")
        shifted = ("shift", "mix", "halted", "stream.out", "shift.out")
        return self._kernel(
            "wide_norm",
            {
                "WIDTH": self.dimensions.width,
                "ROWS": NORM_ROWS if sequence else 1,
                "MIXES": mixes,
                "PLAIN": int(plain),
                "PARTS": parts if embed is None else 0,
                "EMBED": int(embed is not None),
                "EMBED_INT8": int(embed == Form.IN_INT8),
            },
            ("tokens", *source, "ln.weight", "ln.bias", *(shifted if mixes else ("kept",)), "mixed"),
            NORM_THREADS,
        )

    def tile_of(self, rows: int) -> Tile:
        """The tile of fewer rows."""
        return tile_for(rows, self._capability, self.dimensions.dtype)

    def product(self, forms: Set[Form], split: int = 1, tile: Tile | None = None) -> FusedKernel:
        """Up to `PRODUCTS` products of matrices in some forms; ``split`` blocks share the inputs of one tile."""
        tile, int4 = tile or self.tile, Form.IN_INT4 in forms
        defines = {"TILE_M": tile.rows, "TILE_N": tile.columns, "TILE_K": tile.depth, "SPLIT": split}
        defines["FORMS"] = sum(1 << form for form in forms)
        arguments = ("rows", *(f"{name}.{i}" for i in range(PRODUCTS) for name in PRODUCT))
        if not self._tensor_cores:
            return self._kernel("wide_product_plain", defines, arguments, tile.threads)
        if int4:
            tile = tile.for_int4
        defines |= {"STAGES": tile.stages, "WARPS_M": tile.warps_m, "WARPS_N": tile.warps_n, "RESIDENT": tile.resident}
        return self._kernel("wide_product", defines, arguments, tile.threads, tile.shared(int4))

    def step(self) -> FusedKernel:
        """The recurrence of one token, group norm, bonus and gate."""
        return self._kernel(
            "wide_step",
            self._heads,
            ("r", "w", "k", "v", "a", "g", "k_k", "k_a", "r_k", "ln_x.weight", "ln_x.bias", "halted", "wkv", "gated"),
            STEP_THREADS if self.dimensions.head_size <= 64 else 2 * STEP_THREADS,
        )

    def sequence(self, batch: int) -> FusedKernel:
        """The recurrence of T tokens of so many streams."""
        head, (consumers, rows, lanes) = self.dimensions.head_size, self._spread(batch)
        wide = -(-head // (4 * lanes)) * 4 * lanes
        return self._kernel(
            "wide_sequence",
            {**self._heads, "CONSUMERS": consumers, "ROWS": rows, "LANES": lanes, "CHUNK": CHUNK},
            ("tokens", "r", "w", "k", "v", "a", "k_k", "k_a", "r_k", "halted", "wkv", "y", "bonus"),
            consumers + PREPARING,
            (BUFFERS * CHUNK * (5 * wide + head + SCALARS) + wide) * FLOAT,
        )

    def gate(self) -> FusedKernel:
        """Group norm, bonus and gate after the recurrence of T tokens."""
        arguments = ("y", "v", "g", "bonus", "ln_x.weight", "ln_x.bias", "gated")
        return self._kernel("wide_gate", self._heads, arguments, GATE_THREADS)

    def deep_embed(self) -> FusedKernel:
        """Rows of DeepEmbed's rank R times a matrix [R, R] of each row's token."""
        rank = self.dimensions.rank_deep
        return self._kernel("wide_deep_embed", {"RANK": rank}, ("ids", "s_emb", "hs", "turned"), WARP)

    def argmax(self) -> FusedKernel:
        """The greedy choice."""
        return self._kernel("wide_argmax", {}, ("columns", "logits", "ids"), ARGMAX_THREADS)

    def split(self, depth: int, columns: int) -> int:
        """Blocks that share the inputs of a tile of a product whose sums stay open, so that the GPU is full."""
        tiles = -(-self.rows // self.tile.rows) * -(-columns // self.tile.columns)
        wanted = self._multiprocessors * self.tile.resident // tiles
        most = depth // (4 * self.tile.depth)
        return next(parts for parts in PARTS if parts <= max(1, min(wanted, most)))

    def sequence_blocks(self, batch: int) -> int:
        """Blocks of `sequence` for one head of one of so many streams."""
        consumers, rows, lanes = self._spread(batch)
        return -(-self.dimensions.head_size // (consumers // lanes * rows))

    @property
    def _heads(self) -> dict[str, int]:
        return {"HEAD": self.dimensions.head_size, "INNER": self.dimensions.inner}

    def _spread(self, batch: int) -> tuple[int, int, int]:
        """Consumers of a block of `sequence`, rows of the state of each, and those that share a row.

        One row where blocks are few enough to have a multiprocessor each: rows do not depend on each other, and a token
        takes as long as the instructions of one thread.
        """
        head, lanes = self.dimensions.head_size, 1
        while lanes * 8 < head:  # a thread has two quads of columns
            lanes *= 2
        blocks = -(-head * lanes // CONSUMERS) * self.dimensions.heads * batch
        rows = 1 if blocks <= self._multiprocessors else 2
        return min(CONSUMERS, -(-head * lanes // (rows * WARP)) * WARP), rows, lanes

    def _kernel(
        self, source: str, defines: Mapping[str, int], arguments: tuple[str, ...], threads: int, shared: int = 0
    ) -> FusedKernel:
        name, act = f"rwkv_{source}", TYPES[self.dimensions.dtype]
        macros: dict[str, object] = {"KERNEL": name, "ACT": act, "WEIGHT": act, "THREADS": threads, **defines}
        defined = tuple((name, str(value)) for name, value in macros.items())
        return FusedKernel(name, f"{source}.cu", defined, arguments, (), EVERY_GRID, threads, shared)


PARTS: Final = (4, 2, 1)
"""Partial sums that `WideKernels.norm` adds: more cost more memory traffic than they fill multiprocessors, and fewer
numbers of them are fewer kernels."""

PRODUCT: Final = (
    "input", "matrix", "scale", "output", "offset", "other", "columns", "pitch", "depth", "finish", "form", "block",
)  # fmt: skip
"""Arguments of one product."""
