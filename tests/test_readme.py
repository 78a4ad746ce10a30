"""Every command and every piece of Python in README runs, in order, on a small model of the name that README uses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rwkv_edge.cli import run
from rwkv_edge.evaluation.synthetic import Shape7, random_v7, save_pth

README = Path(__file__).parents[1] / "README.md"
NAME = "RWKV-x070-World-0.1B"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that holds the checkpoint."""
    monkeypatch.chdir(tmp_path)
    save_pth(random_v7(Shape7(2, 64)), tmp_path / f"{NAME}.pth")
    return tmp_path


def test_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [line for block in blocks("console") for line in block.splitlines() if line.startswith("$ rwkv-edge")]
    assert len(commands) >= 5
    for line in commands:
        arguments = shlex.split(line, comments=True)[2:]
        assert run(arguments) == 0, (line, capsys.readouterr().err)


def test_python(folder: Path) -> None:
    assert run(["export", f"{NAME}.pth", "--precision", "fp16"]) == 0
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), names)
    assert "arrays" in names


def test_make_targets_exist() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake ([a-z]+)\b", README.read_text(encoding="utf-8"))):
        assert f"\n{target}:" in makefile, target
