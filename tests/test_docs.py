"""README and docs/: every command and every piece of Python runs, in order, on a small model of the name they use; what
is generated is up to date; what is quoted is in the source; links lead somewhere."""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import ModuleType

import click
import pytest

from rwkv_edge.cli import cli, run
from rwkv_edge.evaluation.synthetic import Shape7, random_v7, save_pth

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = {path.name: path for path in (README, *sorted((ROOT / "docs").glob("*.md")))}
NAME = "RWKV-x070-World-0.1B"
TEXT = "The sea is wide, and the ship is small. First Citizen: before we proceed any further, hear me speak.\n"

PARSED_ONLY = {
    r"--backend tensorrt\b": "needs a GPU and TensorRT",
    r"^rwkv-edge demo": "tests/test_demo.py runs it",
}
"""Commands that are checked for their words, and not run."""

OTHER_PROGRAMS = {"git", "make", "pip", "python", "python3", "sudo"}


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of every fenced block."""
    yield from re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    return [
        line[2:] for kind, text in blocks(page) if kind == "console" for line in text.splitlines() if line[:2] == "$ "
    ]


def parse(line: str) -> None:
    """Refuse a command line of ours whose command, options or values are unknown."""
    words, called = shlex.split(line, comments=True)[1:], cli
    command: click.Command = called
    while isinstance(command, click.Group):
        if not words or words[0] in ("--help", "--version"):
            return
        name = words.pop(0)
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"there is no command '{name}': {line}"
        command = found
    if "--help" not in words:
        command.make_context("docs", words, help_option_names=["-h", "--help"])  # click keeps the option that it makes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages begin with: a checkpoint, its artifact, and texts."""
    folder = tmp_path_factory.mktemp("docs")
    save_pth(random_v7(Shape7(2, 64)), folder / f"{NAME}.pth")
    for name, seed in (("corpus.txt", 0), ("book.txt", 7)):
        (folder / name).write_text(TEXT[seed:] * 40, encoding="utf-8")
    artifact = folder / f"{NAME}-fp16"
    assert run(["export", str(folder / f"{NAME}.pth"), "--precision", "fp16", "-o", str(artifact), "-q"]) == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own, with all of that."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    return tmp_path / "work"


@pytest.mark.parametrize(
    "name", [name for name, page in PAGES.items() if {"console", "python"} & set(dict(blocks(page)))]
)
def test_commands_and_python_run_in_order(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for kind, text in blocks(PAGES[name]):
        if kind == "python":
            exec(compile(text, name, "exec"), names)
        for line in text.splitlines() if kind == "console" else ():
            if line.startswith("$ "):
                follow(line[2:], capsys)


def follow(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command of ours; of another program, see that what it names exists."""
    words = shlex.split(line, comments=True)
    if words[0] != "rwkv-edge":
        assert words[0] in OTHER_PROGRAMS, line
        assert all((ROOT / word).is_file() for word in words if word.endswith(".py")), line
        return
    parse(line)
    if not any(re.search(pattern, line) for pattern in PARSED_ONLY):
        assert run(words[1:]) == 0, (line, capsys.readouterr().err)


@pytest.mark.parametrize("name", PAGES)
def test_commands_in_sentences_are_possible(name: str) -> None:
    text = re.sub(r"^```.*?^```$", "", PAGES[name].read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for line in re.findall(r"`(rwkv-edge [a-z][^`]*)`", text.replace("\n", " ")):
        with contextlib.suppress(click.MissingParameter):  # a sentence may leave the artifact out
            parse(line)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES[name].read_text(encoding="utf-8")):
        assert re.match("https?://", target) or (PAGES[name].parent / target).exists(), target


def test_every_page_is_reached_from_readme() -> None:
    text = README.read_text(encoding="utf-8")
    assert not [name for name, page in PAGES.items() if page != README and f"docs/{name}" not in text]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES.values():
        for target in re.findall(r"\$ make ([a-z]+)\b|`make ([a-z]+)`", page.read_text(encoding="utf-8")):
            assert f"\n{''.join(target)}:" in makefile, target


# What is generated


def tool(name: str) -> ModuleType:
    spec = util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_help_in_docs_is_that_of_the_command_line() -> None:
    written = PAGES["commands.md"].read_text(encoding="utf-8")
    expected = tool("write_commands").page()
    assert written.split() == expected.split(), (
        "run: python tools/write_commands.py"
    )  # click's versions wrap differently


def test_the_drawing_is_an_image_with_a_title_and_colours_for_the_dark() -> None:
    text = (ROOT / "docs" / "dataflow.svg").read_text(encoding="utf-8")
    assert ET.fromstring(text).find("{http://www.w3.org/2000/svg}title") is not None
    assert "prefers-color-scheme: dark" in text


# What is quoted


def sentences() -> list[str]:
    """Every string of the source, with … for what is filled in."""
    found = []
    for path in (ROOT / "rwkv_edge").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
    return found


def test_troubleshooting_quotes_sentences_of_the_source() -> None:
    source = [re.sub(r"\s+", " ", sentence) for sentence in sentences()]
    quoted = re.findall(r"^### `(.*)`$", PAGES["troubleshooting.md"].read_text(encoding="utf-8"), re.MULTILINE)
    assert len(quoted) >= 25
    for sentence in quoted:
        pattern = ".*".join(map(re.escape, re.split(" ?… ?", sentence)))
        assert any(re.search(pattern, line) for line in source), sentence


# Embedding


def embedded(head: str) -> str:
    """The C++ program that includes ``head``."""
    return next(text for kind, text in blocks(PAGES["embedding.md"]) if kind == "cpp" and f"#include {head}" in text)


def compiler() -> str:
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("there is no C++ compiler")
    return found


def include(variable: str, header: str, *usual: str) -> str:
    """The folder of a header: that which a variable names, or a usual one."""
    for folder in (os.environ.get(variable, ""), "/usr/include", "/usr/local/include", *usual):
        if folder and (Path(folder) / header).is_file():
            return folder
    pytest.skip(f"{header} was not found; name its folder in {variable}")


def ours(folder: Path, count: int) -> str:
    from rwkv_edge import open_model

    session = open_model(folder / f"{NAME}-fp16").session
    state, found = session.initial_state(), []
    logits = session.prefill([[84, 104, 101]], state)
    for _ in range(count):
        found.append(int(logits[0].argmax()))
        logits = session.step(found[-1:], state)
    return " ".join(map(str, found))


def test_embedded_python_gives_our_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = [text for kind, text in blocks(PAGES["embedding.md"]) if kind == "python"]
    assert text.count("\n") <= 40
    capsys.readouterr()
    exec(compile(text, "embedding.md", "exec"), {})
    assert capsys.readouterr().out.strip() == ours(folder, 12)


def test_embedded_cpp_is_short() -> None:
    programs = [text for kind, text in blocks(PAGES["embedding.md"]) if kind == "cpp"]
    assert len(programs) == 2
    assert all(text.count("\n") <= 40 for text in programs)


def test_embedded_cpp_for_onnxruntime_gives_our_tokens(folder: Path) -> None:
    import onnxruntime

    headers = include("ONNXRUNTIME_INCLUDE", "onnxruntime_cxx_api.h", "/usr/include/onnxruntime")
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"), None)
    if library is None:
        pytest.skip("this onnxruntime holds no library that a program could be linked with")
    (folder / "step_ort.cpp").write_text(embedded("<onnxruntime_cxx_api.h>"), encoding="utf-8")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # the second is the library's own name for itself
        (folder / name).symlink_to(library)
    command = [compiler(), "-std=c++17", "-Wall", "-Werror", "-isystem", headers, "step_ort.cpp", "-o", "step_ort"]
    subprocess.run([*command, "-L.", "-lonnxruntime", "-Wl,-rpath,$ORIGIN"], check=True, timeout=120)
    arguments = ["./step_ort", f"{NAME}-fp16/step.onnx", "12", "84", "104", "101"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ours(folder, 12)


def test_embedded_cpp_for_tensorrt_compiles(tmp_path: Path) -> None:
    roots = [*Path("/usr/include").glob("*-linux-gnu"), *Path("/usr/local").glob("*/targets/*/include")]
    tensorrt = include("TENSORRT_INCLUDE", "NvInfer.h", *map(str, roots))
    cuda = include("CUDA_INCLUDE", "cuda_runtime_api.h", "/usr/local/cuda/include", *map(str, roots))
    (tmp_path / "step_trt.cpp").write_text(embedded('"trt_engine.h"'), encoding="utf-8")
    folders = [
        *itertools.chain.from_iterable(("-isystem", folder) for folder in (tensorrt, cuda)),
        f"-I{ROOT / 'examples'}",
    ]
    command = [compiler(), "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", *folders, str(tmp_path / "step_trt.cpp")]
    subprocess.run(command, check=True, timeout=120)
