"""LAMBADA: the harness' convention on passages made by hand, against the `rwkv` package and against arithmetic."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle
from tiny import SHAPE, refusal, weights, write_artifact

from rwkv_edge.cli import run
from rwkv_edge.evaluation.eval_lambada import passages_from_jsonl
from rwkv_edge.evaluation.eval_run import EvalOptions, evaluate
from rwkv_edge.evaluation.synthetic import save_pth
from rwkv_edge.tokenizers import ByteTokenizer, HuggingFaceTokenizer, WorldTokenizer

TEXTS = [
    "the lord of the house went to the house",
    "O Romeo, Romeo! wherefore art thou Romeo",
    "a b",
    "To be, or not to be, that is the question: whether it is nobler in the mind to suffer the slings and arrows",
    "It was the best of times, it was the worst of\n times",  # white space before the last word
    "Wie heißt du? Ich heiße Jürgen",
]
GRAPHS = {
    "steps": ("--chunk", "0"),
    "chunks": ("--chunk", "16", "--chunk", "64"),
    "scored": ("--chunk", "16", "--all-logits"),
}


def jsonl(*texts: str) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def by_hand(oracle: Oracle, text: str, begin: tuple[int, ...] = ()) -> tuple[float, bool]:
    """−ln p of the last word and whether it is the greedy choice, byte by byte."""
    context = text[: text.rindex(" ")].rstrip().encode()
    target = text.encode()[len(context) :]
    logits, _ = oracle.steps([*begin, *context, *target[:-1]])
    rows = torch.from_numpy(logits[len(begin) + len(context) - 1 :]).double().log_softmax(-1)
    greedy = rows.argmax(-1).tolist() == list(target)
    return -sum(float(rows[i, byte]) for i, byte in enumerate(target)), greedy


def lambada(artifact: Path, text: str, **changes: Any) -> dict[str, Any]:
    report = evaluate(artifact, EvalOptions(lambada=text, threads=1, **changes))
    assert report.lambada is not None
    return report.lambada


@dataclass(frozen=True)
class Expected:
    """Passages, their losses, and whether the last word is the greedy choice."""

    texts: tuple[str, ...]
    losses: tuple[float, ...]
    hits: tuple[bool, ...]


@pytest.fixture(scope="module")
def checkpoint(shared_models: Path) -> Path:
    return shared_models / "tiny-rwkv-5v2-730K.pth"


@pytest.fixture(scope="module")
def by_the_package(checkpoint: Path) -> Expected:
    """The package takes its time: once for all graphs."""
    oracle = Oracle(checkpoint, "5.2")
    texts = (*TEXTS, *(said(oracle, text) for text in ("the ", "In the beginning ")))
    losses, hits = zip(*(by_hand(oracle, text) for text in texts), strict=True)
    assert hits.count(True) == 2  # what the model itself says
    return Expected(texts, losses, hits)


@pytest.mark.parametrize("graphs", GRAPHS)
def test_the_rwkv_package_agrees(graphs: str, checkpoint: Path, by_the_package: Expected, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    assert run(["export", str(checkpoint), "-o", str(artifact), "--batch", "dynamic", *GRAPHS[graphs]]) == 0
    texts, losses, hits = by_the_package.texts, by_the_package.losses, by_the_package.hits
    for batch in (None, 1, 3):
        found = lambada(artifact, jsonl(*texts), batch=batch)["artifact"]
        assert found["passages"] == len(texts)
        assert found["accuracy"] == pytest.approx(2 / len(texts))
        assert found["accuracy_error"] == pytest.approx(np.std(hits, ddof=1) / math.sqrt(len(texts)))
        assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
        expected = math.exp(np.mean(losses)) * np.std(losses, ddof=1) / math.sqrt(len(losses))
        assert found["perplexity_error"] == pytest.approx(expected, rel=1e-4)


def said(oracle: Oracle, text: str) -> str:
    """``text`` and the next word that the model says greedily, spaces left out."""
    tokens, start = list(text.encode()), len(text)
    if tokens[-1] == ord(" "):
        tokens, start = tokens[:-1], start - 1
    logits, state = oracle.steps(tokens)
    while len(tokens) < start + 4:
        best = logits[-1].argsort()[::-1]
        first = len(tokens) == start
        if not first and int(best[0]) in (ord(" "), ord("\n")):
            break
        assert int(best[0]) < 128
        if first:
            assert int(best[0]) == ord(" "), "the text must end a word"
        tokens.append(int(best[0]))
        logits, state = oracle.steps(tokens[-1:], state)
    return bytes(tokens).decode()


def test_one_passage(tmp_path: Path) -> None:
    """A model whose head is zero finds every byte as likely as any other: 256 to the power of the bytes."""
    checkpoint = save_pth(weights() | {"head.weight": torch.zeros(256, SHAPE.n_embd)}, tmp_path / "flat.pth")
    assert run(["export", str(checkpoint), "-o", str(tmp_path / "flat"), "--chunk", "0"]) == 0
    found = lambada(tmp_path / "flat", jsonl("one two three"))["artifact"]
    assert found == {
        "passages": 1,
        "accuracy": 0.0,
        "accuracy_error": None,
        "perplexity": pytest.approx(256.0**6),
        "perplexity_error": None,
    }


def test_encoding_is_that_of_the_harness(tmp_path: Path) -> None:
    world = WorldTokenizer()
    text = 'He said: "go home," and she went  home'
    (passage,) = passages_from_jsonl(jsonl(text), world, "f")
    assert list(passage.tokens) == world.encode(text)
    assert world.decode(passage.tokens[passage.first :]) == "  home"  # both spaces are the target's
    (passage,) = passages_from_jsonl(jsonl(text), world, "f", begin=0)
    assert passage.tokens[0] == 0
    assert world.decode(passage.tokens[passage.first :]) == "  home"
    (passage,) = passages_from_jsonl(jsonl("a  b c"), ByteTokenizer(), "f")
    assert (bytes(passage.tokens), passage.first) == (b"a  b c", 4)


def test_a_token_across_the_border(tmp_path: Path) -> None:
    """The target is what the whole has past the length of the context, even where the last tokens of that differ."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {c: i for i, c in enumerate(["a", "b", "Ġ", "bĠ"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("b", "Ġ")]))
    from tokenizers import pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (passage,) = passages_from_jsonl(jsonl("ab a"), HuggingFaceTokenizer(tmp_path / "tokenizer.json"), "f")
    assert passage.tokens == (0, 3, 0)  # a, 'b ', a
    assert passage.first == 2  # the context alone is a, b


def test_samples_reference_and_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = write_artifact(tmp_path / "artifact", 0, "--batch", "4")
    other = write_artifact(tmp_path / "other", 1)
    (tmp_path / "l.jsonl").write_text("\n" + jsonl(*TEXTS), encoding="utf-8")
    command = ["eval", str(artifact), "--lambada", str(tmp_path / "l.jsonl"), "--threads", "1"]
    capsys.readouterr()
    assert run([*command, "--samples", "3", "--compare", str(other), "--json"]) == 0
    data = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert data["lambada"]["artifact"] == pytest.approx(lambada(artifact, jsonl(*TEXTS[:3]))["artifact"], rel=1e-5)
    assert data["lambada"]["reference"] == pytest.approx(lambada(other, jsonl(*TEXTS[:3]))["artifact"], rel=1e-5)
    assert (data["score"], data["comparison"]) == (None, None)
    assert run(command) == 0
    assert "l.jsonl: LAMBADA, OpenAI variant, 6 passages, whole last word" in capsys.readouterr().out


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    for text, message in {
        "": "has no passages",
        "{": r"line 1 of l.jsonl is not JSON",
        '{"text": "a b"}\n["a b"]\n': r"line 2 of l.jsonl has no field 'text'",
        '{"text": 3}': "no field 'text' with a string",
        '{"text": "word"}': r"line 1 of l.jsonl has no context before its last word",
        '{"text": " word"}': "no context before its last word",
        '{"text": "\\ud800 b"}': "lone surrogate",
    }.items():
        (tmp_path / "l.jsonl").write_text(text)
        assert re.search(message, refusal(capsys, "eval", artifact, "--lambada", tmp_path / "l.jsonl")), message
    (tmp_path / "l.jsonl").write_text(jsonl("a b"))
    found = refusal(capsys, "eval", artifact, "--lambada", tmp_path / "l.jsonl", "--begin")
    assert "the tokenizer 'bytes' has no end-of-text token" in found
