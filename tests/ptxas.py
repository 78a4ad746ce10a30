"""What ptxas inside NVRTC reports of a kernel's machine code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import pytest

from rwkv_edge.plugins import nvrtc

BETWEEN = (86, 89, 100, 110)
"""Capabilities for which the texts are those of 80, 87, 90 or 120: one short kernel stands for all."""


class Compiled(Protocol):
    """A kernel's text and its macros."""

    @property
    def source(self) -> str: ...

    @property
    def defines(self) -> Sequence[tuple[str, str]]: ...


def report(kernel: Compiled, capability: int) -> str:
    """The log of compiling for ``sm_<capability>``."""
    return _report(kernel.source, tuple(kernel.defines), capability)


@cache  # models share kernels
def _report(source: str, defines: tuple[tuple[str, str], ...], capability: int) -> str:
    options = [*nvrtc.OPTIONS, *(f"-D{name}={value}" for name, value in defines)]
    cubin, log = nvrtc.compiled(source, [*options, f"--gpu-architecture=sm_{capability}", "--ptxas-options=-v"])
    assert cubin[:4] == b"\x7fELF"
    return log


def spilled(kernel: Compiled, capability: int) -> int:
    """Bytes of the stack frame, of stores or of loads of spilled registers, whichever are the most."""
    log = report(kernel, capability)
    if "spill" not in log:
        pytest.skip("this NVRTC passes on no report of ptxas")
    return max(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill)", log))
