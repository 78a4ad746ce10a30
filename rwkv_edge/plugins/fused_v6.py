"""The kernels of RWKV-6, seven a layer. Reference: `rwkv_edge.models.v6`.

The token-shift mixes depend on the input, by a LoRA whose hidden values need the whole norm. So two kernels stand
before the products: norm and first half; second halves, which leave the five mixed inputs in memory. Each block of the
products could make its own input of the hidden values instead; it would read a second half of [rank, D] for it, half
as much again as its columns of the matrix, while it now has neither norm nor partial sums to wait for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rwkv_edge.plugins.fused import Mixed
from rwkv_edge.plugins.fused_gated import GatedKernels
from rwkv_edge.plugins.fused_spec import Dimensions, FusedKernel, Products, ring_bytes
from rwkv_edge.spec import ModelSpec

MIXES = 5  # w, k, v, r, g
LORA_TILE = 16  # columns of a block of the first half, of which there are few: more blocks read them at once
MIXES_TILE = 64  # channels of a block of the second halves
MATRICES = ("receptance", "key", "value", "gate", "decay.w1")


class Kernels6(GatedKernels):
    """See `rwkv_edge.plugins.fused.Kernels`."""

    @classmethod
    def dimensions_of(cls, spec: ModelSpec) -> Dimensions:
        """See `Kernels.dimensions_of`."""
        return replace(
            cls._dimensions(spec, spec.n_head, spec.head_size),
            rank_mix=spec.extra["rank_mix"],
            rank_w=spec.extra["rank_decay"],
        )

    def time_mix(self, layer: int) -> tuple[FusedKernel, ...]:
        """Norm and the mixes' first half; their second halves; products; recurrence, group norm and gate; output."""
        lora = Mixed("mix.w1", "mix_x", MIXES * self.dimensions.rank_mix, "h", "TANH")
        choice = replace(self.tuning.time_mix_in, tile=LORA_TILE)
        return (
            self._mix_in(layer, "att", (lora,), choice, normed=True),
            self._mixes(),
            self._products_of_mixes(layer),
            self._wkv(),
            self._output(layer),
        )

    def _mixes(self) -> FusedKernel:
        d, choice = self.dimensions, replace(self.tuning.time_mix_in, tile=MIXES_TILE)
        return self._kernel(
            "v6_mixes",
            {"RANK": d.rank_mix},
            choice,
            Products(),
            ("normed", "shift", "h", "mix", "mix.w2"),
            ("mixed",),
            (-(-d.width // choice.tile), MIXES, 1),
            ring=ring_bytes(d.rank_mix, choice, None, d.dtype, self.batch),
        )

    def _products_of_mixes(self, layer: int) -> FusedKernel:
        d, choice = self.dimensions, self.tuning.time_mix_in
        columns = [d.inner] * 4 + [d.rank_w]
        return self._kernel(
            "v6_time_mix_in",
            {"INNER": d.inner, "RANK": d.rank_w},
            choice,
            self._products(f"blocks.{layer}.att.", MATRICES),
            ("mixed", *MATRICES, *(f"{name}.scale" for name in MATRICES)),
            ("r", "k", "v", "g", "hw"),
            (sum(-(-n // choice.tile) for n in columns), 1, 1),
            rows=d.width,
        )

    def _wkv(self) -> FusedKernel:
        d, choice = self.dimensions, replace(self.tuning.wkv, tile=self.dimensions.head_size)
        return self._kernel(
            "v6_wkv",
            {"INNER": d.inner, "RANK": d.rank_w, "GATE": 1},
            choice,
            Products(),
            (
                "r", "k", "v", "g", "hw", "decay.w2", "decay", "first", "ln_x.weight", "ln_x.bias", "wkv",
            ),
            ("y", "wkv"),
            (d.heads, self.batch, 1),
            ring=ring_bytes(d.rank_w, choice, None, d.dtype, 1),
            batch=1,
            halts=True,
        )  # fmt: skip

    def columns(self) -> Mapping[str, int]:
        """See `Kernels.columns`."""
        return {**super().columns(), "att.gate": self.dimensions.inner}

    def buffers(self) -> dict[str, int]:
        """See `Kernels.buffers`."""
        d = self.dimensions
        return {
            **super().buffers(), "normed": d.width, "h": MIXES * d.rank_mix, "mixed": MIXES * d.width, "g": d.inner,
            "hw": d.rank_w,
        }  # fmt: skip
