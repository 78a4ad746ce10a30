"""The fused kernels of RWKV-4 to 6 and 7a: their order, and what NVRTC makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ptxas import report, spilled

from rwkv_edge.errors import InputError
from rwkv_edge.plugins.fused import Kernels
from rwkv_edge.plugins.fused_spec import Dimensions, FusedKernel, Stored, Tuning
from rwkv_edge.plugins.fused_versions import KERNELS
from rwkv_edge.runtime.cuda_tuning import LARGE, SMALL

ORIN, HOPPER = 87, 90
MOST_SHARED = 163 << 10  # bytes of a block on Orin

OFFICIAL = {
    "4": Dimensions(768, 768, 3072, 0, 0, 50277, 0, 0, 0, 0, "float16", layers=12, rescale=6),
    "5.0": Dimensions(768, 768, 2688, 12, 64, 65536, 0, 0, 0, 0, "float16", layers=12, rescale=6),
    "5.2": Dimensions(2048, 2048, 7168, 32, 64, 65536, 0, 0, 0, 0, "float16", layers=24, rescale=6),
    "6": Dimensions(2048, 2048, 7168, 32, 64, 65536, 64, 0, 0, 0, "float16", rank_mix=32, layers=24, rescale=6),
    "7a": Dimensions(768, 768, 3072, 12, 64, 65536, 64, 64, 128, 32, "float16", rank_deep=32, layers=12),
}
"""Of released models."""
MATRICES = {
    "att": ("receptance", "key", "value", "gate", "output"),
    "ffn": ("key", "value", "receptance", "s1", "s2"),
}
EXPECTED = {
    "4": ("mix_in", "v4_wkv", "v7_project", "mix_in", "v7_project"),
    "5.0": ("mix_in", "v6_wkv", "v7_project", "mix_in", "v7_project"),
    "5.2": ("mix_in", "v6_wkv", "v7_project", "mix_in", "v7_project"),
    "6": ("mix_in", "v6_mixes", "v6_time_mix_in", "v6_wkv", "v7_project", "mix_in", "v7_project"),
}


def small(version: str) -> Dimensions:
    """Compiles in a moment."""
    d = OFFICIAL[version]
    heads = {"heads": 2} if d.heads else {}
    return replace(d, width=128, inner=128, hidden=512, vocabulary=256, **heads)


def made(version: str, dimensions: Dimensions, tuning: Tuning = SMALL, batch: int = 1, form: str = "float") -> Kernels:
    """The kernels with all matrices that may be so in ``form``."""
    kernels = KERNELS[version](dimensions, batch, tuning, shared=MOST_SHARED)
    if form == "float":
        return kernels
    how = Stored("int8") if form == "int8" else Stored("int4", 32)
    names = [f"{part}.{name}" for part, found in MATRICES.items() for name in found]
    stored = {f"blocks.{i}.{name}": how for i in (0, 1) for name in names if name in kernels.columns()}
    stored |= {"head": how, "emb": Stored("int8")}
    return KERNELS[version](dimensions, batch, tuning, stored, shared=MOST_SHARED)


def all_of(kernels: Kernels) -> dict[FusedKernel, None]:
    found = [*kernels.time_mix(0), *kernels.time_mix(1), *kernels.channel_mix(1), kernels.head()]
    return dict.fromkeys(found)


COMPILED = [
    (version, *case)
    for version in OFFICIAL
    for case in ((75, "float"), (75, "int4"), (80, "int8"), (87, "float"), (90, "int8"), (120, "int4"))
    if version != "5.0" or case in ((75, "int4"), (87, "float"))  # with the texts of 5.2
]


@pytest.mark.parametrize(("version", "capability", "form"), COMPILED)
def test_all_compile(capability: int, version: str, form: str, nvrtc_architectures: tuple[int, ...]) -> None:
    if capability not in nvrtc_architectures:
        pytest.skip(f"this NVRTC does not know compute_{capability}")
    for kernel in all_of(made(version, small(version), form=form)):
        assert f".target sm_{capability}" in kernel.ptx(capability)


@pytest.mark.parametrize(
    ("version", "batch", "form", "dtype", "capability"),
    [
        ("4", 1, "float", "float16", ORIN),
        ("5.0", 1, "float", "bfloat16", HOPPER),
        ("5.2", 1, "float", "float16", ORIN),
        ("5.2", 1, "int8", "float16", HOPPER),
        ("5.2", 1, "int4", "float16", ORIN),
        ("6", 1, "float", "float16", HOPPER),
        ("6", 1, "int4", "float16", ORIN),
        ("7a", 1, "float", "float16", ORIN),
    ],
)
def test_registers_do_not_spill(
    version: str, batch: int, form: str, dtype: str, capability: int, nvrtc_architectures: tuple[int, ...]
) -> None:
    """At the widths of released models; two words at most, by which ptxas reaches a round number of registers."""
    if capability not in nvrtc_architectures:
        pytest.skip(f"this NVRTC does not know sm_{capability}")
    dimensions = replace(OFFICIAL[version], dtype=dtype)
    tuning = LARGE if dimensions.width >= 2048 else SMALL
    for kernel in all_of(made(version, dimensions, tuning, batch, form)):
        assert spilled(kernel, capability) <= 8, f"{kernel.name}: {report(kernel, capability)}"


@pytest.mark.parametrize("version", EXPECTED)
def test_order_of_launches(version: str) -> None:
    kernels = made(version, OFFICIAL[version])
    launched = (*kernels.time_mix(1), *kernels.channel_mix(1))
    assert tuple(kernel.source.removesuffix(".cu") for kernel in launched) == EXPECTED[version]


@pytest.mark.parametrize("version", OFFICIAL)
def test_every_name_is_a_buffer_or_is_given(version: str) -> None:
    """What one kernel writes another reads, and everything that is handed on has a buffer."""
    kernels = made(version, OFFICIAL[version])
    launched = [*kernels.time_mix(0), *kernels.channel_mix(0), *kernels.time_mix(1), *kernels.channel_mix(1)]
    written = {name for kernel in launched for name in kernel.outputs}
    state = {"stream", "shift", "wkv", "wkv_num", "wkv_den", "wkv_max"}
    assert written - state <= kernels.buffers().keys()
    assert written <= {name for kernel in launched for name in kernel.inputs} | {"parts"}


def test_streams_are_halved_before_a_layer_and_the_head() -> None:
    """RWKV-4 to 6 in fp16: after every sixth layer, which the next sum of the stream does."""
    kernels = made("4", OFFICIAL["4"])

    def halves(kernel: FusedKernel) -> bool:
        return dict(kernel.defines)["HALVE"] == "1"

    assert [layer for layer in range(12) if halves(kernels.time_mix(layer)[0])] == [6]
    assert not any(halves(kernels.channel_mix(layer)[0]) for layer in range(12))
    assert halves(kernels.head())
    assert not halves(made("4", replace(OFFICIAL["4"], layers=13)).head())


@pytest.mark.parametrize(
    ("version", "stored", "sentence"),
    [
        ("6", {"blocks.0.att.decay.w2": Stored("int8")}, "in int8; found blocks.0.att.decay.w2"),
        ("5.0", {"blocks.0.att.gate": Stored("int8")}, "in int8; found blocks.0.att.gate"),
        ("4", {"emb": Stored("int4", 32)}, "in int4; found emb"),
    ],
)
def test_other_forms_are_refused(version: str, stored: dict[str, Stored], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        KERNELS[version](OFFICIAL[version], 1, SMALL, stored)


def test_odd_columns_are_refused() -> None:
    with pytest.raises(InputError, match=r"an int4 matrix .* multiples of 32; found 24 for blocks.0.ffn.s1"):
        KERNELS["7a"](replace(OFFICIAL["7a"], rank_deep=24), 1, SMALL, {"blocks.0.ffn.s1": Stored("int4", 32)})
