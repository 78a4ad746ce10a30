"""What the fused kernels share: dimensions, how matrices are stored, choices that change speed, shared memory.

The CUDA text that goes with it is `fused.cuh`. Letters of shapes: B streams, D width, A = H·N inner width, F hidden
width, K rows of a matrix, N its columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from rwkv_edge.errors import InputError
from rwkv_edge.plugins import nvrtc

MAX_BATCH: Final = 8
"""Streams that one chain of matrix-vector products carries; more run as several chains."""

ALIGNMENT: Final = 8
"""Widths and ranks are multiples of this: rows of a matrix begin at 16 bytes in every dtype."""

COLUMNS: Final[Mapping[str, int]] = {"int8": 16, "int4": 32}
"""Columns of a matrix are a multiple of this: its rows begin at 16 bytes."""

EMBEDDING: Final = "emb"
RANKS: Final = ("rank_w", "rank_a", "rank_g", "rank_v", "rank_mix", "rank_deep")
TYPES: Final[Mapping[str, str]] = {"float32": "Float", "float16": "Half", "bfloat16": "Brain"}
"""Names of `rwkv_edge.plugins.kernels` for dtypes."""

_ITEM: Final = {"float32": 4, "float16": 2, "bfloat16": 2}
WARP: Final = 32
LOAD: Final = 16  # bytes
BURST: Final = 4  # loads that are waited for together
SKEW: Final = 32  # rows of inputs that are moved together; see fused.cuh
OWN_SHARED: Final = 48 << 10  # bytes that every device gives a block unasked
FROM_TOKENS: Final = ("tokens", "emb", "emb.scale")


@dataclass(frozen=True)
class Dimensions:
    """What the kernels of a model depend on.

    Attributes:
        width: D.
        inner: A.
        hidden: F.
        heads: H; 0 in RWKV-4, whose channels are each on their own.
        head_size: N; 0 without heads.
        vocabulary: V.
        rank_w: of the decay's LoRA in RWKV-6 and 7; as all ranks, 0 where there is none.
        rank_a: of the rates' LoRA in RWKV-7.
        rank_g: of the gate's LoRA in RWKV-7.
        rank_v: of the value residual's LoRA in RWKV-7.
        dtype: of matrices, small vectors and token-shift states.
        rank_mix: of each of RWKV-6's token-shift mixes.
        rank_deep: of 7a's DeepEmbed.
        layers: of the model.
        rescale: layers after which the residual stream is halved, 0 for never.
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
    rank_mix: int = 0
    rank_deep: int = 0
    layers: int = 0
    rescale: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in TYPES:
            raise InputError(f"the fused kernels take {', '.join(TYPES)}; found {self.dtype!r}")
        sizes = {name: getattr(self, name) for name in ("width", "inner", "hidden", "head_size")}
        sizes |= {name: getattr(self, name) for name in RANKS}
        for name, size in sizes.items():
            if size % ALIGNMENT:
                raise InputError(f"the fused kernels need a {name} that is a multiple of {ALIGNMENT}; found {size}")
        if self.heads and (self.head_size > 128 or self.heads * self.head_size != self.inner):
            raise InputError(
                f"the fused kernels need heads of at most 128 channels that fill the inner width; found {self.heads} "
                f"of {self.head_size} for {self.inner}"
            )


@dataclass(frozen=True)
class Stored:
    """How a matrix lies in memory where it is not in the model's dtype.

    Attributes:
        form: 'int8', with a scale for each column (of an embedding: for each row), or 'int4', two columns a byte, the
            first in the low half, with scales [K / block, N].
        block: inputs that share a scale in int4.
    """

    form: Literal["int8", "int4"]
    block: int | None = None


@dataclass(frozen=True)
class Choice:
    """What changes the speed of one kernel alone.

    Attributes:
        tile: columns of a block, a power of two; for partial sums, more where a load of integers has more.
        split: blocks that share the rows of a matrix.
        ahead: loads of a thread in flight, 16 bytes each; fewer where the device's shared memory does not hold them.
        threads: of a block.
    """

    tile: int
    split: int = 1
    ahead: int = 16
    threads: int = 256


@dataclass(frozen=True)
class Tuning:
    """Choices that change speed, and the order of sums.

    Attributes:
        time_mix_in: see `Choice`.
        wkv: its tile has no meaning.
        time_mix_out: see `Choice`.
        channel_mix_in: see `Choice`.
        channel_mix_out: see `Choice`.
        head: see `Choice`.
        skip: rows of the value matrix whose input is zero are not read.
        eager: a kernel lets the next one in before it waits itself, so that more than two are under way.
        merge: the recurrence's blocks multiply by the output matrix too: a kernel less, and a partial sum for each head
            that the next one reads. RWKV-7, one stream; loads in flight are those of ``time_mix_out``.
        wide_from: streams from which a step goes through the wide kernels, where those run the model; see
            `rwkv_edge.plugins.wide`. More than `MAX_BATCH` always do.
    """

    time_mix_in: Choice = Choice(32)
    wkv: Choice = Choice(64)
    time_mix_out: Choice = Choice(32, 4)
    channel_mix_in: Choice = Choice(32)
    channel_mix_out: Choice = Choice(64, 8)
    head: Choice = Choice(64)
    skip: bool = True
    eager: bool = True
    merge: bool = False
    wide_from: int = MAX_BATCH + 1


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


@dataclass(frozen=True)
class Products:
    """How a kernel's matrices are stored: bits of those in int8 and int4, inputs that share a scale, all forms."""

    int8: int = 0
    int4: int = 0
    block: int = 1
    forms: frozenset[str | None] = frozenset()


def ring_bytes(
    rows: int, choice: Choice, form: str | None, dtype: str, batch: int, block: int = 1, span: int | None = None
) -> int:
    """Bytes of shared memory for the loads of a product in flight: ``Columns::ROOM`` of fused.cuh.

    Args:
        rows: of the matrix, or of a slice.
        choice: of the kernel.
        form: 'int8', 'int4', or None for ``dtype``.
        dtype: of matrices that are in neither.
        batch: streams.
        block: inputs that share a scale in int4.
        span: threads that read a row; None where the lanes of a warp read one of the tile.
    """
    if not rows:
        return 0
    load = _load4(batch) if form == "int4" else LOAD
    groups = choice.threads // (span or _power_from(-(-choice.tile // per_load(form, dtype, batch))))
    if form == "int4":
        share = min(_power_up_to(groups // (rows // block)), block // 4)
        turns = -(-(rows // block) // (groups // share)) * (block // share)
        burst = BURST
        depth = min(turns, -(-choice.ahead // burst) * burst)
    else:
        turns = -(-rows // groups)
        burst = min(turns, choice.ahead, BURST)
        depth = -(-min(turns, choice.ahead) // burst) * burst
    return depth * choice.threads * load


def _load4(batch: int) -> int:
    """Bytes of a load of int4."""
    return 4 if batch > 4 else 8 if batch > 2 else LOAD


def per_load(form: str | None, dtype: str, batch: int) -> int:
    """Weights of one load."""
    if form == "int4":
        return 2 * _load4(batch)
    return LOAD if form == "int8" else LOAD // _ITEM[dtype]


def check_tile(source: str, choice: Choice, products: Products, dtype: str, batch: int, rows: int) -> None:
    """Refuse tiles that a warp does not read, or whose sums the threads do not finish evenly."""
    if not rows:
        return
    loads = [per_load(form, dtype, batch) for form in products.forms]
    least, most = max(loads), min(*(load * WARP for load in loads), choice.threads)
    if choice.tile < least or choice.tile & (choice.tile - 1) or choice.tile > most:
        raise InputError(
            f"a tile of {source} must be a power of two from {least} to {most} columns; found {choice.tile}"
        )


def head_columns(vocabulary: int) -> int:
    """Columns that the head has on the device: zeros up to a multiple of what a load takes in any form."""
    return rounded_up(vocabulary, max(COLUMNS.values()))


def rounded_up(size: int, unit: int) -> int:
    """The smallest multiple of ``unit`` from ``size`` on."""
    return -(-size // unit) * unit


def _power_from(least: int) -> int:
    """The smallest power of two from ``least`` on."""
    return 1 << max(least - 1, 0).bit_length()


def _power_up_to(most: int) -> int:
    """The largest power of two up to ``most``, at least 1."""
    return 1 << max(most.bit_length() - 1, 0)
