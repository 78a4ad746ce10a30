"""The model that ships with the package: small enough, good enough, and right in every precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from parity import exported_session, relative

from rwkv_edge.cli import run
from rwkv_edge.evaluation.demo import DEMO_CHECKPOINT
from rwkv_edge.evaluation.perplexity import likelihood


def test_size_of_the_file() -> None:
    assert DEMO_CHECKPOINT.stat().st_size <= 8_000_000
    assert (DEMO_CHECKPOINT.parent / "README.md").is_file()


def test_demo_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "-o", str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr().out
    assert "passed" in printed
    assert "300 bytes" in printed
    assert (tmp_path / "demo" / "manifest.json").is_file()


@pytest.mark.parametrize(("precision", "count"), [("fp32", 2000), ("fp16", 500), ("bf16", 500)])
def test_held_out_bits_per_byte(precision: str, count: int, shared_text: Path, tmp_path: Path) -> None:
    """Processors take their time for 16 bits."""
    text = (shared_text / "tinyshakespeare.txt").read_bytes()
    held_out = list(text[len(text) * 9 // 10 :])[: count + 1]  # the whole 10 % is in benchmarks/demo_model.py
    session = exported_session(DEMO_CHECKPOINT, tmp_path / "artifact", precision=precision, tokenizer="bytes")
    assert likelihood(session, held_out, count).bits_per_byte <= 2.2


def test_half_precisions_follow_fp32(shared_text: Path, tmp_path: Path) -> None:
    text = (shared_text / "tinyshakespeare.txt").read_bytes()
    tokens = list(text[-256:])
    logits = {}
    for precision in ("fp32", "fp16", "bf16"):
        session = exported_session(DEMO_CHECKPOINT, tmp_path / precision, precision=precision, tokenizer="bytes")
        state = session.initial_state()
        logits[precision] = np.stack([session.step([token], state)[0] for token in tokens])
    for precision in ("fp16", "bf16"):
        assert relative(logits[precision], logits["fp32"]) < 2e-2
        same = logits[precision].argmax(-1) == logits["fp32"].argmax(-1)
        assert same.mean() >= 0.97
