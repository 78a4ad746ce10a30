"""`rwkv-edge chat` as a user has it: in a terminal with keys and a window that changes, and behind a pipe."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from tiny import STEP_ONLY, process, refusal

from rwkv_edge.cli import run
from rwkv_edge.cli.chat import _Terminal
from rwkv_edge.evaluation.demo import DEMO_CHECKPOINT
from rwkv_edge.runtime.chat_templates import TEMPLATES

posix = pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals of POSIX")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model: what it says is plain text without '>', and has no end."""
    folder = tmp_path_factory.mktemp("chat") / "artifact"
    assert run(["export", str(DEMO_CHECKPOINT), "-o", str(folder), *STEP_ONLY]) == 0
    return folder


class Terminal:
    """A child behind a pseudo-terminal."""

    def __init__(self, *arguments: str | Path, folder: Path) -> None:
        import pty

        command = [sys.executable, "-W", "error", "-m", "rwkv_edge", "chat", *map(str, arguments)]
        self.child, self._side = pty.fork()
        if self.child == 0:
            os.chdir(folder)
            os.environ.update(TERM="xterm", PYTHONIOENCODING="utf-8")
            os.execv(command[0], command)
        self.printed = ""
        self._status: int | None = None

    def expect(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Wait until what was printed since the last call matches; returns the match."""
        import select

        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self.printed)):
            assert time.monotonic() < until, f"{pattern!r} did not come: {self.printed[-500:]!r}"
            if select.select([self._side], [], [], 0.1)[0]:
                self._read()
        self.printed = self.printed[found.end() :]
        return found

    def _read(self) -> None:
        try:
            data = os.read(self._side, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            data = b""
        assert data, f"the child left: {self.printed[-500:]!r}"
        self.printed += data.decode("utf-8", errors="replace")

    def type(self, text: str) -> None:
        """Keys."""
        os.write(self._side, text.encode())

    def resize(self, rows: int, columns: int) -> None:
        """Another size of the window, of which the child is told."""
        import fcntl
        import struct
        import termios

        fcntl.ioctl(self._side, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait(self, seconds: float = 60) -> int:
        """The exit code."""
        until = time.monotonic() + seconds
        while self._status is None:
            pid, status = os.waitpid(self.child, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                raise AssertionError(f"the child stays: {self.printed[-500:]!r}")
            else:
                time.sleep(0.01)
        return self._status

    def close(self) -> None:
        """End the child, if it has not ended."""
        if self._status is None:
            os.kill(self.child, signal.SIGKILL)
            self.wait()
        os.close(self._side)


def settle() -> None:
    """CPython's readline sleeps through a signal that comes while it handles a key, until the next one."""
    time.sleep(0.3)


@pytest.fixture
def terminal(artifact: Path, tmp_path: Path) -> Iterator[Terminal]:
    """A chat with answers that never end by themselves; its folder is empty."""
    found = Terminal(artifact, "--template", "none", "-n", "100000000", "--temperature", "0", folder=tmp_path)
    yield found
    found.close()


@posix
def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.expect("template none; /help lists commands")
    terminal.expect("> ")
    terminal.type("abc\n")
    terminal.expect(r"abc\r\n(?s:.){40}")  # the echo of the keys, then the answer
    terminal.type("\x03")
    terminal.expect(r"\(stopped\)\r\n")
    terminal.expect("> ")
    terminal.type("def\n")  # the conversation goes on
    terminal.expect(r"def\r\n(?s:.){40}")
    terminal.type("\x03")
    terminal.expect(r"\(stopped\)\r\n\r\n> ")
    terminal.type("/history\n")
    terminal.expect(r"> abc\r\n(.|\r\n)*> def\r\n")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.wait() == 0


@posix
def test_ctrl_c_at_the_prompt_leaves_the_line_not_the_chat(terminal: Terminal) -> None:
    terminal.expect("> ")
    terminal.type("half a li")
    terminal.expect("half a li")
    settle()
    terminal.type("\x03")
    terminal.expect(r"\(Ctrl-D leaves\)\r\n\r\n> ")
    terminal.type("/history\n")
    terminal.expect(r"/history\r\n(?!> half)")
    terminal.expect("> ")
    terminal.type("/quit\n")
    assert terminal.wait() == 0


@posix
def test_texts_of_several_lines(terminal: Terminal) -> None:
    terminal.expect("> ")
    terminal.type("one\\\n")
    terminal.expect(r"one\\\r\n\. ")
    terminal.type("two\n")
    terminal.expect(r"two\r\n(?s:.){40}")
    terminal.type("\x03")
    terminal.expect(r"\(stopped\)\r\n\r\n> ")
    terminal.type('"""three\n')
    terminal.expect(r'"""three\r\n\. ')
    terminal.type("/history\n")  # text, within the quotes
    terminal.expect(r"/history\r\n\. ")
    terminal.type("\n")
    terminal.expect(r"\r\n\. ")
    terminal.type('four"""\n')
    terminal.expect(r'four"""\r\n(?s:.){40}')
    terminal.type("\x03")
    terminal.expect(r"\(stopped\)\r\n\r\n> ")
    terminal.type("never said\\\n")
    terminal.expect(r"\r\n\. ")
    settle()
    terminal.type("\x03")
    terminal.expect(r"\(forgotten\)\r\n\r\n> ")
    terminal.type("/help\n")
    terminal.expect(r"goes on in the next line\r\n.*several lines")
    terminal.type("/history\n")
    said = terminal.expect(r"> one\r\ntwo\r\n(?s:.*?)> three\r\n/history\r\n\r\nfour\r\n(?s:.*?)\r\n\r\n> ")
    assert "never said" not in said[0]
    terminal.type("/quit\n")
    assert terminal.wait() == 0


@posix
def test_the_window_may_change_at_any_time(terminal: Terminal) -> None:
    terminal.expect("> ")
    terminal.resize(10, 40)
    settle()
    terminal.type("abc")
    terminal.expect("abc")
    terminal.resize(40, 132)
    settle()
    terminal.type("\n")
    for i in range(20):  # while the answer comes
        terminal.resize(20 + i, 60 + i)
        terminal.expect("(?s:.){5}")
    terminal.type("\x03")
    terminal.expect(r"\(stopped\)\r\n\r\n> ")
    terminal.type("/quit\n")
    assert terminal.wait() == 0


@posix
def test_answers_are_tried_again_kept_and_taken_up(terminal: Terminal, artifact: Path, tmp_path: Path) -> None:
    terminal.expect("> ")
    terminal.type("/retry\n")
    terminal.expect("Error: there is no answer to try again; ask something first")
    terminal.type("abc\n")
    terminal.expect(r"abc\r\n")
    terminal.expect("(?s:.){40}")
    terminal.type("\x03")
    terminal.expect(r"\(stopped\)\r\n\r\n> ")
    terminal.type("/retry\n")
    terminal.expect("(?s:.){40}")
    terminal.type("\x03")
    terminal.expect(r"\(stopped\)\r\n\r\n> ")
    terminal.type("/save a talk.state\n")
    terminal.expect(r"\(saved 1 turn, \d+ tokens to a talk.state\)")
    terminal.type("/reset\n")
    terminal.expect(r"\(everything forgotten\)")
    terminal.type("/load a talk.state\n")
    terminal.expect(r"\(loaded 1 turn, \d+ tokens, template none\)")
    terminal.type("/load missing.state\n")
    terminal.expect("Error: missing.state does not exist")
    terminal.type("/nonsense\n")
    terminal.expect("there is no command '/nonsense'; /help lists them")
    terminal.type("/help\n")
    terminal.expect(r"Ctrl-C stops an answer.*\r\n\r\n> ")
    terminal.type("\x04")
    assert terminal.wait() == 0
    done = process("chat", artifact, "--load", tmp_path / "a talk.state", "--temperature", "0", stdin=b"/history\n")
    assert done.returncode == 0
    assert done.stdout.startswith(b"> abc\n")


def test_behind_a_pipe_each_line_is_a_turn(artifact: Path) -> None:
    common = ("--template", "raven", "--temperature", "0", "-n", "5")
    done = process("chat", artifact, *common, stdin=b"abc\n\n//x\n/history\n")
    assert (done.returncode, done.stderr.count(b"(cut at --max-tokens)")) == (0, 2)
    lines = done.stdout.decode("utf-8", errors="replace").split("\n")
    assert b"> abc\n" in done.stdout
    assert b"> /x\n" in done.stdout
    assert lines[0] != ""
    again = process("chat", artifact, *common, stdin=b"abc\n\n//x\n/history")  # no line break at the end
    assert again.stdout == done.stdout


SEVERAL = {
    "backslash": ("one\\\n two\\\nthree\n", ["one\n two\nthree"]),
    "quotes": ('  """one\n/help\n\n//two"""  \nthree\n', ["one\n/help\n\n//two", "three"]),
    "one line": ('"""one"""\n', ["one"]),
    "quotes within": ('say """x"""\n', ['say """x"""']),
    "open at the end": ('"""one\ntwo', ["one\ntwo"]),
    "going on at the end": ("one\\", ["one"]),
    "a slash": ("//one\\\n/two\n", ["/one\n/two"]),
    "nothing": ('"""\n"""\n\\\n\n', []),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_lines_behind_a_pipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, expected = SEVERAL[name]
    asked: list[str] = []

    class Asked:
        """A conversation that only listens."""

        template = TEMPLATES["none"]

        def ask(self, said: str, stopped: object) -> Generator[str, None, str]:
            asked.append(said)
            yield "answer"
            return "stop_text"

    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    _Terminal(Asked(), False).run()  # type: ignore[arg-type]
    assert asked == expected


def test_lines_that_are_not_utf8(artifact: Path) -> None:
    done = process("chat", artifact, "-n", "3", "--temperature", "0", stdin=b"\xff\nabc\n")
    assert done.returncode == 0
    header, error, *_ = done.stderr.decode().splitlines()
    assert "; /help lists commands" in header
    assert "text must be valid Unicode" in error
    assert done.stdout != b""


@posix
def test_ctrl_c_behind_a_pipe_stops_the_answer(artifact: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "rwkv_edge", "chat", str(artifact), "-n", "100000000"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"abc\n")
        child.stdin.close()
        assert len(child.stdout.read(100)) == 100
        child.send_signal(signal.SIGINT)
        child.stdout.read()
        assert child.wait(60) == 0
        assert child.stderr is not None
        assert b"(stopped)" in child.stderr.read()


@posix
def test_standard_input_that_is_closed(artifact: Path) -> None:
    line = f"'{sys.executable}' -m rwkv_edge chat '{artifact}' <&-"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=120)
    assert "standard input is closed" in done.stderr
    assert done.returncode == 2


REFUSED = {
    "system": (("--template", "none", "--system", "x"), None),
    "template": (("--template", "llama"), "'llama' is not one of 'auto', 'world', 'g1', 'g1-think', 'raven', 'none'"),
    "snapshot": (("--load", "missing.state"), "missing.state does not exist"),
    "tokens": (("-n", "0"), "0 is not in the range x>=1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_cannot_be_meant(name: str, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = REFUSED[name]
    if message is None:
        done = process("chat", artifact, *arguments, stdin=b"")
        assert done.returncode == 0
    else:
        assert message in refusal(capsys, "chat", artifact, *arguments)


def test_no_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "artifact is the folder" in refusal(capsys, "chat", tmp_path / "none")
