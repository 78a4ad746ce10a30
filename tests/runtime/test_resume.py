"""Snapshots on the command line: two runs that give the text of one, and a look into the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import refusal

from rwkv_edge.cli import run
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.session import open_session
from rwkv_edge.runtime.snapshot import History, read_snapshot, save_snapshot
from rwkv_edge.runtime.state_facts import snapshot_differences


def saved(session: OrtSession, path: Path, text: bytes) -> Path:
    state = session.initial_state()
    session.prefill([list(text)], state)
    save_snapshot(path, session, state, [History().after(list(text))])
    return path


def texts(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run([*map(str, arguments), "--threads", "1"]) == 0
    return capsys.readouterr().out


GREEDY = ("--temperature", "0", "--no-echo")


@pytest.mark.parametrize("name", ["one", "half", "tuned"])
def test_two_runs_give_the_text_of_one(
    name: str, artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, first, second, at_once = artifacts / name, tmp_path / "first", tmp_path / "second", tmp_path / "at-once"
    whole = texts(capsys, "generate", artifact, "Once", "-n", 100, *GREEDY)
    assert len(set(whole)) > 5
    for length in (1, 49, 50, 51, 99):
        start = texts(capsys, "generate", artifact, "Once", "-n", length, *GREEDY, "--state-out", first)
        rest = texts(capsys, "generate", artifact, "-n", 100 - length, *GREEDY, "--state-in", first)
        assert start.removesuffix("\n") + rest == whole
    texts(capsys, "generate", artifact, "-n", 1, *GREEDY, "--state-in", first, "--state-out", second)
    texts(capsys, "generate", artifact, "Once", "-n", 100, *GREEDY, "--state-out", at_once)
    found = read_snapshot(second)
    assert found.streams == read_snapshot(at_once).streams
    assert found.streams[0].tokens == 4 + 99
    assert len(found.streams[0].pending) == 1
    assert not snapshot_differences(second, at_once).differing


def test_a_snapshot_and_a_prompt(artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, path = artifacts / "one", tmp_path / "state"
    start = texts(capsys, "generate", artifact, "Once", "-n", 5, *GREEDY, "--state-out", path)
    printed = texts(capsys, "generate", artifact, "more", "-n", 10, "--temperature", 0, "--state-in", path)
    session = open_session(artifact, threads=1)
    history = read_snapshot(path).streams[0]
    state = session.initial_state()
    logits = session.prefill([[*history.last, *history.pending, *b"more"]], state)[0]
    assert printed.startswith("more")
    assert start
    expected = bytearray()
    for _ in range(10):
        expected.append(int(logits.argmax()))
        logits = session.step([expected[-1]], state)[0]
    assert printed == f"more{expected.decode('utf-8', 'replace')}\n"


def test_nothing_follows_a_stop_token(artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, path = artifacts / "one", tmp_path / "state"
    stops = [argument for token in range(256) for argument in ("--stop-token", token)]
    texts(capsys, "generate", artifact, "Once", "-n", 5, *stops, "--state-out", path)
    assert read_snapshot(path).streams[0] == History().after(list(b"Once"))
    assert "give a prompt" in refusal(capsys, "generate", artifact, "--state-in", path)
    assert texts(capsys, "generate", artifact, "!", "-n", 2, *GREEDY, "--state-in", path)


def test_refusals_of_generate(artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other, many = (artifacts / name for name in ("one", "other", "many"))
    path = tmp_path / "state"
    texts(capsys, "generate", one, "a", "-n", 2, "--state-out", path)
    assert "another model" in refusal(capsys, "generate", other, "--state-in", path)
    assert "does not exist" in refusal(capsys, "generate", one, "--state-in", tmp_path / "absent")
    assert "there is no folder" in refusal(capsys, "generate", one, "a", "--state-out", tmp_path / "no" / "x")
    session = open_session(many, threads=1)
    save_snapshot(path, session, session.initial_state(2), [History(), History()])
    assert "holds 2 streams" in refusal(capsys, "generate", many, "a", "--state-in", path)
    assert run(["generate", str(other), "--state-in", str(path)]) == 1


def test_state_info(artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "state"
    texts(capsys, "generate", artifacts / "tuned", "abc", "-n", 2, *GREEDY, "--state-out", path)
    capsys.readouterr()
    assert run(["state", "info", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "state of RWKV-7 in fp32, 1 stream\n" in printed
    assert "tuned initial state sha256" in printed
    assert "stream 0     4 tokens, last [97, 98, 99," in printed
    assert run(["state", "info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["streams"][0]["tokens"] == 4
    assert facts["tensors"] == 6
    assert facts["model_hash"] == open_session(artifacts / "tuned", threads=1).model_hash
    assert "not a snapshot" in refusal(capsys, "state", "info", artifacts / "tuned" / "initial_state.safetensors")


def test_state_diff(artifacts: Path, session: OrtSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = saved(session, tmp_path / "a", b"abc"), tmp_path / "b"
    arrays = session.export_state(session.import_state(read_snapshot(a).arrays))
    arrays["wkv.1"][0, 0, 2, 3] += 0.5
    save_snapshot(b, session, arrays, [History()])
    assert run(["state", "diff", str(a), str(b)]) == 0
    printed = capsys.readouterr().out
    assert "1 of 6 tensors differ\n  wkv.1 " in printed
    assert "max |difference| 0.5" in printed
    assert run(["state", "diff", str(a), str(b), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same_model"] is True
    assert found["tensors"][0]["name"] == "wkv.1"
    assert found["tensors"][0]["differing"] == 1
    assert run(["state", "diff", str(a), str(a)]) == 0
    assert "0 of 6 tensors differ" in capsys.readouterr().out
    half = saved(open_session(artifacts / "half", threads=1), tmp_path / "half", b"abc")
    assert snapshot_differences(a, half).same_model is False
    assert all(tensor.relative < 1e-2 for tensor in snapshot_differences(a, half).tensors)
    two = open_session(artifacts / "many", threads=1)
    save_snapshot(b, two, two.initial_state(2), [History(), History()])
    assert "cannot be compared: 'att_shift.0' is [1, 64] in one and [2, 64]" in refusal(capsys, "state", "diff", a, b)
