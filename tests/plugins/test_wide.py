"""The wide kernels' specs, and what NVRTC makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from ptxas import BETWEEN, report, spilled

from rwkv_edge.plugins.fused_spec import Dimensions, FusedKernel, Stored
from rwkv_edge.plugins.wide import TILES, Form, Tile, WideKernels, tile_for

ORIN, HOPPER, MULTIPROCESSORS = 87, 90, 132
MOST_SHARED = 99 << 10  # bytes of a block on sm_86, sm_89 and sm_120
SMALL = Dimensions(128, 128, 512, 2, 64, 256, 64, 64, 128, 32, "float16", rank_deep=32)
SMALLEST = Dimensions(768, 768, 3072, 12, 64, 65536, 64, 64, 128, 32, "float16")
LARGER = Dimensions(2048, 2048, 8192, 32, 64, 65536, 96, 96, 256, 64, "float16", rank_deep=32)
ALL_FORMS = frozenset(Form)


def all_of(kernels: WideKernels, batch: int = 1) -> Iterator[FusedKernel]:
    for embed in Form.IN_FLOAT, Form.IN_INT8:
        yield kernels.norm(6, 0, embed, sequence=True)
    for sequence in (False, True):
        yield kernels.norm(6, 4, None, sequence)
        yield kernels.norm(1, 2, None, sequence)
        yield kernels.norm(0, 4, None, sequence)
    yield kernels.norm(1, 2, None, sequence=True, plain=True)
    yield kernels.product({Form.IN_FLOAT})
    yield kernels.product(ALL_FORMS, split=2)
    yield from (kernels.step(), kernels.sequence(batch), kernels.gate(), kernels.deep_embed(), kernels.argmax())


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        *((capability, "float16") for capability in (75, 80, 87, 90, 120)),
        *((capability, "float32") for capability in (75, 90)),
        *((capability, "bfloat16") for capability in (75, 80)),  # without tensor cores and with them
    ],
)
def test_all_compile(capability: int, dtype: str, nvrtc_architectures: tuple[int, ...]) -> None:
    if capability not in nvrtc_architectures:
        pytest.skip(f"this NVRTC does not know compute_{capability}")
    for kernel in all_of(WideKernels(replace(SMALL, dtype=dtype), 32, capability, MULTIPROCESSORS)):
        assert f".target sm_{capability}" in kernel.ptx(capability)
        assert kernel.shared <= MOST_SHARED


@pytest.mark.parametrize("capability", BETWEEN)
def test_other_devices(capability: int, nvrtc_architectures: tuple[int, ...]) -> None:
    if capability not in nvrtc_architectures:
        pytest.skip(f"this NVRTC does not know compute_{capability}")
    kernel = WideKernels(SMALL, 32, capability, MULTIPROCESSORS).product({Form.IN_INT8})
    assert f".target sm_{capability}" in kernel.ptx(capability)


@pytest.mark.parametrize("rows", [tile.rows for tile in TILES[:-1]] + [512])
def test_products_do_not_spill(rows: int, nvrtc_architectures: tuple[int, ...]) -> None:
    for capability in (ORIN, HOPPER):
        kernels = WideKernels(LARGER, rows, capability, MULTIPROCESSORS)
        single = [{form} for form in Form] if capability == ORIN else []
        for forms in (*single, ALL_FORMS):
            assert_no_spills(kernels.product(forms), capability, nvrtc_architectures)


@pytest.mark.parametrize("dimensions", [LARGER, replace(LARGER, heads=16, head_size=128)])
def test_others_do_not_spill(dimensions: Dimensions, nvrtc_architectures: tuple[int, ...]) -> None:
    for capability in (ORIN, HOPPER):
        kernels = WideKernels(dimensions, 512, capability, MULTIPROCESSORS)
        for kernel in (*all_of(kernels), kernels.sequence(64)):
            if "product" not in kernel.source:
                assert_no_spills(kernel, capability, nvrtc_architectures)


@pytest.mark.parametrize("rank", [8, 24, 136])
def test_ranks_of_deep_embed(rank: int, nvrtc_architectures: tuple[int, ...]) -> None:
    """Fewer columns than lanes, a number that no power of two divides, and more than a warp reads at once."""
    for dtype in ("float16", "float32"):
        kernels = WideKernels(replace(LARGER, rank_deep=rank, dtype=dtype), 512, ORIN, MULTIPROCESSORS)
        assert_no_spills(kernels.deep_embed(), ORIN, nvrtc_architectures)


def assert_no_spills(kernel: FusedKernel, capability: int, known: tuple[int, ...]) -> None:
    """Two words at most, by which ptxas reaches a round number of registers."""
    if capability not in known:
        pytest.skip(f"this NVRTC does not know compute_{capability}")
    assert spilled(kernel, capability) <= 8, f"{kernel.name}: {report(kernel, capability)}"


def test_tiles_grow_with_the_rows() -> None:
    assert [tile_for(rows, HOPPER, "float16").rows for rows in (1, 16, 17, 64, 100, 128, 129, 1024)] == [
        16, 16, 32, 64, 128, 128, 128, 128,
    ]  # fmt: skip
    assert tile_for(129, HOPPER, "float16").columns > tile_for(128, HOPPER, "float16").columns
    assert tile_for(16, 75, "bfloat16") == tile_for(512, HOPPER, "float32")  # no tensor cores


@pytest.mark.parametrize("tile", TILES)
def test_warps_of_int4_have_whole_loads(tile: Tile) -> None:
    kernel = WideKernels(LARGER, 16, HOPPER, MULTIPROCESSORS).product({Form.IN_INT4}, tile=tile)
    defines = dict(kernel.defines)
    assert int(defines["TILE_N"]) // int(defines["WARPS_N"]) >= 32
    assert kernel.threads == 32 * int(defines["WARPS_M"]) * int(defines["WARPS_N"])


def test_forms_are_those_of_the_artifact() -> None:
    assert [Form.of(how) for how in (None, Stored("int8"), Stored("int4", 32))] == list(Form)


def test_few_streams_spread_over_more_blocks() -> None:
    """A head's rows of the state are apart from each other."""
    few, many = (WideKernels(SMALLEST, 512, HOPPER, MULTIPROCESSORS).sequence_blocks(batch) for batch in (1, 8))
    assert (few, many) == (8, 4)
    assert WideKernels(LARGER, 512, HOPPER, MULTIPROCESSORS).sequence_blocks(1) == 4


def test_sums_are_split_while_multiprocessors_are_idle() -> None:
    found = [WideKernels(LARGER, rows, HOPPER, MULTIPROCESSORS).split(8192, 2048) for rows in (16, 512, 1024)]
    assert found == [4, 4, 2]
    assert WideKernels(LARGER, 1024, HOPPER, 16).split(8192, 2048) == 1
