"""The fused kernels of RWKV-7, five a layer: what is compiled for a model, and in which order arguments go.

A kernel is compiled for the dimensions of one model, so that every loop is unrolled and its first loads are issued
before the kernel ahead has ended. Letters of shapes: B streams, D width, A = H·N inner width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from rwkv_edge.errors import InputError
from rwkv_edge.plugins.fused_spec import (
    COLUMNS,
    EMBEDDING,
    FROM_TOKENS,
    MATRICES,
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
    ring_bytes,
    rounded_up,
)


class Kernels:
    """The kernels of a model for one number of streams."""

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
        columns = {"value": dimensions.width, "key": dimensions.hidden, "g1": dimensions.rank_g}
        columns |= {"output": dimensions.width, "head": dimensions.vocabulary, EMBEDDING: dimensions.width}
        for name, how in sorted(self.stored.items()):
            part = name.rpartition(".")[2]
            if part not in MATRICES[how.form]:
                raise InputError(f"the fused kernels take {', '.join(MATRICES[how.form])} in {how.form}; found {name}")
            own = dimensions.hidden if name.endswith("ffn.key") else dimensions.inner
            wanted = dimensions.head_size if part == "g2" else own if part == "key" else columns.get(part, own)
            if part != EMBEDDING and wanted % COLUMNS[how.form]:
                raise InputError(
                    f"an {how.form} matrix of the fused kernels needs columns in multiples of {COLUMNS[how.form]}; "
                    f"found {wanted} for {name}"
                )

    def time_mix_in(self, layer: int) -> FusedKernel:
        """Residual sum, norm, mixes, receptance, key, value, first halves of the LoRAs."""
        d, choice = self.dimensions, self.tuning.time_mix_in
        first, rank_v = layer == 0, d.rank_v if layer else 0
        columns = [d.inner] * 3 + [d.rank_w, d.rank_a, d.rank_g, rank_v]
        source = (*FROM_TOKENS,) if first else ("stream", "parts")
        matrices = ("receptance", "key", "value", "w1", "a1", "g1", *(["v1"] if rank_v else []))
        defines = {"EMBED": int(first), "EMBED_INT8": int(first and EMBEDDING in self.stored), "RANK_V": rank_v}
        return self._kernel(
            "v7_time_mix_in",
            defines | self._ranks(),
            choice,
            self._products(f"blocks.{layer}.att.", matrices),
            (*source, "shift", "ln.weight", "ln.bias", "mix", *matrices, *(f"{name}.scale" for name in matrices)),
            ("stream", "shift", "r", "k", "v", "hw", "ha", "hg", *(["hv"] if rank_v else [])),
            (sum(-(-n // choice.tile) for n in columns), 1, 1),
            rows=d.width,
            parts=0 if first else self.tuning.channel_mix_out.split,
            halts=True,
        )

    def wkv(self, layer: int) -> FusedKernel:
        """Second halves of the LoRAs, the recurrence, group norm, bonus, gate."""
        d, rank_v = self.dimensions, self.dimensions.rank_v if layer else 0
        choice = replace(self.tuning.wkv, tile=d.head_size)
        products = self._products(f"blocks.{layer}.att.", ("g2",))
        gate = products.forms or {None}
        ring = sum(ring_bytes(rank, choice, None, d.dtype, 1) for rank in (d.rank_w, d.rank_a, rank_v))
        ring += max(ring_bytes(d.rank_g, choice, form, d.dtype, 1) for form in gate)
        return self._kernel(
            "v7_wkv",
            {"RANK_V": rank_v, **self._ranks()},
            choice,
            products,
            (
                "r", "k", "v", "hw", "ha", "hg", *(["hv", "v_first"] if rank_v else []), "w2", "a2", "g2",
                "g2.scale", *(["v2"] if rank_v else []), "w0", "a0", *(["v0"] if rank_v else []), "k_k", "k_a", "r_k",
                "ln_x.weight", "ln_x.bias", "wkv",
            ),
            ("y", "wkv"),
            (d.heads, self.batch, 1),
            ring=ring,
            batch=1,
            halts=True,
        )  # fmt: skip

    def time_mix_out(self, layer: int) -> FusedKernel:
        """Output, as partial sums for the residual stream."""
        choice = self.tuning.time_mix_out
        return self._project("y", f"blocks.{layer}.att.", "output", self.dimensions.inner, choice, skip=False)

    def channel_mix_in(self, layer: int) -> FusedKernel:
        """Residual sum, norm, mix, key, relu²."""
        d, choice = self.dimensions, self.tuning.channel_mix_in
        return self._kernel(
            "v7_channel_mix_in",
            {"HIDDEN": d.hidden},
            choice,
            self._products(f"blocks.{layer}.ffn.", ("key",)),
            ("stream", "parts", "shift", "ln.weight", "ln.bias", "mix", "key", "key.scale"),
            ("stream", "shift", "hidden"),
            (-(-d.hidden // choice.tile), 1, 1),
            rows=d.width,
            parts=self.tuning.time_mix_out.split,
            halts=True,
        )

    def channel_mix_out(self, layer: int) -> FusedKernel:
        """Value, as partial sums for the residual stream."""
        choice, skip = self.tuning.channel_mix_out, self.tuning.skip
        return self._project("hidden", f"blocks.{layer}.ffn.", "value", self.dimensions.hidden, choice, skip)

    def head(self) -> FusedKernel:
        """Last norm and head: logits, and the largest of every block."""
        d, choice = self.dimensions, self.tuning.head
        return self._kernel(
            "head",
            {"VOCABULARY": d.vocabulary},
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

    def _project(self, source: str, prefix: str, matrix: str, rows: int, choice: Choice, skip: bool) -> FusedKernel:
        products = self._products(prefix, (matrix,))
        piece = rounded_up(-(-rows // choice.split), products.block)
        return self._kernel(
            "v7_project",
            {"FROM": rows, "SPLIT": choice.split, "SKIP": int(skip and not products.int4)},
            choice,
            products,
            (source, matrix, f"{matrix}.scale"),
            ("parts",),
            (-(-self.dimensions.width // choice.tile), choice.split, 1),
            rows=piece,
        )

    def _ranks(self) -> dict[str, int]:
        d = self.dimensions
        return {"INNER": d.inner, "RANK_W": d.rank_w, "RANK_A": d.rank_a, "RANK_G": d.rank_g}

    def _kernel(
        self,
        source: str,
        defines: Mapping[str, int],
        choice: Choice,
        products: Products,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        grid: tuple[int, int, int],
        *,
        rows: int = 0,
        ring: int = 0,
        parts: int = 0,
        batch: int | None = None,
        halts: bool = False,
    ) -> FusedKernel:
        """A kernel; ``rows`` are those of the matrices that it multiplies with inputs in shared memory, 0 for none."""
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
            "BLOCK": products.block, "EAGER": int(self.tuning.eager), "HALT": int(halts), **defines,
        }  # fmt: skip
        return FusedKernel(
            name=str(macros["KERNEL"]),
            source=f"{source}.cu",
            defines=tuple((name, str(value)) for name, value in macros.items()),
            inputs=(*inputs, *(["halted"] if halts else [])),
            outputs=outputs,
            grid=grid,
            threads=choice.threads,
            shared=ring + 4 * streams * pitch,
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
