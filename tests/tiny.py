"""A model of a second, and what a refusal of the command line must look like."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from rwkv_edge.cli import run
from rwkv_edge.evaluation.synthetic import Shape7, random_v7, save_pth

STEP_ONLY = ("--chunk", "0")  # no prefill graphs: they take most of the time
SHAPE = Shape7(n_layer=2, n_embd=64, vocab_size=256, ranks=(8, 8, 8, 8))


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """140,000 parameters; models of different seeds have files of the same sizes."""
    return random_v7(SHAPE, seed)


def write_checkpoint(path: Path, seed: int = 0, **replaced: torch.Tensor) -> Path:
    """A .pth; in the names of ``replaced`` tensors, '__' stands for '.'."""
    return save_pth(weights(seed) | {name.replace("__", "."): value for name, value in replaced.items()}, path)


def write_artifact(folder: Path, seed: int = 0, *options: str) -> Path:
    """The artifact of a checkpoint of that seed, which is kept beside it as ``<name>.pth``."""
    checkpoint = write_checkpoint(folder.with_suffix(".pth"), seed)
    assert run(["export", str(checkpoint), "-o", str(folder), *STEP_ONLY, *options]) == 0
    return folder


def content(folder: Path) -> Mapping[str, bytes]:
    """Every file below ``folder``, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The sentence with which the command line refuses ``arguments``; it must be all that is printed."""
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert printed.out == ""
    return sentence(code, printed.err)


def sentence(code: int, stderr: str) -> str:
    """``stderr``, if it is one sentence and the exit code says failure."""
    assert code in (1, 2), stderr
    own = re.sub(r"(?s)\AUsage: .*?\n\n", "", stderr)  # click puts the usage before its own
    assert own.startswith("Error: "), stderr
    assert own.endswith("\n"), stderr
    assert own.count("\n") == 1, stderr
    assert own.strip().isprintable(), own  # no control characters of a damaged file
    return own.removeprefix("Error: ").strip()


def process(*arguments: str | bytes | Path, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run the command line as a process of its own."""
    command = [sys.executable, "-W", "error", "-m", "rwkv_edge", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120)
