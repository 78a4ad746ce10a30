"""The kernels of RWKV-4, five a layer. The recurrence has no heads: every channel is on its own.

Reference: `rwkv_edge.models.v4`.
"""

from __future__ import annotations

from rwkv_edge.plugins.fused import Mixed
from rwkv_edge.plugins.fused_gated import GatedKernels
from rwkv_edge.plugins.fused_spec import Dimensions, FusedKernel, Products
from rwkv_edge.spec import ModelSpec

STATE = ("wkv_num", "wkv_den", "wkv_max")


class Kernels4(GatedKernels):
    """See `rwkv_edge.plugins.fused.Kernels`."""

    from_before = True

    @classmethod
    def dimensions_of(cls, spec: ModelSpec) -> Dimensions:
        """See `Kernels.dimensions_of`."""
        return cls._dimensions(spec, heads=0, head_size=0)

    def time_mix(self, layer: int) -> tuple[FusedKernel, ...]:
        """Norm, receptance, key and value; the recurrence; output."""
        inner, choice = self.dimensions.inner, self.tuning.wkv
        products = (
            Mixed("receptance", "mix_r", inner, "r", "SIGMOID"),
            Mixed("key", "mix_k", inner, "k"),
            Mixed("value", "mix_v", inner, "v"),
        )
        wkv = self._kernel(
            "v4_wkv",
            {"INNER": inner},
            choice,
            Products(),
            ("r", "k", "v", "decay", "first", *STATE),
            ("y", *STATE),
            (-(-inner // choice.threads), self.batch, 1),
            halts=True,
        )
        return self._mix_in(layer, "att", products, self.tuning.time_mix_in), wkv, self._output(layer)
