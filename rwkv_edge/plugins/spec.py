"""What every user of a CUDA kernel must know of it: source, compile options, arguments, launch dimensions.

Three users share a `KernelSpec`: the TensorRT plugin (ahead of time: PTX, grid, block, shared memory, scalars), the GPU
tests and the runtimes. Letters of shapes: B streams, T tokens, H heads, N head size, A = H·N channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, cast

from rwkv_edge.errors import InputError
from rwkv_edge.plugins import layout, nvrtc

Version = Literal["4", "5", "6", "7"]
Kind = Literal["step", "sequence"]
ActDtype = Literal["float32", "float16", "bfloat16"]
Int = TypeVar("Int", bound=Any)  # int, or a symbolic integer with +, * and // (tensorrt.plugin's SymInt32)

VERSIONS: Final[tuple[Version, ...]] = ("4", "5", "6", "7")
KINDS: Final[tuple[Kind, ...]] = ("step", "sequence")
DTYPES: Final[tuple[ActDtype, ...]] = ("float32", "float16", "bfloat16")
# Rows are read by quads of floats (16 bytes); past 128 the state of a sequence would not fit the registers.
HEAD_SIZES: Final = range(4, 129, 4)

_TYPES: Final = {"float32": "Float", "float16": "Half", "bfloat16": "Brain"}


@dataclass(frozen=True)
class Argument:
    """A tensor that a kernel reads or writes, C-contiguous, its start aligned to 16 bytes.

    ``axes`` are letters of shapes; ``dtype`` is numpy's name, or bfloat16.
    """

    name: str
    dtype: str
    axes: str

    def shape(self, B: Int, T: Int, H: Int, N: Int) -> tuple[Int, ...]:
        """Its dimensions; the integers may be symbolic."""
        sizes = {"B": B, "T": T, "H": H, "N": N, "A": H * N}
        return tuple(sizes[axis] for axis in self.axes)


@dataclass(frozen=True)
class KernelSpec:
    """One kernel, compiled for one dtype and one head size.

    The kernel's arguments are the pointers of ``inputs``, the int32 ``scalars``, the pointers of ``outputs``: the
    order of TensorRT's ahead-of-time plugins. New states may share the memory of old ones; nothing else may overlap.

    Attributes:
        version: of RWKV.
        kind: "step" for one token, "sequence" for T of them.
        dtype: of the activations r, k, v, kk, a and y. States, decays w and bonuses u are always float32: near 1 a
            16-bit decay would round to steps of 2⁻⁹ or 2⁻¹², and the graph computes it in float32 anyway.
        head_size: N; 1 in RWKV-4, whose kernels know only channels.
        name: of the entry point.
        source: file of `rwkv_edge.plugins.kernels`.
        defines: macros to compile it with.
        inputs: tensors read.
        scalars: letters of the shapes passed as int32.
        outputs: tensors written.
        threads: of a block.
        channels: of a block along the first axis of the grid: all blocks together cover N (RWKV-4: A).
        shared_memory: dynamic shared memory in bytes.
    """

    version: Version
    kind: Kind
    dtype: ActDtype
    head_size: int
    name: str
    source: str
    defines: tuple[tuple[str, str], ...]
    inputs: tuple[Argument, ...]
    scalars: tuple[str, ...]
    outputs: tuple[Argument, ...]
    threads: int
    channels: int
    shared_memory: int

    def grid(self, B: Int, T: Int, H: Int, N: Int) -> tuple[Int | int, Int | int, Int | int]:
        """Blocks along x, y and z; the integers may be symbolic."""
        if self.version == "4":
            return (H * N + (self.channels - 1)) // self.channels, 1, B
        return -(-self.head_size // self.channels), H, B

    def block(self, B: Int, T: Int, H: Int, N: Int) -> tuple[int, int, int]:
        """Threads along x, y and z."""
        return self.threads, 1, 1

    def shared_bytes(self, B: Int, T: Int, H: Int, N: Int) -> int:
        """Dynamic shared memory of a block."""
        return self.shared_memory

    def scalar_values(self, B: Int, T: Int, H: Int, N: Int) -> tuple[Int, ...]:
        """The values of ``scalars``."""
        sizes = {"T": T, "H": H, "A": H * N}
        return tuple(sizes[scalar] for scalar in self.scalars)

    def ptx(self, capability: int, cache: Path | None = None) -> str:
        """PTX for a device of compute capability ``capability`` (90 for 9.0); see `nvrtc.compile_ptx`."""
        return nvrtc.compile_ptx(self.source, self.defines, capability, cache)


def kernel_spec(version: str, kind: str, dtype: str, head_size: int) -> KernelSpec:
    """The kernel of a version, kind and dtype.

    Args:
        version: "4", "5" (5.0 to 5.2), "6" or "7".
        kind: "step" (activations [B, H, N], RWKV-4 [B, A]) or "sequence" ([B, T, H, N], [B, T, A]).
        dtype: of activations: "float32", "float16" or "bfloat16".
        head_size: a multiple of 4 up to 128; without meaning in RWKV-4.

    Raises:
        InputError: there is no such kernel.
    """
    for what, value, known in (("version", version, VERSIONS), ("kind", kind, KINDS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise InputError(f"a WKV kernel's {what} must be one of {', '.join(known)}; found {value!r}")
    if version != "4" and head_size not in HEAD_SIZES:
        raise InputError(f"WKV kernels have head sizes that are multiples of 4 up to 128; found {head_size}")
    head = 1 if version == "4" else head_size
    tuning = _TUNINGS[version, kind](head)
    suffix = "" if version == "4" else f"_n{head}"
    name = f"rwkv_wkv{version}_{kind}_{dtype}{suffix}"
    macros = {"KERNEL": name, "ACT": _TYPES[dtype], "HEAD": head, "THREADS": tuning.threads, **tuning.macros}
    inputs, outputs = _arguments(cast(Version, version), cast(Kind, kind), dtype)
    return KernelSpec(
        version=cast(Version, version),
        kind=cast(Kind, kind),
        dtype=cast(ActDtype, dtype),
        head_size=head,
        name=name,
        source="wkv4.cu" if version == "4" else f"wkv{'7' if version == '7' else '6'}_{kind}.cu",
        defines=tuple((key, str(value)) for key, value in macros.items()),
        inputs=inputs,
        scalars=("A" if version == "4" else "H", *(["T"] if kind == "sequence" else [])),
        outputs=outputs,
        threads=tuning.threads,
        channels=tuning.channels,
        shared_memory=tuning.shared_memory,
    )


def _arguments(version: Version, kind: Kind, dtype: str) -> tuple[tuple[Argument, ...], tuple[Argument, ...]]:
    """Inputs and outputs in the order of `rwkv_edge.exporters.recurrences`."""
    tokens = "T" if kind == "sequence" else ""
    if version == "4":
        old = tuple(Argument(name, "float32", "BA") for name in ("num", "den", "top"))
        new = tuple(Argument(f"{name}.out", "float32", "BA") for name in ("num", "den", "top"))
        parameters = tuple(Argument(name, "float32", "A") for name in "wu")
        axes = f"B{tokens}A"
        return (*old, *parameters, *(Argument(name, dtype, axes) for name in "kv")), (Argument("y", dtype, axes), *new)
    axes = f"B{tokens}HN"
    acts = {name: Argument(name, dtype, axes) for name in ("r", "k", "v", "kk", "a")}
    decay = Argument("w", "float32", "HN" if version == "5" else axes)
    outputs = Argument("y", dtype, axes), Argument("state.out", "float32", "BHNN")
    state = Argument("state", "float32", "BHNN")
    if version == "7":
        return (state, acts["r"], decay, acts["k"], acts["v"], acts["kk"], acts["a"]), outputs
    return (state, acts["r"], decay, Argument("u", "float32", "HN"), acts["k"], acts["v"]), outputs


_TUNINGS: Final[dict[tuple[str, str], Callable[[int], layout.Tuning]]] = {
    ("4", "step"): layout.wkv4_step,
    ("4", "sequence"): layout.wkv4_sequence,
    ("5", "step"): layout.wkv5_step,
    ("5", "sequence"): layout.wkv5_sequence,
    ("6", "step"): layout.wkv6_step,
    ("6", "sequence"): layout.wkv6_sequence,
    ("7", "step"): layout.wkv7_step,
    ("7", "sequence"): layout.wkv7_sequence,
}
