"""The feed-forward part of RWKV-4 to 6: σ(W_r x_r) ∘ W_v relu(W_k x_k)².

Two kernels, as in RWKV-7: `mix_in` has the receptance beside the key, and the value's partial sums are multiplied by
its sigmoid before the next kernel adds them to the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping

from rwkv_edge.plugins.fused import Kernels, Mixed
from rwkv_edge.plugins.fused_spec import FusedKernel


class GatedKernels(Kernels):
    """The kernels of a version whose channel mix has a receptance."""

    def channel_mix(self, layer: int) -> tuple[FusedKernel, ...]:
        """Norm, key and receptance; value."""
        d = self.dimensions
        products = (
            Mixed("key", "mix_k", d.hidden, "hidden", "RELU_SQUARED"),
            Mixed("receptance", "mix_r", d.width, "factor", "SIGMOID"),
        )
        value = self._project(
            "hidden", f"blocks.{layer}.ffn.", "value", d.hidden, self.tuning.channel_mix_out, self.tuning.skip, "factor"
        )
        return self._mix_in(layer, "ffn", products, self.tuning.channel_mix_in), value

    def columns(self) -> Mapping[str, int]:
        """See `Kernels.columns`."""
        return {**super().columns(), "ffn.receptance": self.dimensions.width}

    def buffers(self) -> dict[str, int]:
        """See `Kernels.buffers`."""
        d = self.dimensions
        return {**super().buffers(), "r": d.inner, "k": d.inner, "v": d.inner, "factor": d.width}
