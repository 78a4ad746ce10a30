"""The fused kernels of RWKV-7, five a layer: what is compiled for a model, and in which order arguments go.

A kernel is compiled for the dimensions of one model, so that every loop is unrolled and its first loads are issued
before the kernel ahead has ended. Letters of shapes: B streams, D width, A = H·N inner width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rwkv_edge.errors import InputError
from rwkv_edge.plugins import nvrtc

MAX_BATCH: Final = 8
"""Streams that one chain of matrix-vector products carries; more run as several chains."""

ALIGNMENT: Final = 8
"""Widths and ranks are multiples of this: rows of a matrix begin at 16 bytes in every dtype."""

INT8_ALIGNMENT: Final = 16
INT8_MATRICES: Final = ("receptance", "key", "value", "output", "g1", "g2", "head")
"""What an artifact may hold in int8. The other LoRAs feed the state, and versions keep them in float."""

TYPES: Final[Mapping[str, str]] = {"float32": "Float", "float16": "Half", "bfloat16": "Brain"}
"""Names of `rwkv_edge.plugins.kernels` for dtypes."""

_ITEM: Final = {"float32": 4, "float16": 2, "bfloat16": 2}
WARP: Final = 32


@dataclass(frozen=True)
class Dimensions:
    """What the kernels of a model depend on.

    Attributes:
        width: D.
        inner: A.
        hidden: F.
        heads: H.
        head_size: N.
        vocabulary: V.
        rank_w: of the decay's LoRA, as for the rates a, the gate g and the value residual v.
        rank_a: see ``rank_w``.
        rank_g: see ``rank_w``.
        rank_v: see ``rank_w``; 0 in a model of one layer.
        dtype: of matrices, small vectors and token-shift states.
    """

    width: int
    inner: int
    hidden: int
    heads: int
    head_size: int
    vocabulary: int
    rank_w: int
    rank_a: int
    rank_g: int
    rank_v: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in TYPES:
            raise InputError(f"the fused kernels take {', '.join(TYPES)}; found {self.dtype!r}")
        sizes = {name: getattr(self, name) for name in ("width", "inner", "hidden", "head_size", "vocabulary")}
        sizes |= {name: getattr(self, name) for name in ("rank_w", "rank_a", "rank_g", "rank_v")}
        for name, size in sizes.items():
            if size % ALIGNMENT:
                raise InputError(f"the fused kernels need a {name} that is a multiple of {ALIGNMENT}; found {size}")
        if self.head_size > 128 or self.heads * self.head_size != self.inner:
            raise InputError(
                f"the fused kernels need heads of at most 128 channels that fill the inner width; found {self.heads} "
                f"of {self.head_size} for {self.inner}"
            )


@dataclass(frozen=True)
class Tuning:
    """Choices that change speed alone.

    Attributes:
        time_mix_in: columns of a block, as in the other kernels.
        time_mix_out: see ``time_mix_in``.
        time_mix_split: blocks that share the rows of the output matrix.
        channel_mix_in: see ``time_mix_in``.
        channel_mix_out: see ``time_mix_in``.
        channel_mix_split: blocks that share the rows of the value matrix.
        head: see ``time_mix_in``.
        skip: rows of the value matrix whose input is zero are not read.
        ahead: loads of a thread in flight.
        threads: of a block.
    """

    time_mix_in: int = 32
    time_mix_out: int = 32
    time_mix_split: int = 4
    channel_mix_in: int = 32
    channel_mix_out: int = 64
    channel_mix_split: int = 8
    head: int = 64
    skip: bool = True
    ahead: int = 8
    threads: int = 256


@dataclass(frozen=True)
class FusedKernel:
    """One kernel, compiled for one model and number of streams.

    Its arguments are the pointers of ``inputs``, then of ``outputs``, in the order of TensorRT's ahead-of-time plugins.

    Attributes:
        name: of the entry point.
        source: file of `rwkv_edge.plugins.kernels`.
        defines: macros to compile it with.
        inputs: names of tensors read.
        outputs: names of tensors written.
        grid: blocks along x, y and z.
        threads: of a block.
        shared: dynamic shared memory in bytes.
    """

    name: str
    source: str
    defines: tuple[tuple[str, str], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    grid: tuple[int, int, int]
    threads: int
    shared: int = 0

    def ptx(self, capability: int, cache: Path | None = None) -> str:
        """PTX for a device of compute capability ``capability`` (90 for 9.0); see `nvrtc.compile_ptx`."""
        return nvrtc.compile_ptx(self.source, self.defines, capability, cache)


class Kernels:
    """The kernels of a model for one number of streams."""

    def __init__(self, dimensions: Dimensions, batch: int, tuning: Tuning, int8: Collection[str] = frozenset()) -> None:
        """Nothing is compiled yet.

        Args:
            dimensions: of the model.
            batch: streams, 1 to `MAX_BATCH`.
            tuning: choices that change speed alone.
            int8: names of the matrices that are int8, each with a scale for every column: 'blocks.0.att.key', 'head'.

        Raises:
            InputError: too many streams, or a matrix that the kernels do not take in int8.
        """
        if not 1 <= batch <= MAX_BATCH:
            raise InputError(f"a chain of fused kernels carries 1 to {MAX_BATCH} streams; found {batch}")
        self.dimensions, self.batch, self.tuning, self.int8 = dimensions, batch, tuning, frozenset(int8)
        columns = {"value": dimensions.width, "key": dimensions.hidden, "g1": dimensions.rank_g}
        for name in sorted(self.int8):
            part = name.rpartition(".")[2]
            if part not in INT8_MATRICES:
                raise InputError(f"the fused kernels take {', '.join(INT8_MATRICES)} in int8; found {name}")
            wanted = dimensions.head_size if part == "g2" else columns.get(part, dimensions.inner)
            if wanted % INT8_ALIGNMENT:
                raise InputError(
                    f"an int8 matrix of the fused kernels needs columns in multiples of {INT8_ALIGNMENT}; "
                    f"found {wanted} for {name}"
                )

    def time_mix_in(self, layer: int) -> FusedKernel:
        """Residual sum, norm, mixes, receptance, key, value, first halves of the LoRAs."""
        d, tile = self.dimensions, self.tuning.time_mix_in
        first, rank_v = layer == 0, d.rank_v if layer else 0
        columns = [d.inner] * 3 + [d.rank_w, d.rank_a, d.rank_g, rank_v]
        source = ("tokens", "emb") if first else ("stream", "parts")
        matrices = ("receptance", "key", "value", "w1", "a1", "g1", *(["v1"] if rank_v else []))
        return self._kernel(
            "v7_time_mix_in",
            {"EMBED": int(first), "RANK_V": rank_v, "INT8": self._mask(f"blocks.{layer}.att.", matrices),
             **self._ranks()},
            tile,
            self.tuning.channel_mix_split,
            (
                *source, "shift", "ln.weight", "ln.bias", "mix", *matrices, *(f"{name}.scale" for name in matrices),
            ),
            ("stream", "shift", "r", "k", "v", "hw", "ha", "hg", *(["hv"] if rank_v else [])),
            (sum(-(-n // tile) for n in columns), 1, 1),
            self.batch * d.width,
        )  # fmt: skip

    def wkv(self, layer: int) -> FusedKernel:
        """Second halves of the LoRAs, the recurrence, group norm, bonus, gate."""
        d, rank_v = self.dimensions, self.dimensions.rank_v if layer else 0
        return self._kernel(
            "v7_wkv",
            {"RANK_V": rank_v, "INT8": self._mask(f"blocks.{layer}.att.", ("g2",)), **self._ranks()},
            d.head_size,
            0,
            (
                "r", "k", "v", "hw", "ha", "hg", *(["hv", "v_first"] if rank_v else []), "w2", "a2", "g2",
                "g2.scale", *(["v2"] if rank_v else []), "w0", "a0", *(["v0"] if rank_v else []), "k_k", "k_a", "r_k",
                "ln_x.weight", "ln_x.bias", "wkv",
            ),
            ("y", "wkv"),
            (d.heads, self.batch, 1),
            0,
            batch=1,
        )  # fmt: skip

    def time_mix_out(self, layer: int) -> FusedKernel:
        """Output, as partial sums for the residual stream."""
        tile, split = self.tuning.time_mix_out, self.tuning.time_mix_split
        return self._project("y", f"blocks.{layer}.att.", "output", self.dimensions.inner, tile, split, skip=False)

    def channel_mix_in(self, layer: int) -> FusedKernel:
        """Residual sum, norm, mix, key, relu²."""
        d, tile = self.dimensions, self.tuning.channel_mix_in
        return self._kernel(
            "v7_channel_mix_in",
            {"HIDDEN": d.hidden, "INT8": self._mask(f"blocks.{layer}.ffn.", ("key",))},
            tile,
            self.tuning.time_mix_split,
            ("stream", "parts", "shift", "ln.weight", "ln.bias", "mix", "key", "key.scale"),
            ("stream", "shift", "hidden"),
            (-(-d.hidden // tile), 1, 1),
            self.batch * d.width,
        )

    def channel_mix_out(self, layer: int) -> FusedKernel:
        """Value, as partial sums for the residual stream."""
        tile, split, skip = self.tuning.channel_mix_out, self.tuning.channel_mix_split, self.tuning.skip
        return self._project("hidden", f"blocks.{layer}.ffn.", "value", self.dimensions.hidden, tile, split, skip)

    def head(self) -> FusedKernel:
        """Last norm and head: logits, and the largest of every block."""
        d, tile = self.dimensions, self.tuning.head
        return self._kernel(
            "head",
            {"VOCABULARY": d.vocabulary, "INT8": self._mask("", ("head",))},
            tile,
            self.tuning.channel_mix_split,
            ("stream", "parts", "ln_out.weight", "ln_out.bias", "head", "head.scale"),
            ("logits", "best", "best_at"),
            (self.head_blocks, 1, 1),
            self.batch * d.width,
        )

    def argmax(self) -> FusedKernel:
        """The greedy choice."""
        defines = {"COUNT": self.head_blocks}
        return self._kernel("argmax", defines, 8, 0, ("best", "best_at"), ("tokens",), (self.batch, 1, 1), 0)

    @property
    def head_blocks(self) -> int:
        """Blocks of `head`: as many largest values it leaves for each stream."""
        return -(-self.dimensions.vocabulary // self.tuning.head)

    def _mask(self, prefix: str, matrices: Sequence[str]) -> int:
        """A bit for each matrix that is int8."""
        return sum(1 << bit for bit, name in enumerate(matrices) if prefix + name in self.int8)

    def _project(
        self, source: str, prefix: str, matrix: str, rows: int, tile: int, split: int, skip: bool
    ) -> FusedKernel:
        return self._kernel(
            "v7_project",
            {"FROM": rows, "SPLIT": split, "SKIP": int(skip), "INT8": self._mask(prefix, (matrix,))},
            tile,
            0,
            (source, matrix, f"{matrix}.scale"),
            ("parts",),
            (-(-self.dimensions.width // tile), split, 1),
            self.batch * -(-rows // split),
        )

    def _ranks(self) -> dict[str, int]:
        d = self.dimensions
        return {"INNER": d.inner, "RANK_W": d.rank_w, "RANK_A": d.rank_a, "RANK_G": d.rank_g}

    def _kernel(
        self,
        source: str,
        defines: Mapping[str, int],
        tile: int,
        parts: int,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        grid: tuple[int, int, int],
        shared_floats: int,
        batch: int | None = None,
    ) -> FusedKernel:
        d = self.dimensions
        macros = {
            "KERNEL": f"rwkv_{source}", "ACT": TYPES[d.dtype], "WEIGHT": TYPES[d.dtype], "HEAD": d.head_size,
            "THREADS": self.tuning.threads, "BATCH": batch or self.batch, "WIDTH": d.width, "TILE": tile,
            "PARTS": parts, "AHEAD": self.tuning.ahead, "INT8": 0, **defines,
        }  # fmt: skip
        least, most = 16 if macros["INT8"] else 16 // _ITEM[d.dtype], 16 // _ITEM[d.dtype] * WARP
        if source != "v7_wkv" and (tile < least or tile & (tile - 1) or tile > min(most, self.tuning.threads)):
            raise InputError(
                f"a tile of {source} must be a power of two from {least} to {min(most, self.tuning.threads)} columns; "
                f"found {tile}"
            )
        return FusedKernel(
            name=str(macros["KERNEL"]),
            source=f"{source}.cu",
            defines=tuple((name, str(value)) for name, value in macros.items()),
            inputs=inputs,
            outputs=outputs,
            grid=grid,
            threads=self.tuning.threads,
            shared=4 * shared_floats,
        )
