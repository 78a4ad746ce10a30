"""The kernels of RWKV-5 in its three forms, five a layer. Reference: `rwkv_edge.models.v5`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from rwkv_edge.plugins.fused import Mixed
from rwkv_edge.plugins.fused_gated import GatedKernels
from rwkv_edge.plugins.fused_spec import FusedKernel, Products


class Kernels5(GatedKernels):
    """See `rwkv_edge.plugins.fused.Kernels`."""

    from_before = True
    gated: ClassVar[bool] = True
    rows: ClassVar[tuple[str, ...]] = ("mix_r", "mix_k", "mix_v", "mix_g")

    def time_mix(self, layer: int) -> tuple[FusedKernel, ...]:
        """Norm, receptance, key, value and gate; the recurrence, group norm and gate; output."""
        inner, d = self.dimensions.inner, self.dimensions
        products = [
            Mixed("receptance", "mix_r", inner, "r"),
            Mixed("key", "mix_k", inner, "k"),
            Mixed("value", "mix_v", inner, "v"),
            *([Mixed("gate", "mix_g", inner, "g")] if self.gated else []),
        ]
        wkv = self._kernel(
            "v6_wkv",
            {"INNER": inner, "RANK": 0, "GATE": int(self.gated)},
            replace(self.tuning.wkv, tile=d.head_size),
            Products(),
            (*(p.to for p in products), "decay_log", "first", "ln_x.weight", "ln_x.bias", "wkv"),
            ("y", "wkv"),
            (d.heads, self.batch, 1),
            batch=1,
            halts=True,
        )
        return self._mix_in(layer, "att", products, self.tuning.time_mix_in), wkv, self._output(layer)

    def columns(self) -> Mapping[str, int]:
        """See `Kernels.columns`."""
        return {**super().columns(), **({"att.gate": self.dimensions.inner} if self.gated else {})}

    def buffers(self) -> dict[str, int]:
        """See `Kernels.buffers`."""
        return {**super().buffers(), "g": self.dimensions.inner}


class Kernels50(Kernels5):
    """Of RWKV-5.0, which has no gate."""

    gated = False
    rows = ("mix_r", "mix_k", "mix_v")
