"""What every command has in common: help with an example, --quiet, --json, no colours, a quick start, completion."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from tiny import process, write_artifact, write_checkpoint

from rwkv_edge.cli import COMMANDS, cli, run
from rwkv_edge.cli.common import program

REPORTING = {
    "bench", "cache clear", "cache info", "doctor", "eval", "info", "sensitivity", "soak", "state diff", "state info",
    "verify",
}  # fmt: skip
"""Their result is what they print."""

HEAVY = (
    "numpy",
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnx_ir",
    "safetensors",
    "matplotlib",
    "pyrwkv_tokenizer",
)


def commands(group: click.Group = cli, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        yield f"{prefix}{name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} ")


ALL = dict(commands())
LEAVES = {name: command for name, command in ALL.items() if not isinstance(command, click.Group)}


def options_of(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts}


@pytest.mark.parametrize("name", ["", *ALL])
def test_help_ends_with_an_example_that_parses(name: str) -> None:
    command = ALL.get(name, cli)
    example = inspect.cleandoc(command.help or "").split("\n\n")[-1]
    assert example.startswith(f"Example: rwkv-edge {name}".strip())
    words = shlex.split(" ".join(example.split()).removeprefix("Example: rwkv-edge "))
    called: click.Command = cli
    while isinstance(called, click.Group):
        found = called.get_command(click.Context(called), words.pop(0))
        assert found is not None
        called = found
    called.make_context(name or "demo", words, help_option_names=["-h", "--help"])  # raises where a word is unknown


@pytest.mark.parametrize("name", LEAVES)
def test_every_option_says_what_it_is_for(name: str) -> None:
    for parameter in LEAVES[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.help.endswith((".", "]", ")")), parameter.help
            metavar = parameter.make_metavar(click.Context(LEAVES[name]))
            assert "RANGE" not in metavar, f"{parameter.opts}: {metavar} says nothing to a user"


def test_reports_can_be_json() -> None:
    assert {name for name, command in LEAVES.items() if "--json" in options_of(command)} >= REPORTING


def test_every_command_can_be_quiet() -> None:
    """Those without notes too: a script passes -q wherever it likes."""
    assert not [name for name, command in LEAVES.items() if not {"-q", "--quiet"} <= options_of(command)]


def test_quiet_leaves_results_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, folder = write_checkpoint(tmp_path / "a.pth"), str(tmp_path / "artifact")
    assert run(["export", str(checkpoint), "-o", folder, "--chunk", "0", "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    arguments = ["generate", folder, "abc", "-n", "4", "--seed", "1"]
    assert run(arguments) == 0
    loud = capsys.readouterr()
    assert run([*arguments, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert "tokens/s" in loud.err
    assert quiet == (loud.out, "")
    assert run(["generate", folder, "abc", "--top-p", "7", "-q"]) == 2
    assert "top_p" in capsys.readouterr().err


def test_clearing_a_cache_can_be_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, cache = str(write_artifact(tmp_path / "artifact")), str(tmp_path / "cache")
    assert run(["generate", folder, "abc", "-n", "1", "--cache", cache]) == 0
    capsys.readouterr()
    assert run(["cache", "clear", cache, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] > 0


def test_nothing_heavy_is_imported_for_help() -> None:
    code = (
        "import sys; from rwkv_edge.cli import run; run(['--help'])\n"
        f"print([name for name in {HEAVY} if name in sys.modules], len(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    found, count = done.stderr.rsplit(None, 1)
    assert found == "[]"
    assert int(count) < 400  # 230 in November 2026; numpy alone brings 150


def test_help_of_commands_needs_neither_torch_nor_a_backend() -> None:
    code = (
        f"import sys; from rwkv_edge.cli import run\nfor name in {list(LEAVES)}:\n    run([*name.split(), '--help'])\n"
        f"    print(name, [m for m in {HEAVY[1:]} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines() == [f"{name} []" for name in LEAVES]


@pytest.mark.parametrize(("shell", "words"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete --")])
def test_shells_complete(shell: str, words: str) -> None:
    done = completed({"_RWKV_EDGE_COMPLETE": f"{shell}_source"})
    if shell == "bash" and "Bash version" in done.stderr:
        pytest.skip("click found no bash of version 4.4")
    assert words in done.stdout
    assert "_RWKV_EDGE_COMPLETE" in done.stdout


def test_completion_knows_commands_and_options() -> None:
    words = {"_RWKV_EDGE_COMPLETE": "bash_complete", "COMP_WORDS": "rwkv-edge ex", "COMP_CWORD": "1"}
    assert completed(words).stdout == "plain,export\n"
    words |= {"COMP_WORDS": "rwkv-edge export --prec", "COMP_CWORD": "2"}
    assert completed(words).stdout == "plain,--precision\n"
    words |= {"COMP_WORDS": "rwkv-edge export --precision f", "COMP_CWORD": "3"}
    assert completed(words).stdout == "plain,fp32\nplain,fp16\n"


def test_completion_suggests_names_and_then_files() -> None:
    words = {"_RWKV_EDGE_COMPLETE": "bash_complete", "COMP_WORDS": "rwkv-edge chat --tokenizer ", "COMP_CWORD": "3"}
    assert completed(words).stdout == "plain,world\nplain,bytes\n"
    words["COMP_WORDS"] += "my"
    assert completed(words).stdout == "file,my\n"
    words["COMP_WORDS"] = "rwkv-edge bench --provider nv"
    assert completed(words).stdout == "plain,nv-tensorrt-rtx\n"


def test_completion_tells_what_commands_are_for() -> None:
    words = {"_RWKV_EDGE_COMPLETE": "fish_complete", "COMP_WORDS": "rwkv-edge ", "COMP_CWORD": ""}
    assert completed(words).stdout == "".join(f"plain,{name}\t{text}\n" for name, text in COMMANDS.items())


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_loads_the_completion_and_completes(tmp_path: Path) -> None:
    """As bash calls it: the function that was registered, with the command's name first."""
    program = tmp_path / "rwkv-edge"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m rwkv_edge "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    script = (
        'eval "$(_RWKV_EDGE_COMPLETE=bash_source rwkv-edge)"\ncomplete -p rwkv-edge\n'
        "COMP_WORDS=(rwkv-edge export --precision f) COMP_CWORD=3\n_rwkv_edge_completion rwkv-edge f --precision\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=60, env=os.environ | path
    )
    if "Bash version" in done.stderr:
        pytest.skip("click found no bash of version 4.4")
    assert done.stdout == "complete -o nosort -F _rwkv_edge_completion rwkv-edge\nfp32 fp16\n", done.stderr


def completed(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rwkv_edge"],
        capture_output=True, text=True, timeout=60, env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals of POSIX")
@pytest.mark.parametrize("quiet", [False, True])
def test_bars_are_drawn_on_a_terminal_and_never_coloured(quiet: bool, tmp_path: Path) -> None:
    import pty

    checkpoint = write_checkpoint(tmp_path / "a.pth")
    arguments = ["export", str(checkpoint), "-o", str(tmp_path / "out"), "--chunk", "0", *["-q"][: int(quiet)]]
    parent, child = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "rwkv_edge", *arguments], stdout=child, stderr=child,
        env=os.environ | {"NO_COLOR": "1"},
    ) as started:  # fmt: skip
        os.close(child)
        shown = b""
        while True:
            try:
                if not (piece := os.read(parent, 4096)):
                    break
            except OSError:  # Linux's way to say that the other end is closed
                break
            shown += piece
        assert started.wait(60) == 0, shown
    os.close(parent)
    assert (b"weights" in shown) is not quiet
    assert not re.search(rb"\x1b\[[\d;]*m", shown)


def test_no_bars_without_a_terminal(tmp_path: Path) -> None:
    done = process("export", write_checkpoint(tmp_path / "a.pth"), "-o", tmp_path / "out", "--chunk", "0")
    assert done.returncode == 0
    assert done.stderr == b""


def test_commands_that_show_nothing_but_errors_end_with_their_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "missing.pth", "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Error: ")
    assert run(["generate", "--no-such-option"]) == 2


def test_ctrl_c_while_modules_are_read(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt\n", encoding="utf-8")
    paths = os.pathsep.join((str(tmp_path), *sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "rwkv_edge", "doctor"], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize(
    ("called", "on_path", "expected"),
    [
        (".venv/bin/rwkv-edge", False, ".venv/bin/rwkv-edge"),
        (".venv/bin/rwkv-edge", True, "rwkv-edge"),
        ("/site-packages/rwkv_edge/__main__.py", False, f"{Path(sys.executable).name} -m rwkv_edge"),
    ],
)
def test_what_is_told_to_be_typed_next_can_be_typed(
    called: str, on_path: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [called, "demo"])
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if on_path else None)
    assert program() == expected


def test_a_misspelt_command_is_answered_with_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["exprot"]) == 2
    assert "No such command 'exprot'. Did you mean 'export'?" in capsys.readouterr().err
    assert run(["zzz"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning

    def warns() -> None:
        warnings.simplefilter("always")
        warnings.warn("steps run without CUDA graphs,\nwhich is slower", RuntimeWarning, stacklevel=1)

    monkeypatch.setattr(LEAVES["doctor"], "callback", lambda as_json: warns())
    assert run(["doctor"]) == 0
    assert capsys.readouterr() == ("", "Warning: steps run without CUDA graphs,\\nwhich is slower\n")
    assert warnings.showwarning is before
