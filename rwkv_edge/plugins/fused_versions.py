"""Which versions have fused kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rwkv_edge.plugins.fused import Kernels
from rwkv_edge.plugins.fused_v4 import Kernels4
from rwkv_edge.plugins.fused_v5 import Kernels5, Kernels50
from rwkv_edge.plugins.fused_v6 import Kernels6
from rwkv_edge.plugins.fused_v7 import Kernels7, Kernels7a

KERNELS: Final[Mapping[str, type[Kernels]]] = {
    "4": Kernels4,
    "5.0": Kernels50,
    "5.1": Kernels5,
    "5.2": Kernels5,
    "6": Kernels6,
    "7": Kernels7,
    "7a": Kernels7a,
}
"""By the name of a version in a spec."""
