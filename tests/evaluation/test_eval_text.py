"""Perplexity, bits per byte and comparisons: against the `rwkv` package's logits in torch, and what must not matter."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle
from tiny import SHAPE, refusal, write_artifact, write_checkpoint

from rwkv_edge.artifact import Artifact
from rwkv_edge.cli import run
from rwkv_edge.errors import InputError
from rwkv_edge.evaluation.eval_run import EvalOptions, EvalReport, evaluate
from rwkv_edge.evaluation.eval_windows import LOGITS_BYTES, Blocks, batches_of_windows, batching, windows_of_text
from rwkv_edge.evaluation.perplexity import likelihood, log_probabilities, token_losses
from rwkv_edge.evaluation.synthetic import Shape7, random_v7, save_pth
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.session import open_session

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want. " * 3
)
MODELS = {"4": "tiny-rwkv-4v0-660K.pth", "5.2": "tiny-rwkv-5v2-730K.pth", "7": "tiny-rwkv-7v0-834K.pth"}
CHUNKED = ("--batch", "dynamic", "--chunk", "16", "--chunk", "32", "--all-logits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same random model with single steps and with scoring chunks, its half-precision form, and another model."""
    folder = tmp_path_factory.mktemp("eval")
    write_artifact(folder / "steps", 0, "--batch", "dynamic")
    write_artifact(folder / "one", 0)
    write_artifact(folder / "three", 0, "--batch", "3")
    write_artifact(folder / "half", 0, "--precision", "fp16")
    write_artifact(folder / "other", 1)
    assert run(["export", str(folder / "one.pth"), "-o", str(folder / "chunks"), *CHUNKED]) == 0
    return folder


def options(**changes: Any) -> EvalOptions:
    return EvalOptions(**{"text": TEXT, "window": 64, "threads": 1, **changes})


def found(report: EvalReport) -> tuple[float, int]:
    assert report.score is not None
    return report.score.nats, report.score.tokens


# Against others


def torch_losses(logits: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    rows = torch.from_numpy(logits).double()
    return torch.nn.functional.cross_entropy(rows, torch.tensor(list(targets)), reduction="none").numpy()


def oracle_logits(oracle: Oracle, tokens: Sequence[int], window: int, warm_up: int) -> tuple[np.ndarray, list[int]]:
    """Logits and targets of all scored tokens, by a loop of its own: one window after another, one token at a time."""
    rows, targets, at = [], [], 1
    while at < len(tokens):
        start = max(0, at - 1 - warm_up) if at > 1 else 0
        stop = min(len(tokens), start + window + 1)
        logits, _ = oracle.steps(list(tokens[start : stop - 1]))
        rows.append(logits[at - 1 - start :])
        targets += tokens[at:stop]
        at = stop
    return np.concatenate(rows), targets


@pytest.fixture(scope="module")
def scored(shared_models: Path, shared_text: Path) -> Callable[[str], dict[tuple[int, int], np.ndarray]]:
    """By version: the `rwkv` package's losses by window and warm-up, found once for all graphs."""
    tokens = scored_text(shared_text).encode()

    @cache
    def losses(version: str) -> dict[tuple[int, int], np.ndarray]:
        oracle = Oracle(shared_models / MODELS[version], version)
        return {how: torch_losses(*oracle_logits(oracle, tokens, *how)) for how in ((100, 40), (80, 0))}

    return losses


def scored_text(shared_text: Path) -> str:
    return (shared_text / "tinyshakespeare.txt").read_text()[5000:5250]


@pytest.mark.parametrize("version", MODELS)
@pytest.mark.parametrize("graphs", [CHUNKED, ("--chunk", "0")], ids=["chunks", "steps"])
def test_the_rwkv_package_agrees(
    version: str,
    graphs: tuple[str, ...],
    scored: Callable[[str], dict[tuple[int, int], np.ndarray]],
    shared_models: Path,
    shared_text: Path,
    tmp_path: Path,
) -> None:
    assert run(["export", str(shared_models / MODELS[version]), "-o", str(tmp_path / "artifact"), *graphs]) == 0
    for (window, warm_up), losses in scored(version).items():
        choices = options(text=scored_text(shared_text), window=window, warm_up=warm_up)
        report = evaluate(tmp_path / "artifact", choices)
        assert report.score is not None
        assert len(losses) == report.score.tokens == report.score.nbytes == 249
        assert report.score.nats == pytest.approx(losses.sum(), rel=1e-5)
        assert report.score.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
        assert report.score.bits_per_byte == pytest.approx(losses.mean() / math.log(2), rel=1e-5)


def test_a_comparison_by_torch(shared_models: Path, shared_text: Path, tmp_path: Path) -> None:
    """Of two models of different versions on the same bytes."""
    text = (shared_text / "tinyshakespeare.txt").read_text()[9000:9200]
    sides = []
    for version in ("7", "5.2"):
        checkpoint = shared_models / MODELS[version]
        assert run(["export", str(checkpoint), "-o", str(tmp_path / version), "--chunk", "0"]) == 0
        sides.append(oracle_logits(Oracle(checkpoint, version), text.encode(), 100, 20))
    (logits, targets), (reference, _) = sides
    ours, theirs = (torch.from_numpy(x).double().log_softmax(-1) for x in (logits, reference))
    divergence = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).numpy()
    change = torch_losses(logits, targets) - torch_losses(reference, targets)
    report = evaluate(tmp_path / "7", options(text=text, window=100, warm_up=20, compare=tmp_path / "5.2"))
    comparison = report.comparison
    assert comparison is not None
    assert comparison.kl_mean == pytest.approx(divergence.mean(), rel=1e-5)
    assert comparison.kl_max == pytest.approx(divergence.max(), rel=1e-5)
    assert comparison.top1 == pytest.approx((logits.argmax(-1) == reference.argmax(-1)).mean(), abs=1e-9)
    assert comparison.perplexity_change == pytest.approx(100 * (math.exp(change.mean()) - 1), rel=1e-5)
    blocks = [part for w in np.split(change, [100, 180]) for part in (w[:64], w[64:]) if part.size]
    residuals = np.array([b.sum() - change.mean() * b.size for b in blocks])
    error = math.sqrt(len(blocks) / (len(blocks) - 1) * (residuals**2).sum()) / change.size
    expected = 100 * math.exp(change.mean()) * error
    assert comparison.perplexity_change_error == pytest.approx(expected, rel=1e-4)
    assert comparison.reference.perplexity == pytest.approx(math.exp(torch_losses(reference, targets).mean()), rel=1e-5)


def test_extreme_logits() -> None:
    logits = np.array([[1e4, 0.0, -1e4], [-3e38, 3e38, 0.0], [0.0, 0.0, 0.0]], np.float32)
    losses = token_losses(logits, np.array([1, 1, 2]))
    assert losses.tolist() == [1e4, 0.0, math.log(3)]
    assert np.exp(log_probabilities(logits)).sum(-1).tolist() == [1, 1, 1]
    assert np.isnan(token_losses(np.array([[np.nan, 0.0]], np.float32), np.array([1]))).all()


# What must not matter


@pytest.mark.parametrize(("window", "warm_up"), [(64, 0), (50, 20), (1000, 0), (0, 0), (33, 32)])
def test_neither_batch_nor_graphs_matter(window: int, warm_up: int, folder: Path) -> None:
    text = TEXT[:200]
    batches = (None, 1) if window == 0 else (None, 1, 3, 7)
    reports = [
        evaluate(folder / name, options(text=text, window=window, warm_up=warm_up, batch=batch))
        for name in ("steps", "chunks")
        for batch in batches
    ]
    fixed = options(text=text, window=window, warm_up=warm_up)
    reports += [evaluate(folder / name, fixed) for name in ("one", "three")]
    nats, tokens = found(reports[0])
    assert tokens == len(text) - 1
    assert nats / tokens > 1
    for report in reports[1:]:
        assert found(report) == (pytest.approx(nats, rel=1e-6), tokens)
        assert report.protocol is not None
        assert report.protocol.windows == reports[0].protocol.windows  # type: ignore[union-attr]


def test_carrying_the_state_is_one_long_window(folder: Path) -> None:
    session = open_session(folder / "one", threads=1)
    expected = likelihood(session, list(TEXT.encode()), len(TEXT) - 1)
    for name, window in itertools.product(("chunks", "one"), (0, len(TEXT) - 1, 5000)):
        report = evaluate(folder / name, options(window=window))
        assert found(report)[0] == pytest.approx(expected.nats, rel=1e-6)
        assert report.protocol is not None
        assert (report.protocol.windows, report.protocol.state) == (1, "reset" if window else "carried")
    assert found(evaluate(folder / "one", options()))[0] != pytest.approx(expected.nats, rel=1e-6)


def test_windows() -> None:
    for count, window in itertools.product((2, 3, 10, 101), (1, 2, 7, 100, 200)):
        for warm_up in {0, 1, window // 2, window - 1} & set(range(window)):
            windows = windows_of_text(count, window, warm_up)
            assert [t for w in windows for t in range(w.first, w.stop)] == list(range(1, count))
            assert all(w.stop - 1 - w.start <= window for w in windows)
            assert all(w.first - 1 - w.start == min(warm_up, w.first - 1) for w in windows[1:])
            assert all(w.stop - 1 - w.start == window for w in windows[1:-1] if w.start)
            batches = list(batches_of_windows(windows, 3))
            assert [w for batch in batches for w in batch] == windows
            assert all(len(batch) <= 3 and len({w.form for w in batch}) == 1 for batch in batches)


def test_logits_that_are_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for vocab, chunks, rows in itertools.product((256, 65536), ([], [64], [64, 256]), (None, 1)):
        choice = batching(vocab, chunks, rows)
        assert choice.rows * choice.part * vocab * 4 <= LOGITS_BYTES
        assert choice.part == (max(chunks) if chunks else min(32, LOGITS_BYTES // (4 * vocab * choice.rows)))
    assert batching(256, [], 10**6).part == 1
    seen: list[tuple[int, ...]] = []
    score = OrtSession.score

    def watched(self: OrtSession, tokens: Any, state: Any) -> np.ndarray:
        logits = score(self, tokens, state)
        seen.append(logits.shape)
        return logits

    monkeypatch.setattr(OrtSession, "score", watched)
    evaluate(folder / "chunks", options(window=0))
    assert seen == [(1, 32, 256)] * math.ceil((len(TEXT) - 1) / 32)
    seen.clear()
    evaluate(folder / "three", options(window=100, compare=folder / "one", batch=3))
    assert {(shape[0], shape[1]) for shape in seen} == {(3, 32), (1, 32), (3, 4), (1, 4), (3, 23), (1, 23)}


# Comparisons


def test_an_artifact_with_itself(folder: Path) -> None:
    for name in ("chunks", "one", "half"):
        report = evaluate(folder / name, options(compare=folder / name))
        assert report.comparison is not None
        found = report.comparison
        assert (found.kl_mean, found.kl_max, found.top1, found.perplexity_change) == (0, 0, 1, 0)
        assert (found.kl_error, found.perplexity_change_error) == (0, 0)
        assert found.reference == report.score


def test_a_comparison_turned_around(folder: Path) -> None:
    forth = evaluate(folder / "other", options(compare=folder / "one")).comparison
    back = evaluate(folder / "chunks", options(compare=folder / "other")).comparison
    assert forth is not None
    assert back is not None
    assert (1 + forth.perplexity_change / 100) * (1 + back.perplexity_change / 100) == pytest.approx(1, rel=1e-5)
    assert forth.top1 == back.top1 < 0.5
    assert forth.kl_mean > 0.1
    near = evaluate(folder / "half", options(compare=folder / "one")).comparison
    assert near is not None
    assert 0 < near.kl_mean < 1e-3
    assert near.top1 > 0.9
    assert near.perplexity_change_error is not None
    assert 0 < near.perplexity_change_error < 1


def test_standard_error_is_that_of_many_texts() -> None:
    """Correlated losses: the error by blocks is near the spread of the mean, that by tokens is far too small."""
    draw = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(300):
        tokens = np.repeat(draw.normal(size=200), 16) + draw.normal(size=3200)
        sums = tokens.reshape(-1, 64).sum(-1)
        blocks = Blocks(sums[:, None], np.full(50, 64), np.zeros(1))
        means.append(blocks.mean(0))
        error = blocks.standard_error(sums)
        assert error is not None
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    assert Blocks(np.ones((1, 1)), np.array([64]), np.ones(1)).standard_error(np.ones(1)) is None


# The command


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book").write_text(TEXT)
    command = ["eval", str(folder / "chunks"), "--text", str(tmp_path / "book"), "--window", "64", "--threads", "1"]
    assert run(command) == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # no progress bar without a terminal
    assert f"book: {len(TEXT) - 1} tokens of {len(TEXT) - 1} bytes predicted" in printed.out
    assert "windows of 64 tokens, each beginning with the zero state, stride 64, no warm-up" in printed.out
    assert "logits by graphs of 32 tokens" in printed.out
    assert run([*command, "--json", "--compare", str(folder / "half"), "--max-tokens", "70", "--warm-up", "8"]) == 0
    data = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert data["kind"] == "evaluation"
    assert data["artifact"]["model_hash"] == Artifact.open(folder / "chunks").manifest.model_hash
    assert data["reference"]["precision"] == "fp16"
    assert data["score"]["tokens"] == data["comparison"]["tokens"] == 69
    assert data["protocol"]["stride"] == 56
    assert abs(data["comparison"]["perplexity_change"]) < 0.1
    assert run([*command, "--window", "0"]) == 0
    assert "one window, beginning with the zero state, which is carried to the end" in capsys.readouterr().out


def test_progress_counts_every_token(folder: Path) -> None:
    told: dict[str, list[int]] = {}

    def start(name: str, length: int) -> Any:
        told[name] = [length]
        return told[name].append

    evaluate(folder / "chunks", options(window=50, warm_up=20), start)
    length, *steps = told["text"]
    assert length == sum(steps) == len(TEXT) - 1
    assert len(steps) > 1


def test_overlap_with_the_calibration_is_said(folder: Path) -> None:
    report = evaluate(
        folder / "one", options(), overlap=lambda artifact, text: [f"{artifact.path.name} saw {len(text)} bytes"]
    )
    assert report.warnings == (f"one saw {len(TEXT)} bytes",)
    assert report.to_text().endswith(f"\nWarning: one saw {len(TEXT)} bytes")


def test_an_artifact_calibrated_on_the_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx_graphsurgeon", reason="onnx-graphsurgeon is not installed")
    words = np.random.default_rng(0).integers(ord("a"), ord("z"), (2, 6000), dtype=np.uint8)
    for name, part in zip(("seen", "unseen"), words, strict=True):
        (tmp_path / name).write_bytes(part.tobytes())
    one, calibration = str(folder / "one"), str(tmp_path / "calibration.json")
    assert run(["calibrate", one, "--text", str(tmp_path / "seen"), "-o", calibration, "--length", "64"]) == 0
    made = tmp_path / "quantized"
    assert run(["quantize", one, "--calibration", calibration, "--scheme", "w8a8", "-o", str(made)]) == 0
    capsys.readouterr()
    for name, said in (("seen", True), ("unseen", False)):
        command = ["eval", str(made), "--text", str(tmp_path / name), "--max-tokens", "100", "--compare", one, "--json"]
        assert run(command) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["artifact"]["quantization"] == "w8a8"
        assert data["reference"]["quantization"] is None
        assert bool(data["warnings"]) == said
    assert run(["eval", str(made), "--text", str(tmp_path / "seen"), "--max-tokens", "100"]) == 0
    assert "Warning: 100 % of the text is in what quantized was calibrated on" in capsys.readouterr().out


def test_refusals(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book").write_text(TEXT)
    (tmp_path / "a").write_text("a")
    (tmp_path / "latin").write_bytes(b"Gr\xfc\xdfe")
    save_pth(random_v7(Shape7(1, 64, vocab_size=300)), tmp_path / "wide.pth")
    assert (
        run(
            ["export", str(tmp_path / "wide.pth"), "-o", str(tmp_path / "wide"), "--chunk", "0", "--tokenizer", "bytes"]
        )
        == 0
    )
    bare = write_artifact(tmp_path / "bare", 0, "--tokenizer", "none")
    spoiled = torch.ones(SHAPE.vocab_size, SHAPE.n_embd)
    spoiled[ord("u")] = torch.nan
    checkpoint = write_checkpoint(tmp_path / "spoiled.pth", emb__weight=spoiled)
    assert run(["export", str(checkpoint), "-o", str(tmp_path / "spoiled"), "--chunk", "0"]) == 0
    text = ("--text", tmp_path / "book")
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((folder / "one",), "nothing to evaluate on"),
        ((folder / "one", "--text", tmp_path / "none"), "none cannot be read"),
        ((folder / "one", "--text", tmp_path / "latin"), "is not UTF-8"),
        ((folder / "one", "--text", tmp_path / "a"), "fewer than two tokens"),
        ((folder / "one", *text, "--batch", "2"), "exported for batch 1, not 2"),
        ((folder / "steps", *text, "--window", "0", "--batch", "2"), "one stream"),
        ((folder / "one", *text, "--window", "8", "--warm-up", "8"), "leaves none of a window of 8"),
        ((folder / "one", *text, "--window", "0", "--warm-up", "8"), "a warm-up is for windows"),
        ((folder / "one", *text, "--compare", tmp_path / "wide"), "a vocabulary of 256 tokens .* one of 300"),
        ((folder / "one", *text, "--compare", tmp_path / "absent"), "absent does not exist"),
        ((bare, *text), "without a tokenizer"),
        ((tmp_path / "spoiled", *text), "the logits are NaN or infinite near token"),
    ]
    for arguments, sentence in cases:
        assert re.search(sentence, refusal(capsys, "eval", *arguments)), sentence
    with pytest.raises(InputError, match="at least 0"):
        windows_of_text(10, -1)
