"""Launch dimensions and arguments of every kernel: plain arithmetic, no GPU."""

from __future__ import annotations

import re

import pytest

from rwkv_edge.errors import InputError
from rwkv_edge.plugins import KernelSpec, kernel_spec, nvrtc
from rwkv_edge.plugins.spec import DTYPES, HEAD_SIZES, KINDS, VERSIONS

PORTABLE_SHARED = 48 * 1024  # bytes that a block gets without opting in
ALL = [
    (version, kind, head)
    for version in VERSIONS
    for kind in KINDS
    for head in ([1] if version == "4" else [*HEAD_SIZES])
]


def macros(spec: KernelSpec) -> dict[str, str]:
    return dict(spec.defines)


@pytest.mark.parametrize(("version", "kind"), [(v, k) for v in VERSIONS for k in KINDS])
def test_limits(version, kind):
    for head in [1] if version == "4" else HEAD_SIZES:
        spec = kernel_spec(version, kind, "float16", head)
        x, y, z = spec.block(64, 300, 32, head)
        assert x * y * z <= 1024
        assert x % 32 == 0, "full warps: the kernels shuffle with every lane"
        assert spec.shared_bytes(64, 300, 32, head) <= PORTABLE_SHARED
        assert all(1 <= n < 2**16 for n in spec.grid(64, 300, 32, head)[1:])


@pytest.mark.parametrize("head", HEAD_SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", ["5", "6", "7"])
def test_blocks_cover_the_head_once(version, kind, head):
    spec = kernel_spec(version, kind, "float32", head)
    values = {name: int(value) for name, value in spec.defines if value.isdigit()}
    blocks, heads, batch = spec.grid(3, 7, 5, head)
    assert (heads, batch) == (5, 3)
    assert (blocks - 1) * spec.channels < head <= blocks * spec.channels
    groups, lanes = values["THREADS"] // values["LANES"], values["LANES"]
    assert lanes & (lanes - 1) == 0
    assert lanes <= 32
    if kind == "sequence":
        assert lanes >= 4, "scatter_sum4 gives a component to each of four lanes"
        assert spec.channels == 4 * groups
        width = -(-head // (4 * lanes)) * 4 * lanes
        vectors = {"5": 3, "6": 4, "7": 6}[version]
        assert spec.shared_memory == 2 * values["CHUNK"] * vectors * width * 4
    else:
        assert lanes * 4 >= head
        assert groups * values["ROWS"] >= spec.channels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 63, 64, 65, 768, 2048])
def test_blocks_cover_the_channels_of_v4(kind, channels):
    spec = kernel_spec("4", kind, "float32", 64)
    blocks, y, batch = spec.grid(3, 7, 1, channels)
    assert (y, batch) == (1, 3)
    assert (blocks - 1) * spec.channels < channels <= blocks * spec.channels
    assert spec.channels == spec.threads


def test_names_are_unique():
    names = [kernel_spec(v, k, d, n).name for v, k, n in ALL for d in DTYPES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("version", "kind"), [(v, k) for v in VERSIONS for k in KINDS])
def test_argument_order_is_that_of_the_source(version, kind):
    """Input pointers, int32 scalars, output pointers, with the names of the spec."""
    spec = kernel_spec(version, kind, "bfloat16", 64)
    text = nvrtc.kernel_text(spec.source).replace("#if SEQUENCE", "").replace("#endif", "")
    found = re.search(r"KERNEL\((.*?)\) \{", text, re.DOTALL)
    assert found
    parameters = [p.split() for p in found[1].split(",")]
    if version == "4" and kind == "step":
        parameters = [p for p in parameters if p[-1] != "tokens"]
    c_names = {"state": "state_in", "num": "num_in", "den": "den_in", "top": "top_in", "H": "heads", "A": "channels"}
    c_names |= {"T": "tokens", "state.out": "state_out"} | {f"{n}.out": f"{n}_out" for n in ("num", "den", "top")}
    arguments = [*spec.inputs, *spec.scalars, *spec.outputs]
    names = [a if isinstance(a, str) else a.name for a in arguments]
    assert [p[-1] for p in parameters] == [c_names.get(name, name) for name in names]
    for argument, parameter in zip(arguments, parameters, strict=True):
        declared = " ".join(parameter[:-1])
        if isinstance(argument, str):
            assert declared == "int"
        else:
            assert ("Act*" in declared) == (argument.dtype == "bfloat16")
            assert ("const" in declared) == (argument in spec.inputs)


def test_shapes():
    spec = kernel_spec("6", "sequence", "float16", 64)
    shapes = {a.name: a.shape(2, 3, 4, 64) for a in (*spec.inputs, *spec.outputs)}
    assert shapes["state"] == shapes["state.out"] == (2, 4, 64, 64)
    assert shapes["w"] == shapes["y"] == (2, 3, 4, 64)
    assert shapes["u"] == (4, 64)
    assert spec.scalar_values(2, 3, 4, 64) == (4, 3)
    assert kernel_spec("5", "step", "float16", 64).inputs[2].shape(2, 1, 4, 64) == (4, 64)
    assert kernel_spec("4", "step", "float16", 64).outputs[0].shape(2, 1, 4, 64) == (2, 256)


class Symbol:
    """An integer that knows +, * and // only, as in tensorrt.plugin."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __add__(self, other):
        return Symbol(f"({self.text}+{other})")

    def __mul__(self, other):
        return Symbol(f"{self.text}*{getattr(other, 'text', other)}")

    def __floordiv__(self, other):
        return Symbol(f"{self.text}//{other}")


def test_dimensions_may_be_symbolic():
    b, t, h = Symbol("B"), Symbol("T"), Symbol("H")
    spec = kernel_spec("7", "sequence", "float32", 64)
    assert spec.grid(b, t, h, 64)[1:] == (h, b)
    assert spec.scalar_values(b, t, h, 64) == (h, t)
    x, _, z = kernel_spec("4", "step", "float32", 64).grid(b, t, h, Symbol("N"))
    assert x.text == "(H*N+127)//128"
    assert z is b


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("8", "step", "float32", 64), "version"),
        (("7", "chunk", "float32", 64), "kind"),
        (("7", "step", "int8", 64), "dtype"),
        (("7", "step", "float32", 66), "multiples of 4"),
        (("7", "step", "float32", 256), "up to 128"),
    ],
)
def test_unknown_kernels_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        kernel_spec(*arguments)
