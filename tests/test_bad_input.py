"""What users get wrong, and what happens to them: one sentence, an exit code, and nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import STEP_ONLY, content, process, refusal, sentence, weights, write_artifact, write_checkpoint

from rwkv_edge.cli import run
from rwkv_edge.evaluation.synthetic import Shape7, random_v7, save_pth

posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported once; beside it lies its checkpoint, artifact.pth. Not to be written to."""
    return write_artifact(tmp_path_factory.mktemp("made") / "artifact")


@pytest.fixture
def checkpoint(artifact: Path) -> Path:
    return artifact.with_suffix(".pth")


# Arguments

ARGUMENTS = {
    "unknown provider": (1, "generate A a --provider Foo", r"'Foo' is not available here; available are .*CPUExec"),
    "batch 0": (2, "export C --batch 0", r"'0' is neither a number of streams from 1 on nor 'dynamic'"),
    "batch of text": (2, "export C --batch many", r"'many' is neither a number"),
    "precision": (2, "export C --precision int3", r"'int3' is not one of 'fp32', 'fp16', 'bf16'"),
    "chunk": (2, "export C -o new --chunk 9999", r"a chunk must have from 2 to \d+ tokens, not 9999"),
    "threads": (2, "generate A a --threads 1000000", r"threads must be 0 \(automatic\) or up to 256, not 1000000"),
    "negative threads": (2, "generate A a --threads -1", r"threads must be 0"),
    "no tokens": (2, "generate A a -n 0", r"0 is not in the range x>=1"),
    "temperature": (2, "generate A a --temperature nan", r"temperature must be .*, not nan"),
    "top-p": (2, "generate A a --top-p 2", r"top_p must be above 0 and at most 1, not 2"),
    "seed": (2, "generate A a --seed -1", r"seed must be a whole number of at least 0, not -1"),
    "bias": (2, "generate A a --logit-bias x", r"a logit bias is TOKEN=BIAS, such as 0=-inf, not 'x'"),
    "bias of no token": (2, f"generate A a --logit-bias {10**20}=1", r"there is no token 10{20}"),
    "stop token": (2, "generate A a --stop-token 256", r"stop tokens must be from 0 to 255, .*, not 256"),
    "tokenizer": (1, "generate A a --tokenizer missing.json", r"there is no file 'missing.json'"),
    "tokenizer of another model": (
        1,
        "export C -o new --tokenizer world",
        r"65\d+, but the model's vocabulary has 256",
    ),
    "tolerance": (2, "verify A C --tolerance 0", r"0.* is not in the range x>0"),
    "text": (1, "verify A C --text missing.txt", r"missing.txt cannot be read: No such file"),
    "command": (2, "exprot C", r"No such command 'exprot'"),
    "option": (2, "export C --presicion fp16", r"No such option:? '?--presicion"),
    "checkpoint as artifact": (1, "generate C a", r"artifact.pth is a file; an artifact is the folder that"),
    "swapped": (1, "verify C A", r"artifact.pth is a file; an artifact is the folder that 'rwkv-edge export' wrote"),
    "artifact as checkpoint": (1, "export A", r"artifact should hold model.safetensors .*; it is an exported artifact"),
    "artifact twice": (1, "verify A A", r"it is an exported artifact"),
    "no artifact": (1, "generate missing a", r"missing does not exist; an artifact is the folder"),
    "a part of an artifact": (1, "info A/step.onnx", r"step.onnx should end in .pth.*, but ends in '.onnx'"),
    "another folder": (1, "generate . a", r" has no manifest.json; an artifact is the folder"),
    "folder as prompt": (1, "verify A C --text A", r"artifact cannot be read: Is a directory"),
    "target is a file": (1, "export C -o C", r"artifact.pth exists and is a file"),
    "target below a file": (1, "export C -o C/a/b", r"artifact.pth/a/b cannot be written: Not a directory"),
    "target is the checkpoint's folder": (1, "export C -o D", r"exists and is a folder .*, so it is left alone"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_cannot_be_meant(
    name: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = content(artifact.parent)
    code, line, pattern = ARGUMENTS[name]
    places = {"A": str(artifact), "C": str(artifact.with_suffix(".pth")), "D": str(artifact.parent)}
    arguments = [re.sub(r"^[ACD](?=$|/)", lambda m: places[m[0]], word) for word in line.split()]
    assert re.search(pattern, refusal(capsys, *arguments))
    assert run(arguments) == code
    assert content(artifact.parent) == before
    assert not list(tmp_path.iterdir())


def test_another_checkpoint_fails_verification(artifact: Path, tmp_path: Path) -> None:
    """Both ways: the dimensions differ, or the values do; and the exit code says so."""
    same_shape = write_checkpoint(tmp_path / "other.pth", seed=1)
    assert run(["verify", str(artifact), str(artifact.with_suffix(".pth")), "--tokens", "4"]) == 0
    assert run(["verify", str(artifact), str(same_shape), "--tokens", "4"]) == 1
    other_shape = save_pth(random_v7(Shape7(1, 64)), tmp_path / "short.pth")
    assert run(["verify", str(artifact), str(other_shape), "--tokens", "4"]) == 1


def test_an_error_after_the_prompt_was_printed(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line is ended, and nothing but the error is said."""
    assert run(["generate", str(artifact), "abc", "--logit-bias", "999=1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "abc\n"
    assert "token ids of logit_bias must be from 0 to 255" in sentence(2, printed.err)


def test_a_batch_that_is_not_the_session_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = write_artifact(tmp_path / "wide", 0, "--batch", "3")
    assert "the model was exported for batch 3, not 1; export it with" in refusal(capsys, "generate", wide, "a")


# Values


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_exported(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {name: weights()[name].clone() for name in ("blocks.1.ffn.key.weight", "ln_out.bias")}
    for tensor in bad.values():
        tensor.view(-1)[5] = value
    path = save_pth(weights() | bad, tmp_path / "model.pth")
    assert run(["export", str(path), "-o", str(tmp_path / "artifact"), *STEP_ONLY]) == 0
    warning = capsys.readouterr().err
    assert warning == f"Warning: {path}: NaN or infinity in blocks.1.ffn.key.weight, ln_out.bias\n"
    assert run(["info", str(tmp_path / "artifact"), "--no-probe"]) == 0
    assert "NaN or infinity in blocks.1.ffn.key.weight, ln_out.bias" in capsys.readouterr().out
    assert run(["generate", str(tmp_path / "artifact"), "a", "-n", "2"]) == 1
    assert "NaN or +inf" in sentence(1, capsys.readouterr().err)
    assert run(["bench", str(tmp_path / "artifact"), "--tokens", "2", "--prompt", "2", "--runs", "1"]) == 1
    assert "that 'all logits are finite' failed" in sentence(1, capsys.readouterr().err)
    assert run(["quantize", str(tmp_path / "artifact"), "-o", str(tmp_path / "w8")]) == 1
    assert "'blocks.1.ffn.key' holds NaN or infinity, which no integer stands for" in sentence(
        1, capsys.readouterr().err
    )
    assert not (tmp_path / "w8").exists()


def test_weights_beyond_the_precision_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(tmp_path / "model.pth", head__weight=torch.full((256, 64), 1e6))
    assert run(["export", str(path), "-o", str(tmp_path / "a"), "--precision", "fp16", *STEP_ONLY]) == 0
    assert "NaN or infinity in head (overflows float16)" in capsys.readouterr().err


# Targets


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_targets_that_nobody_can_write(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "/proc/artifact cannot be written: " in refusal(capsys, "export", checkpoint, "-o", "/proc/artifact")
    assert "/proc/1/a/b cannot be written: " in refusal(capsys, "export", checkpoint, "-o", "/proc/1/a/b")
    long = tmp_path / ("x" * 250)  # itself short enough, but not its scratch folder
    assert "File name too long" in refusal(capsys, "export", checkpoint, "-o", long)
    if os.geteuid() == 0:
        return  # who is root may write everywhere
    (tmp_path / "locked").mkdir(0o500)
    assert "Permission denied" in refusal(capsys, "export", checkpoint, "-o", tmp_path / "locked" / "artifact")


@contextlib.contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file system of its own, where mounting is allowed."""
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or mount is None or subprocess.run(command).returncode:
        pytest.skip("mounting a small disk needs root on Linux")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(
    artifact: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        shutil.copytree(artifact, disk / "artifact")
        before = content(disk)
        command = ["export", str(checkpoint), "-o", str(disk / "artifact")]
        assert run(command) == 1
        assert re.search(r"artifact needs [\d.]+ MB, but only 0\.\d MB are free", sentence(1, capfd.readouterr().err))
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 40))
        assert run(command) == 1  # now it runs full while writing
        assert "artifact cannot be written: the disk is full" in sentence(1, capfd.readouterr().err)
        assert content(disk) == before
        assert [path.name for path in disk.iterdir()] == ["artifact"]


LIMITED = """
import resource, sys
from rwkv_edge.cli import run
for limit in (100_000, 10_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    print(run(sys.argv[1:]), flush=True)
"""


@posix
def test_files_that_may_not_grow(artifact: Path, checkpoint: Path, tmp_path: Path) -> None:
    """100 kB cut the weights, 10 kB the graph."""
    target = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    before = content(tmp_path)
    command = [sys.executable, "-c", LIMITED, "export", str(checkpoint), "-o", str(target), *STEP_ONLY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "1\n1\n"), done.stderr
    for error in done.stderr.splitlines(keepends=True):
        assert f"{target} cannot be written: File too large; nothing was changed" in sentence(1, error)
    assert content(tmp_path) == before


# Text


def test_a_prompt_that_is_not_utf8(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = process("generate", artifact, "-", stdin=b"ab\xff")
    assert "standard input is not UTF-8: byte 0xff at offset 2" in sentence(done.returncode, done.stderr.decode())
    assert (done.returncode, done.stdout) == (2, b"")
    (tmp_path / "latin1.txt").write_bytes("Grüße".encode("latin-1"))
    found = refusal(capsys, "verify", artifact, artifact.with_suffix(".pth"), "--text", tmp_path / "latin1.txt")
    assert "latin1.txt is not UTF-8: byte 0xfc at offset 2; convert it first" in found


@posix
def test_arguments_that_are_not_utf8(artifact: Path) -> None:
    done = process("generate", artifact, b"ab\xff")
    assert "the prompt is not UTF-8 (character 2)" in sentence(done.returncode, done.stderr.decode())
    assert (done.returncode, done.stdout) == (2, b"")
    done = process("info", b"\xff.pth")
    assert r"\udcff.pth cannot be read: No such file" in sentence(done.returncode, done.stderr.decode())


@posix
def test_standard_streams_that_are_closed(artifact: Path, checkpoint: Path, tmp_path: Path) -> None:
    command = f"'{sys.executable}' -m rwkv_edge"
    shell = [
        f"{command} generate '{artifact}' - <&-",
        f"{command} generate '{artifact}' a -n 2 >&-",
        f"{command} export '{checkpoint}' -o '{tmp_path / 'new'}' --chunk 0 2>&-",
    ]
    done = [subprocess.run(line, shell=True, capture_output=True, text=True, timeout=120) for line in shell]
    assert [one.returncode for one in done] == [2, 0, 0], done
    assert "standard input is closed" in sentence(2, done[0].stderr)
    assert "Traceback" not in done[1].stderr


@posix
def test_a_reader_that_leaves(artifact: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "rwkv_edge", "generate", str(artifact), "a", "-n", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.read(1) == b"a"
        child.stdout.close()
        assert child.wait(60) == 1
        assert child.stderr.read() == b""


def test_a_reader_that_leaves_a_program(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` returns whatever happens."""

    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert run(["info", str(artifact), "--no-probe"]) == 1


def test_a_terminal_of_another_encoding(artifact: Path) -> None:
    command = [sys.executable, "-m", "rwkv_edge", "generate", str(artifact), "中", "-n", "1"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment)
    assert (done.returncode, done.stdout[:6]) == (0, rb"\u4e2d")


# Signals


def stopped(child: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code as a shell reports it, and stderr, after Ctrl-C."""
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode, stderr


def wait_for(pattern: str, folder: Path, child: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while not list(folder.glob(pattern)):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < until
        time.sleep(0.001)


@posix
@pytest.mark.parametrize("begun", ["step.onnx", "weights.bin"])
def test_ctrl_c_during_an_export(begun: str, artifact: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(artifact, tmp_path / "target" / "artifact"))
    before = content(target.parent)
    path = save_pth(random_v7(Shape7(4, 512, 4096), dtype=torch.float16), tmp_path / "model.pth")
    options = ["--tokenizer", "none", *STEP_ONLY]
    command = [sys.executable, "-m", "rwkv_edge", "export", str(path), "-o", str(target), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        wait_for(f".artifact.partial-*/{begun}", target.parent, child)
        assert stopped(child) == (130, "\nstopped\n")
    assert content(target.parent) == before
    assert [entry.name for entry in target.parent.iterdir()] == ["artifact"]


@posix
def test_ctrl_c_during_generation(artifact: Path) -> None:
    command = [sys.executable, "-m", "rwkv_edge", "generate", str(artifact), "a", "-n", "100000000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as child:
        assert child.stdout is not None
        child.stdout.read(200)
        code, stderr = stopped(child)
    assert code == 130
    assert re.fullmatch(r"\d+ tokens, [\d.]+ tokens/s, prompt of 1 token in [\d.]+ s\n\nstopped\n", stderr)


KILLED = """
import os, random, signal, sys, time
import rwkv_edge.exporters.onnx, rwkv_edge.cli.export, rwkv_edge.checkpoints.pth  # before the forks: it takes a second
from rwkv_edge.cli import run
checkpoint, folder, moments = sys.argv[1], sys.argv[2], random.Random(1)
for i in range(10):
    child = os.fork()
    if child == 0:
        os._exit(run(["export", checkpoint, "-o", f"{folder}/{i}/artifact", "--chunk", "0"]))
    scratch = f"{folder}/{i}/.artifact.partial-{child}"
    while not os.path.exists(scratch):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    time.sleep(moments.uniform(0, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@posix
def test_kill_during_an_export(checkpoint: Path, artifact: Path, tmp_path: Path) -> None:
    for i in range(5):  # half of them over an artifact that is there
        shutil.copytree(artifact, tmp_path / str(i) / "artifact")
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLED), str(checkpoint), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    leftovers = 0
    for i in range(10):
        target = tmp_path / str(i) / "artifact"
        if not target.exists():
            assert run(["generate", str(target), "a", "-n", "1"]) == 1
        else:
            assert content(target).keys() == content(artifact).keys()
            assert run(["generate", str(target), "a", "-n", "1"]) == 0
        leftovers += len(list(target.parent.glob(".artifact.partial-*")))
        assert run(["export", str(checkpoint), "-o", str(target), *STEP_ONLY]) == 0
        assert [path.name for path in target.parent.iterdir()] == ["artifact"]
        assert run(["generate", str(target), "a", "-n", "1"]) == 0
    assert leftovers, "no export was killed half-way: the moments prove nothing"
