"""Every example runs, as its first lines say, and does what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import STEP_ONLY

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.cli import run
from rwkv_edge.evaluation.demo import DEMO_CHECKPOINT
from rwkv_edge.models.versions import model_from_checkpoint
from rwkv_edge.runtime.snapshot import read_snapshot

EXAMPLES = Path(__file__).parents[1] / "examples"
RUN_HERE = {"export_and_run", "int8", "sensor_loop", "serve_batch", "tuned_state"}
RUN_ELSEWHERE = {"triton_client"}  # tests/exporters/test_triton.py


def ran(name: str, *arguments: str | Path, stdin: bytes = b"") -> tuple[str, str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, for batches of any size."""
    folder = tmp_path_factory.mktemp("examples") / "demo"
    assert run(["export", str(DEMO_CHECKPOINT), "-o", str(folder), "--batch", "dynamic", *STEP_ONLY]) == 0
    return folder


def test_all_of_them_are_short_and_tested() -> None:
    found = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert set(found) == RUN_HERE | RUN_ELSEWHERE
    assert max(text.count("\n") for text in found.values()) < 60


@pytest.mark.parametrize("name", sorted(RUN_HERE | RUN_ELSEWHERE))
def test_without_arguments_they_say_how_they_are_called(name: str) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLES / f"{name}.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"python examples/{name}.py " in done.stderr
    assert "Traceback" not in done.stderr


def test_export_and_run(tmp_path: Path) -> None:
    out, _ = ran("export_and_run", DEMO_CHECKPOINT, tmp_path / "artifact", "The sea is")
    assert out.startswith("RWKV-7, ")
    assert "The sea is" in out
    assert re.search(r"\d+ tokens/s\n$", out)


def test_sensor_loop_goes_on_after_a_restart(artifact: Path, tmp_path: Path) -> None:
    text = (b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 4) + b"\x00 and on"
    whole, _ = ran("sensor_loop", artifact, tmp_path / "whole.state", stdin=text)
    first, _ = ran("sensor_loop", artifact, tmp_path / "parts.state", stdin=text[:100])
    second, _ = ran("sensor_loop", artifact, tmp_path / "parts.state", stdin=text[100:])
    assert whole.startswith("going on after 0 bytes\n")
    assert second.startswith("going on after 100 bytes\n")
    surprises = [line for line in whole.splitlines() if "not expected" in line]
    assert len(surprises) == 1
    assert rf"byte {text.index(0)}: b'\x00'" in surprises[0]
    assert [line for line in (first + second).splitlines() if "not expected" in line] == surprises
    kept, expected = read_snapshot(tmp_path / "parts.state"), read_snapshot(tmp_path / "whole.state")
    assert kept.streams == expected.streams
    assert all((kept.arrays[name] == array).all() for name, array in expected.arrays.items())


def test_serve_batch_gives_each_prompt_its_own_text(artifact: Path) -> None:
    prompts = [b"ROMEO:\n", b"The king\n", b"A\n", b"O, what a\n", b"JULIET:\n"]
    out, errors = ran("serve_batch", artifact, "3", "20", stdin=b"".join(prompts))
    replies = dict(re.findall(r"^(\d): (.*(?:\n(?!\d: ).*)*)", out, re.MULTILINE))
    assert sorted(replies) == ["0", "1", "2", "3", "4"]
    assert all(replies[str(i)].startswith(prompt.decode().strip()) for i, prompt in enumerate(prompts))
    assert errors == "40 steps\n"  # five texts of 20 tokens, three at a time
    alone, _ = ran("serve_batch", artifact, "3", "20", stdin=prompts[0])
    assert alone.strip() == f"0: {replies['0']}".strip()


def test_int8_is_smaller_and_nearly_as_good(artifact: Path, tmp_path: Path) -> None:
    lines = "ROMEO:\nWhat say you to my suit?\n\nJULIET:\nI would not for the world they saw thee here.\n\n"
    (tmp_path / "corpus.txt").write_text(lines * 8, encoding="utf-8")
    (tmp_path / "book.txt").write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n" * 4, "utf-8")
    out, _ = ran("int8", artifact, tmp_path / "corpus.txt", tmp_path / "book.txt", tmp_path / "w8a8")
    before, after = (float(size) for size in re.findall(r": ([\d.]+) MB of weights", out))
    assert after < before / 2
    found = re.search(r"perplexity ([+-][\d.]+)%; both expect the same token at ([\d.]+)% of 243 places", out)
    assert found is not None, out
    assert abs(float(found[1])) < 5
    assert float(found[2]) > 90
    assert "w8a8" in (tmp_path / "w8a8" / "manifest.json").read_text(encoding="utf-8")


def test_tuned_state_changes_the_text(tmp_path: Path) -> None:
    spec = model_from_checkpoint(open_checkpoint(DEMO_CHECKPOINT)).spec
    size = (spec.n_head, spec.head_size, spec.head_size)
    tuned = {
        f"blocks.{i}.att.time_state": torch.randn(size, generator=torch.Generator().manual_seed(i))
        for i in range(spec.n_layer)
    }
    torch.save(tuned, tmp_path / "state.pth")
    out, _ = ran("tuned_state", DEMO_CHECKPOINT, tmp_path / "state.pth", tmp_path / "artifact", "The sea is")
    begin, first, second = out.splitlines()
    assert begin.startswith("every stream begins with the state ")
    assert first.partition(": ")[2] != second.partition(": ")[2]
