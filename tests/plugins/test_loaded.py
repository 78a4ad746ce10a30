"""Kernels that are loaded: once each, compiled side by side, and a word to those who wait."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace

import cuda_double
import pytest

from rwkv_edge.plugins.fused_spec import FusedKernel
from rwkv_edge.runtime.cuda_launch import Launch, Loaded

KERNEL = FusedKernel("rwkv_argmax", "argmax.cu", (), ("best", "best_at"), ("tokens",), (1, 1, 1), 32)


class Slow:
    """Stands for NVRTC: notes what was asked of it, and by which threads."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked, self.threads = seconds, [], set()

    def __call__(self, kernel: FusedKernel, capability: int, cache: None = None) -> str:
        self.asked.append(kernel.name)
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        return cuda_double.described(kernel, capability)


@pytest.mark.parametrize(("seconds", "notes"), [(0.0, 0), (0.5, 1)])
def test_kernels_are_compiled_side_by_side(
    seconds: float, notes: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = Slow(seconds)
    monkeypatch.setattr(FusedKernel, "ptx", lambda kernel, capability: compiler(kernel, capability))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    kernels = [replace(KERNEL, name=f"rwkv_{i}") for i in range(4)]
    loaded = Loaded(cuda_double.Driver())
    with caplog.at_level(logging.INFO, "rwkv_edge"):
        loaded._load([*kernels, *kernels])
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == notes
    assert all("compiling kernels for numpy; the next start finds them in the cache" in line for line in found)
    assert {compiler.asked.count(kernel.name) for kernel in kernels} == {1}
    if seconds:
        assert len(compiler.threads) > 2
    before = len(compiler.asked)
    assert loaded.function(kernels[0]) is loaded.function(replace(kernels[0]))
    assert len(compiler.asked) == before


def test_kernels_that_come_and_go_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state that draws makes equal kernels anew."""
    monkeypatch.setattr(FusedKernel, "ptx", cuda_double.described)
    loaded = Loaded(cuda_double.Driver())
    kept = replace(KERNEL)
    function = loaded.function(kept)
    for _ in range(100):
        assert loaded.function(replace(KERNEL)) is function
    assert len(loaded._same) == 1
    assert loaded.function(kept) is function
    assert len(loaded._functions) == 1


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kernel: FusedKernel, capability: int) -> str:
        raise ValueError(kernel.name)

    monkeypatch.setattr(FusedKernel, "ptx", refuse)
    with pytest.raises(ValueError, match="rwkv_argmax"):
        Loaded(cuda_double.Driver()).enqueue([Launch(KERNEL, (0, 0, 0), (1, 1, 1))])
