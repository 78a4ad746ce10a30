"""The fused kernels of a model: what is compiled, in which order arguments go, and the order of launches.

A kernel is compiled for the dimensions of one model, so that every loop is unrolled and its first loads are issued
before the kernel ahead has ended. A version has a file of its own, `fused_v7` and so on; `fused_versions` lists them.
Letters of shapes: B streams, D width, A = H·N inner width, F hidden width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

from rwkv_edge.errors import InputError
from rwkv_edge.plugins.fused_spec import (
    COLUMNS,
    EMBEDDING,
    FROM_TOKENS,
    MAX_BATCH,
    OWN_SHARED,
    SKEW,
    TYPES,
    WARP,
    Choice,
    Dimensions,
    FusedKernel,
    Products,
    Stored,
    Tuning,
    check_tile,
    head_columns,
    per_load,
    ring_bytes,
    rounded_up,
)
from rwkv_edge.spec import ModelSpec


@dataclass(frozen=True)
class Mixed:
    """A product of `mix_in.cu`.

    Attributes:
        matrix: its name.
        mix: coefficients of its input; None where that is the norm's output itself.
        columns: of the matrix.
        to: buffer that it is written to.
        finish: what becomes of a sum: 'PLAIN', 'TANH', 'SIGMOID' or 'RELU_SQUARED'.
    """

    matrix: str
    mix: str | None
    columns: int
    to: str
    finish: str = "PLAIN"


class Kernels(ABC):
    """The kernels of a model for one number of streams.

    Attributes:
        from_before: the token-shift mix is x' + (x − x')·μ (RWKV-4 and 5) and not x + (x' − x)·μ, x' the state.
        rows: what the rows of the stacked coefficients ``att.mix`` are called where kernels take them one by one.
        int8_only: matrices that no artifact holds in int4.
    """

    from_before: ClassVar[bool] = False
    rows: ClassVar[tuple[str, ...]] = ()
    int8_only: ClassVar[tuple[str, ...]] = (EMBEDDING,)

    def __init__(
        self,
        dimensions: Dimensions,
        batch: int,
        tuning: Tuning,
        stored: Mapping[str, Stored] = MappingProxyType({}),
        halting: bool = True,
        shared: int = OWN_SHARED,
    ) -> None:
        """Nothing is compiled yet.

        Args:
            dimensions: of the model.
            batch: streams, 1 to `MAX_BATCH`.
            tuning: choices that change speed alone.
            stored: of the matrices, and the embedding, that are not in the model's dtype, by name: 'blocks.0.att.key'.
            halting: the kernels take flags of streams whose state stays as it is.
            shared: bytes of shared memory that a block may have.

        Raises:
            InputError: too many streams, or a matrix that the kernels do not take in that form.
        """
        if not 1 <= batch <= MAX_BATCH:
            raise InputError(f"a chain of fused kernels carries 1 to {MAX_BATCH} streams; found {batch}")
        self.dimensions, self.batch, self.tuning, self.stored = dimensions, batch, tuning, dict(stored)
        self._halting, self._shared = halting, shared
        columns = self.columns()
        for name, how in sorted(self.stored.items()):
            part = ".".join(name.split(".")[-2:])
            forms = ("int8",) if part in self.int8_only else tuple(COLUMNS)
            if part not in columns or how.form not in forms:
                known = sorted(n for n in columns if how.form == "int8" or n not in self.int8_only)
                raise InputError(f"the fused kernels take {', '.join(known)} in {how.form}; found {name}")
            if part != EMBEDDING and columns[part] % COLUMNS[how.form]:
                raise InputError(
                    f"an {how.form} matrix of the fused kernels needs columns in multiples of {COLUMNS[how.form]}; "
                    f"found {columns[part]} for {name}"
                )

    @classmethod
    def dimensions_of(cls, spec: ModelSpec) -> Dimensions:
        """What the kernels of a model of this version depend on.

        Raises:
            InputError: they cannot run it.
        """
        return cls._dimensions(spec, spec.n_head, spec.head_size)

    @classmethod
    def _dimensions(cls, spec: ModelSpec, heads: int, head_size: int) -> Dimensions:
        return Dimensions(
            spec.n_embd, spec.n_att, spec.n_ffn, heads, head_size, spec.vocab_size, 0, 0, 0, 0, spec.act_dtype,
            layers=spec.n_layer, rescale=spec.rescale,
        )  # fmt: skip

    @abstractmethod
    def time_mix(self, layer: int) -> tuple[FusedKernel, ...]:
        """The first half of a layer, in the order of launches."""

    @abstractmethod
    def channel_mix(self, layer: int) -> tuple[FusedKernel, ...]:
        """The second half."""

    def time_mix_parts(self, layer: int) -> int:
        """Partial sums that the time mix of a layer leaves for the residual stream."""
        del layer
        return self.tuning.time_mix_out.split

    def columns(self) -> Mapping[str, int]:
        """What an artifact may hold in int8 or int4, with its columns that a block must divide."""
        d = self.dimensions
        found = {f"att.{name}": d.inner for name in ("receptance", "key", "value")}
        found |= {"att.output": d.width, "ffn.key": d.hidden, "ffn.value": d.width}
        return {**found, "head": head_columns(d.vocabulary), EMBEDDING: d.width}

    def buffers(self) -> dict[str, int]:
        """What the kernels hand on, by name: how many floats for each stream."""
        d, tuning = self.dimensions, self.tuning
        split = max(tuning.channel_mix_out.split, *(self.time_mix_parts(layer) for layer in range(max(d.layers, 1))))
        return {
            "stream.0": d.width, "stream.1": d.width, "parts": d.width * split, "y": d.inner, "hidden": d.hidden,
            "best": self.head_blocks, "best_at": self.head_blocks,
        }  # fmt: skip

    def head(self) -> FusedKernel:
        """Last norm and head: logits, and the largest of every block."""
        d, choice = self.dimensions, self.tuning.head
        return self._kernel(
            "head",
            {"VOCABULARY": d.vocabulary, "HEAD_COLUMNS": head_columns(d.vocabulary), "HALVE": self._halves(d.layers)},
            choice,
            self._products("", ("head",)),
            ("stream", "parts", "ln_out.weight", "ln_out.bias", "head", "head.scale"),
            ("logits", "best", "best_at"),
            (self.head_blocks, 1, 1),
            rows=d.width,
            parts=self.tuning.channel_mix_out.split,
        )

    def argmax(self) -> FusedKernel:
        """The greedy choice."""
        defines = {"COUNT": self.head_blocks}
        return self._kernel(
            "argmax", defines, Choice(8, ahead=1), Products(), ("best", "best_at"), ("tokens",), (self.batch, 1, 1)
        )

    def of_step(self, layers: int) -> set[FusedKernel]:
        """All that a step of so many layers launches."""
        found = {self.head(), self.argmax()}
        for layer in range(layers):
            found |= {*self.time_mix(layer), *self.channel_mix(layer)}
        return found

    @property
    def head_blocks(self) -> int:
        """Blocks of `head`: as many largest values it leaves for each stream."""
        return -(-self.dimensions.vocabulary // self.tuning.head.tile)

    def _products(self, prefix: str, matrices: Sequence[str]) -> Products:
        """How the matrices of a kernel are stored."""
        found = [self.stored.get(prefix + name) for name in matrices]
        masks = {
            form: sum(1 << bit for bit, how in enumerate(found) if how is not None and how.form == form)
            for form in ("int8", "int4")
        }
        blocks = {how.block for how in found if how is not None and how.block is not None}
        if len(blocks) > 1:
            raise InputError(f"the fused kernels need one block size for all matrices of {prefix}; found {blocks}")
        forms = frozenset(None if how is None else how.form for how in found)
        return Products(masks["int8"], masks["int4"], blocks.pop() if blocks else 1, forms)

    def _halves(self, layer: int) -> int:
        """1 where the residual stream is halved before a layer, or before the head."""
        every = self.dimensions.rescale
        return int(every > 0 and layer > 0 and layer % every == 0)

    def _mix_in(
        self, layer: int, part: str, products: Sequence[Mixed], choice: Choice, normed: bool = False
    ) -> FusedKernel:
        """The kernel that begins a half of a layer: residual sum, norm, mixes, products; ``normed``: x is kept too."""
        d, tuning, att = self.dimensions, self.tuning, part == "att"
        first = att and layer == 0
        matrices = tuple(p.matrix for p in products)
        mixes = tuple(p.mix or str(products[0].mix) for p in products)
        defines: dict[str, int | str] = {
            "PRODUCTS": len(products), "PLAIN_INPUT": sum(1 << i for i, p in enumerate(products) if p.mix is None),
            "EMBED": int(first), "EMBED_INT8": int(first and EMBEDDING in self.stored), "NORMED": int(normed),
            "BEFORE": int(self.from_before), "HALVE": self._halves(layer) if att else 0,
        }  # fmt: skip
        for i, product in enumerate(products):
            defines |= {f"COLUMNS_{i}": product.columns, f"FINISH_{i}": product.finish}
        parts = tuning.channel_mix_out.split if att else self.time_mix_parts(layer)
        return self._kernel(
            "mix_in",
            defines,
            choice,
            self._products(f"blocks.{layer}.{part}.", matrices),
            (
                *(FROM_TOKENS if first else ("stream", "parts")), "shift", "ln.weight", "ln.bias", *mixes, *matrices,
                *(f"{name}.scale" for name in matrices),
            ),
            ("stream", "shift", *(["normed"] if normed else []), *(p.to for p in products)),
            (sum(-(-p.columns // choice.tile) for p in products), 1, 1),
            rows=d.width,
            parts=0 if first else parts,
            halts=True,
        )  # fmt: skip

    def _output(self, layer: int) -> FusedKernel:
        """Output of the time mix, as partial sums for the residual stream."""
        choice = self.tuning.time_mix_out
        return self._project("y", f"blocks.{layer}.att.", "output", self.dimensions.inner, choice, skip=False)

    def _project(
        self, source: str, prefix: str, matrix: str, rows: int, choice: Choice, skip: bool, factor: str = ""
    ) -> FusedKernel:
        """A matrix's partial sums for the residual stream, times the buffer ``factor``."""
        products = self._products(prefix, (matrix,))
        piece = rounded_up(-(-rows // choice.split), products.block)
        least = max(per_load(form, self.dimensions.dtype, self.batch) for form in products.forms)
        choice = replace(choice, tile=max(choice.tile, least))  # a load of integers has more columns
        return self._kernel(
            "v7_project",
            {"FROM": rows, "SPLIT": choice.split, "SKIP": int(skip and not products.int4), "FACTOR": int(bool(factor))},
            choice,
            products,
            (source, matrix, f"{matrix}.scale", *([factor] if factor else [])),
            ("parts",),
            (-(-self.dimensions.width // choice.tile), choice.split, 1),
            rows=piece,
        )

    def _kernel(
        self,
        source: str,
        defines: Mapping[str, int | str],
        choice: Choice,
        products: Products,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        grid: tuple[int, int, int],
        *,
        rows: int = 0,
        ring: int = 0,
        parts: int = 0,
        more: int = 0,
        batch: int | None = None,
        halts: bool = False,
    ) -> FusedKernel:
        """A kernel; ``rows`` are those of the matrices that it multiplies with inputs in shared memory, 0 for none.

        Without ``rows``, ``ring`` and ``more`` are the bytes of shared memory for loads in flight, and behind them.
        """
        d, streams = self.dimensions, batch or self.batch
        check_tile(source, choice, products, d.dtype, streams, rows)
        halts = halts and self._halting
        pitch = rows + rows // SKEW * 4 if products.int4 else rows
        if rows:
            choice = self._fitting(source, choice, products, rows, streams)
            ring = max(ring_bytes(rows, choice, form, d.dtype, streams, products.block) for form in products.forms)
        macros = {
            "KERNEL": f"rwkv_{source}", "ACT": TYPES[d.dtype], "WEIGHT": TYPES[d.dtype], "HEAD": d.head_size,
            "THREADS": choice.threads, "BATCH": streams, "WIDTH": d.width, "TILE": choice.tile, "PARTS": parts,
            "AHEAD": choice.ahead, "RING": ring, "INT8": products.int8, "INT4": products.int4,
            "BLOCK": products.block, "EAGER": int(self.tuning.eager), "HALT": int(halts), "BEFORE": 0,
            "HALVE": 0, **defines,
        }  # fmt: skip
        return FusedKernel(
            name=str(macros["KERNEL"]),
            source=f"{source}.cu",
            defines=tuple((name, str(value)) for name, value in macros.items()),
            inputs=(*inputs, *(["halted"] if halts else [])),
            outputs=outputs,
            grid=grid,
            threads=choice.threads,
            shared=ring + 4 * streams * pitch + more,
        )

    def _fitting(self, source: str, choice: Choice, products: Products, rows: int, streams: int) -> Choice:
        """``choice`` with as many loads in flight as the shared memory of a block holds.

        Raises:
            InputError: it does not hold one.
        """
        d = self.dimensions
        own = 4 * streams * (rows + rows // SKEW * 4)  # the inputs
        own += 4 * choice.threads // WARP * streams * max(choice.tile, 2) + 2 * rows + 1024  # static: sums, lists
        while True:
            forms = products.forms
            ring = max(ring_bytes(rows, choice, form, d.dtype, streams, products.block) for form in forms)
            if own + ring <= self._shared:
                return choice
            if choice.ahead == 1:
                raise InputError(
                    f"{source} of {streams} streams needs {own + ring} bytes of shared memory for a block; "
                    f"this GPU has {self._shared}"
                )
            choice = replace(choice, ahead=choice.ahead // 2)
