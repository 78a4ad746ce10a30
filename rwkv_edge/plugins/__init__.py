"""The WKV recurrences as CUDA kernels: sources, launch specs, compilation with NVRTC, a launcher.

Importing this package imports neither CUDA nor torch; `spec.kernel_spec` is its entrance.
"""

from __future__ import annotations

from rwkv_edge.plugins.spec import Argument, KernelSpec, kernel_spec

__all__ = ["Argument", "KernelSpec", "kernel_spec"]
