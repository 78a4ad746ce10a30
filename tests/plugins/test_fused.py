"""The fused kernels' specs, and what NVRTC makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ptxas import BETWEEN, report, spilled

from rwkv_edge.errors import InputError
from rwkv_edge.plugins.fused_spec import Choice, Dimensions, FusedKernel, Stored, Tuning
from rwkv_edge.plugins.fused_v7 import Kernels7
from rwkv_edge.runtime.cuda_tuning import LARGE, SMALL

ORIN, HOPPER = 87, 90
MOST_SHARED = 163 << 10  # bytes of a block on Orin
SMALLEST = Dimensions(768, 768, 3072, 12, 64, 65536, 64, 64, 128, 32, "float16")
LARGER = Dimensions(2048, 2048, 8192, 32, 64, 65536, 96, 96, 256, 64, "float16")


def all_of(kernels: Kernels7) -> list[FusedKernel]:
    return [
        *(kernels.time_mix_in(layer) for layer in (0, 1)),
        *(kernels.wkv(layer) for layer in (0, 1)),
        kernels.time_mix_out(1),
        kernels.channel_mix_in(1),
        kernels.channel_mix_out(1),
        kernels.head(),
        kernels.argmax(),
    ]


def quantized(form: str, layers: int = 2) -> dict[str, Stored]:
    """All that may be in int8 or int4."""
    how = Stored("int8") if form == "int8" else Stored("int4", 32)
    names = [f"att.{n}" for n in ("receptance", "key", "value", "output")] + ["ffn.key", "ffn.value"]
    found = {f"blocks.{i}.{name}": how for i in range(layers) for name in names}
    found |= {f"blocks.{i}.att.{name}": Stored("int8") for i in range(layers) for name in ("g1", "g2")}
    return found | {"head": how, "emb": Stored("int8")}


TINY = replace(SMALLEST, width=128, inner=128, heads=2, hidden=512, vocabulary=256)
COMPILED = [
    *((75, form) for form in ("float", "int8", "int4")),
    *((80, form) for form in ("float", "int8")),
    *((87, form) for form in ("float", "int4")),
    *((90, form) for form in ("float", "int8", "int4")),
    (120, "int4"),
]
"""All forms in each branch of the text: below 8.0, from there on, and from 9.0 on."""


@pytest.mark.parametrize(("capability", "form"), COMPILED)
def test_all_compile(capability: int, form: str, nvrtc_architectures: tuple[int, ...]) -> None:
    if capability not in nvrtc_architectures:
        pytest.skip(f"this NVRTC does not know compute_{capability}")
    for kernel in all_of(Kernels7(TINY, 1, SMALL, {} if form == "float" else quantized(form))):
        assert f".target sm_{capability}" in kernel.ptx(capability)


@pytest.mark.parametrize("capability", BETWEEN)
def test_other_devices(capability: int, nvrtc_architectures: tuple[int, ...]) -> None:
    if capability not in nvrtc_architectures:
        pytest.skip(f"this NVRTC does not know compute_{capability}")
    kernel = Kernels7(TINY, 1, SMALL, quantized("int4")).channel_mix_in(1)
    assert f".target sm_{capability}" in kernel.ptx(capability)


@pytest.mark.parametrize(
    ("dimensions", "tuning", "batch", "form", "capability"),
    [
        (SMALLEST, SMALL, 1, "float", ORIN),
        (LARGER, LARGE, 1, "float", HOPPER),
        (replace(LARGER, dtype="bfloat16"), LARGE, 1, "float", ORIN),
        (LARGER, LARGE, 1, "int8", ORIN),
        (LARGER, LARGE, 1, "int4", HOPPER),
        (SMALLEST, SMALL, 8, "int4", ORIN),
    ],
    ids=["0.1B", "1.5B", "1.5B in bfloat16", "1.5B in int8", "1.5B in int4", "0.1B in int4, 8 streams"],
)
def test_registers_do_not_spill(
    dimensions: Dimensions, tuning: Tuning, batch: int, form: str, capability: int, nvrtc_architectures: tuple[int, ...]
) -> None:
    """Two words at most, by which ptxas reaches a round number of registers. Eight streams: not the first layer."""
    if capability not in nvrtc_architectures:
        pytest.skip(f"this NVRTC does not know sm_{capability}")
    stored = {} if form == "float" else quantized(form)
    kernels = Kernels7(dimensions, batch, tuning, stored, shared=MOST_SHARED)
    for kernel in all_of(kernels):
        if batch == 1 or kernel != kernels.time_mix_in(0):  # ptxas takes 9 s for that one
            assert spilled(kernel, capability) <= 8, f"{kernel.name}: {report(kernel, capability)}"


def test_programmatic_launch_only_where_it_exists(nvrtc_architectures: tuple[int, ...]) -> None:
    kernel = Kernels7(TINY, 1, SMALL).channel_mix_in(0)
    for capability, has in ((80, False), (90, True)):
        if capability in nvrtc_architectures:
            assert ("griddepcontrol" in kernel.ptx(capability)) == has


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"width": 100, "inner": 100}, "width that is a multiple of 8; found 100"),
        ({"rank_g": 12}, "rank_g that is a multiple of 8; found 12"),
        ({"head_size": 256, "heads": 3}, "at most 128 channels"),
        ({"heads": 11}, "found 11 of 64 for 768"),
        ({"dtype": "int8"}, "float32, float16, bfloat16; found 'int8'"),
    ],
)
def test_dimensions_are_checked(wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        replace(SMALLEST, **wrong)


@pytest.mark.parametrize("batch", [0, 9])
def test_batches_are_checked(batch: int) -> None:
    with pytest.raises(InputError, match="1 to 8 streams"):
        Kernels7(SMALLEST, batch, SMALL)


@pytest.mark.parametrize("tile", [12, 512])
def test_tiles_are_checked(tile: int) -> None:
    with pytest.raises(InputError, match="a power of two from 8 to 256 columns"):
        Kernels7(SMALLEST, 1, replace(SMALL, head=Choice(tile))).head()


def test_one_kernel_serves_all_layers_but_the_first() -> None:
    kernels = Kernels7(SMALLEST, 1, SMALL)
    assert kernels.time_mix_in(1) == kernels.time_mix_in(7) != kernels.time_mix_in(0)
    assert "v1" not in kernels.time_mix_in(0).inputs
    assert "v_first" in kernels.wkv(3).inputs
