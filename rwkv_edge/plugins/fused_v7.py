"""The kernels of RWKV-7, five a layer, and of 7a (DeepEmbed), six. Reference: `rwkv_edge.models.v7`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rwkv_edge.errors import InputError
from rwkv_edge.plugins.fused import Kernels, Mixed
from rwkv_edge.plugins.fused_spec import (
    EMBEDDING,
    FROM_TOKENS,
    SKEW,
    WARP,
    Choice,
    Dimensions,
    FusedKernel,
    Products,
    per_load,
    ring_bytes,
)
from rwkv_edge.spec import ModelSpec

LORAS = 4
DEEP_TILE = 64  # columns of a block of DeepEmbed's second matrix


class Kernels7(Kernels):
    """See `rwkv_edge.plugins.fused.Kernels`. The value of layer 0 is the ``v_first`` of every later layer."""

    int8_only = (EMBEDDING, "att.g1", "att.g2")

    @classmethod
    def dimensions_of(cls, spec: ModelSpec) -> Dimensions:
        """See `Kernels.dimensions_of`."""
        extra = spec.extra
        return replace(
            cls._dimensions(spec, spec.n_head, spec.head_size),
            rank_w=extra["rank_w"],
            rank_a=extra["rank_a"],
            rank_g=extra["rank_g"],
            rank_v=extra.get("rank_v", 0),
        )

    def time_mix(self, layer: int) -> tuple[FusedKernel, ...]:
        """See `Kernels.time_mix`."""
        if self._merges(layer):
            return self.time_mix_in(layer), self.wkv_out(layer)
        return self.time_mix_in(layer), self.wkv(layer), self.time_mix_out(layer)

    def channel_mix(self, layer: int) -> tuple[FusedKernel, ...]:
        """See `Kernels.channel_mix`."""
        return self.channel_mix_in(layer), self.channel_mix_out(layer)

    def time_mix_in(self, layer: int) -> FusedKernel:
        """Residual sum, norm, mixes, receptance, key, value, first halves of the LoRAs."""
        d, choice = self.dimensions, self.tuning.time_mix_in
        first, rank_v = layer == 0, d.rank_v if layer else 0
        columns = [d.inner] * 3 + [d.rank_w, d.rank_a, d.rank_g, rank_v]
        source = (*FROM_TOKENS,) if first else ("stream", "parts")
        matrices = ("receptance", "key", "value", "w1", "a1", "g1", *(["v1"] if rank_v else []))
        defines = {"EMBED": int(first), "EMBED_INT8": int(first and EMBEDDING in self.stored), "RANK_V": rank_v}
        defines |= {"HALVE": self._halves(layer)}
        return self._kernel(
            "v7_time_mix_in",
            defines | self._ranks(),
            choice,
            self._products(f"blocks.{layer}.att.", matrices),
            (*source, "shift", "ln.weight", "ln.bias", "mix", *matrices, *(f"{name}.scale" for name in matrices)),
            ("stream", "shift", "r", "k", "v" if layer else "v_first", "hw", "ha", "hg", *(["hv"] if rank_v else [])),
            (sum(-(-n // choice.tile) for n in columns), 1, 1),
            rows=d.width,
            parts=0 if first else self.tuning.channel_mix_out.split,
            halts=True,
        )

    def wkv(self, layer: int) -> FusedKernel:
        """Second halves of the LoRAs, the recurrence, group norm, bonus, gate."""
        choice = replace(self.tuning.wkv, tile=self.dimensions.head_size)
        products = self._products(f"blocks.{layer}.att.", ("g2",))
        ring = self._rank_rings(layer, choice)
        return self._recurrence(layer, choice, products, (), "y", {"OUT": 0}, ring, 0)

    def wkv_out(self, layer: int) -> FusedKernel:
        """`wkv` and `time_mix_out` in one: a partial sum for each head.

        Raises:
            InputError: the threads of a block cannot read a row of the output matrix at once, or the block has too
                little shared memory.
        """
        d, choice = self.dimensions, replace(self.tuning.wkv, tile=self.dimensions.head_size)
        products, (output,) = self._products(f"blocks.{layer}.att.", ("g2", "output")), self._forms(layer, "output")
        per = per_load(output, d.dtype, 1)
        span, odd = divmod(d.width, per)
        if odd or span > choice.threads or d.head_size % products.block:
            raise InputError(
                f"{choice.threads} threads cannot read the rows of a head of [{d.inner}, {d.width}] at once, {per} "
                f"columns each, in blocks of {products.block} rows"
            )
        ahead = replace(choice, ahead=self.tuning.time_mix_out.ahead)
        own = self._rank_rings(layer, choice)
        more = 4 * choice.threads // span * d.width
        ring = ring_bytes(d.head_size, ahead, output, d.dtype, 1, products.block, span)
        total = own + ring + more + self._static(choice)
        if total > self._shared:
            raise InputError(
                f"a block of the merged kernel needs {total} bytes of shared memory; this GPU has {self._shared}"
            )
        defines = {"OUT": 1, "OUT_AHEAD": ahead.ahead}
        return self._recurrence(layer, choice, products, ("output", "output.scale"), "parts", defines, own + ring, more)

    def _static(self, choice: Choice) -> int:
        """Bytes of shared memory of the recurrence's kernel beside its rings: sums, hidden values, vectors."""
        d = self.dimensions
        per_warp = (LORAS + 1) * d.head_size + d.head_size // SKEW * 4
        ranks = d.rank_w + d.rank_a + d.rank_g + d.rank_v
        return 4 * (choice.threads // WARP * per_warp + ranks + ranks // SKEW * 4 + (LORAS + 1) * d.head_size) + 256

    def _merges(self, layer: int) -> bool:
        """Whether the recurrence's kernel multiplies by the output matrix."""
        return self.tuning.merge and self.batch == 1

    def _forms(self, layer: int, *matrices: str) -> list[str | None]:
        """How matrices of the time mix are stored, None for the model's dtype."""
        found = [self.stored.get(f"blocks.{layer}.att.{name}") for name in matrices]
        return [None if how is None else how.form for how in found]

    def _rank_rings(self, layer: int, choice: Choice) -> int:
        """Bytes for the loads of the LoRAs' second halves."""
        d, rank_v = self.dimensions, self.dimensions.rank_v if layer else 0
        (gate,) = self._forms(layer, "g2")
        ring = sum(ring_bytes(rank, choice, None, d.dtype, 1) for rank in (d.rank_w, d.rank_a, rank_v))
        return ring + ring_bytes(d.rank_g, choice, gate, d.dtype, 1)

    def _recurrence(
        self,
        layer: int,
        choice: Choice,
        products: Products,
        output: tuple[str, ...],
        to: str,
        defines: Mapping[str, int],
        ring: int,
        more: int,
    ) -> FusedKernel:
        d, rank_v = self.dimensions, self.dimensions.rank_v if layer else 0
        return self._kernel(
            "v7_wkv",
            {"RANK_V": rank_v, **self._ranks(), **defines},
            choice,
            products,
            (
                "r", "k", "v" if layer else "v_first", "hw", "ha", "hg", *(["hv", "v_first"] if rank_v else []), "w2",
                "a2", "g2", "g2.scale", *(["v2"] if rank_v else []), "w0", "a0", *(["v0"] if rank_v else []), "k_k",
                "k_a", "r_k", "ln_x.weight", "ln_x.bias", "wkv", *output,
            ),
            (to, "wkv"),
            (d.heads, self.batch, 1),
            ring=ring,
            more=more,
            batch=1,
            halts=True,
        )  # fmt: skip

    def time_mix_out(self, layer: int) -> FusedKernel:
        """Output, as partial sums for the residual stream."""
        return self._output(layer)

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
            parts=self.time_mix_parts(layer),
            halts=True,
        )

    def channel_mix_out(self, layer: int) -> FusedKernel:
        """Value, as partial sums for the residual stream."""
        choice, skip = self.tuning.channel_mix_out, self.tuning.skip
        return self._project("hidden", f"blocks.{layer}.ffn.", "value", self.dimensions.hidden, choice, skip)

    def time_mix_parts(self, layer: int) -> int:
        """See `Kernels.time_mix_parts`."""
        return self.dimensions.heads if self._merges(layer) else super().time_mix_parts(layer)

    def columns(self) -> Mapping[str, int]:
        """See `Kernels.columns`. A block of the recurrence has the columns of one head."""
        d = self.dimensions
        return {**super().columns(), "att.g1": d.rank_g, "att.g2": d.head_size}

    def buffers(self) -> dict[str, int]:
        """See `Kernels.buffers`."""
        d = self.dimensions
        return {
            **super().buffers(), "r": d.inner, "k": d.inner, "v": d.inner, "v_first": d.inner, "hw": d.rank_w,
            "ha": d.rank_a, "hg": d.rank_g, "hv": d.rank_v,
        }  # fmt: skip

    def _ranks(self) -> dict[str, int]:
        d = self.dimensions
        return {"INNER": d.inner, "RANK_W": d.rank_w, "RANK_A": d.rank_a, "RANK_G": d.rank_g}


class Kernels7a(Kernels7):
    """With a kernel more between key and value, which multiplies the hidden values by what the token's matrix gives.

    Its factors need the whole product of the norm and s1, so they cannot be had where the key's product ends; and each
    block of the value's product would read s2 for all its rows, as often as there are blocks beside it.
    """

    @classmethod
    def dimensions_of(cls, spec: ModelSpec) -> Dimensions:
        """See `Kernels.dimensions_of`."""
        return replace(super().dimensions_of(spec), rank_deep=spec.extra["rank_deep_embed"])

    def channel_mix(self, layer: int) -> tuple[FusedKernel, ...]:
        """See `Kernels.channel_mix`."""
        return self.channel_mix_in(layer), self._deep_embed(layer), self.channel_mix_out(layer)

    def channel_mix_in(self, layer: int) -> FusedKernel:
        """Residual sum, norm, mix, key, relu², and s1, which takes the norm's output as it is."""
        d = self.dimensions
        products = (Mixed("key", "mix", d.hidden, "hidden", "RELU_SQUARED"), Mixed("s1", None, d.rank_deep, "hs"))
        return self._mix_in(layer, "ffn", products, self.tuning.channel_mix_in)

    def _deep_embed(self, layer: int) -> FusedKernel:
        """hidden ∘= ((x s1)·E_token) s2 + s0."""
        d, choice = self.dimensions, replace(self.tuning.channel_mix_in, tile=DEEP_TILE)
        products = self._products(f"blocks.{layer}.ffn.", ("s2",))
        ring = max(
            ring_bytes(d.rank_deep, choice, form, d.dtype, self.batch, products.block) for form in products.forms
        )
        return self._kernel(
            "v7a_deep_embed",
            {"HIDDEN": d.hidden, "RANK": d.rank_deep},
            choice,
            products,
            ("tokens", "s_emb", "hs", "s2", "s2.scale", "s0", "hidden"),
            ("hidden",),
            (-(-d.hidden // choice.tile), 1, 1),
            ring=ring,
        )

    def columns(self) -> Mapping[str, int]:
        """See `Kernels.columns`."""
        d = self.dimensions
        return {**super().columns(), "ffn.s1": d.rank_deep, "ffn.s2": d.hidden}

    def buffers(self) -> dict[str, int]:
        """See `Kernels.buffers`."""
        return {**super().buffers(), "hs": self.dimensions.rank_deep}
