"""Every kernel compiles with NVRTC, keeps its state in registers, and is cached by content."""

from __future__ import annotations

import re

import pytest
from ptxas import report, spilled

from rwkv_edge.errors import ExportError
from rwkv_edge.plugins import kernel_spec, nvrtc
from rwkv_edge.plugins.spec import DTYPES, KINDS, VERSIONS

ARCHITECTURES = [75, 87, 90, 120]  # Turing, Orin, Hopper, Blackwell
OTHERS = [80, 89, 100, 110]  # Thor is the last
KERNELS = [(v, k) for v in VERSIONS for k in KINDS]
COMPILED = [(*kernel, c) for c in ARCHITECTURES for kernel in KERNELS] + [("7", "step", c) for c in OTHERS]


@pytest.fixture
def architectures(nvrtc_architectures):
    return nvrtc_architectures


@pytest.mark.parametrize(("version", "kind", "capability"), COMPILED)
def test_compiles(version, kind, capability, architectures, tmp_path):
    if capability not in architectures:
        pytest.skip(f"NVRTC {nvrtc.nvrtc_version()} does not know compute_{capability}")
    for dtype in DTYPES:
        spec = kernel_spec(version, kind, dtype, 64)
        ptx = spec.ptx(capability, tmp_path)
        assert f".target sm_{capability}" in ptx
        assert f".visible .entry {spec.name}(" in ptx
        parameters = re.findall(rf"\.param \.(\w+).*{spec.name}_param_\d+", ptx)
        pointers, scalars = ["u64"] * len(spec.inputs), ["u32"] * len(spec.scalars)
        assert parameters[: len(pointers + scalars) + len(spec.outputs)] == [
            *pointers,
            *scalars,
            *["u64"] * len(spec.outputs),
        ]


@pytest.mark.parametrize("head", [8, 48, 64, 80, 96, 128])
@pytest.mark.parametrize(("version", "kind"), KERNELS)
def test_registers_do_not_spill(version, kind, head, architectures):
    """Neither spills nor a stack, for Orin and Hopper; sizes of heads other than 64 for Orin."""
    if version == "4" and head != 64:
        pytest.skip("RWKV-4 has no heads")
    for dtype in DTYPES if head == 64 else ("float32",):  # the widest loads
        spec = kernel_spec(version, kind, dtype, head)
        for capability in ({87, 90} if head == 64 else {87}) & set(architectures):
            assert spilled(spec, capability) == 0, f"{spec.name}: {report(spec, capability)}"


def test_loads_are_16_bytes_wide(architectures, tmp_path):
    for version in ("5", "6", "7"):
        for kind in KINDS:
            ptx = kernel_spec(version, kind, "float32", 64).ptx(architectures[-1], tmp_path)
            assert re.search(r"ld\.global(\.\w+)*\.v4\.(f|u|b)32", ptx)
            assert re.search(r"st\.global(\.\w+)*\.v4\.(f|u|b)32", ptx)


def test_cache_is_by_content_and_atomic(architectures, tmp_path, monkeypatch):
    spec = kernel_spec("7", "step", "float16", 64)
    text = spec.ptx(architectures[-1], tmp_path)
    (file,) = (tmp_path / "ptx").iterdir()
    assert file.suffix == ".ptx"
    assert file.read_text("utf-8") == text
    file.write_text("// from the cache", "utf-8")
    assert spec.ptx(architectures[-1], tmp_path) == "// from the cache"
    monkeypatch.setenv(nvrtc.CACHE_VARIABLE, str(tmp_path))
    assert spec.ptx(architectures[-1]) == "// from the cache"
    kernel_spec("7", "step", "bfloat16", 64).ptx(architectures[-1])
    assert len(list((tmp_path / "ptx").iterdir())) == 2


def test_unwritable_cache_is_done_without(architectures, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder", "utf-8")
    assert ".entry" in kernel_spec("4", "step", "float32", 1).ptx(architectures[-1], blocked)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(nvrtc.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nvrtc.cache_folder() == tmp_path / "rwkv-edge"
    assert nvrtc.cache_folder(tmp_path) == tmp_path


def test_newer_devices_get_the_newest_known(architectures):
    assert nvrtc.nearest_capability(architectures[-1] + 5) == architectures[-1]
    assert nvrtc.nearest_capability(architectures[0]) == architectures[0]
    with pytest.raises(ExportError, match="older CUDA"):
        nvrtc.nearest_capability(architectures[0] - 5)


def test_a_compiler_error_is_reported(architectures):
    with pytest.raises(ExportError, match=r"wkv7_step\.cu must compile.*error"):
        nvrtc.compiled("wkv7_step.cu", [*nvrtc.OPTIONS, "--gpu-architecture=compute_90"])
