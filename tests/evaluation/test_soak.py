"""The soak: what it reports, what makes it fail, and that a kill in the middle changes nothing."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tiny import SHAPE, refusal, write_artifact, write_checkpoint

from rwkv_edge.cli import run
from rwkv_edge.errors import InputError, StateError, VerificationError
from rwkv_edge.evaluation import memory
from rwkv_edge.evaluation.soak import SampledTokens, SoakOptions, TextTokens, soak
from rwkv_edge.evaluation.soak_reference import Reference, ReferenceSource
from rwkv_edge.evaluation.soak_report import SoakPoint, array_from_points, points_from_array, rss_growth_mb
from rwkv_edge.runtime.session import open_session
from rwkv_edge.runtime.snapshot import History, read_snapshot, save_snapshot


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """'artifact' with its checkpoint, and 'tuned' with an initial state."""
    folder = tmp_path_factory.mktemp("soak")
    write_artifact(folder / "artifact")
    heads = SHAPE.n_embd // SHAPE.head_size
    tuned = {f"blocks.{i}.att.time_state": torch.ones(heads, SHAPE.head_size, SHAPE.head_size) for i in range(2)}
    torch.save(tuned, folder / "time_state.pth")
    write_artifact(folder / "tuned", 0, "--state", str(folder / "time_state.pth"))
    return folder


def options(folder: Path, **changes: Any) -> SoakOptions:
    return SoakOptions(**{"tokens": 60, "every": 20, "threads": 1, **changes})


def source(folder: Path, name: str = "artifact") -> ReferenceSource:
    return ReferenceSource(folder / f"{name}.pth")


# What it reports


@pytest.mark.parametrize("name", ["artifact", "tuned"])
def test_drift_from_float64_is_small(name: str, folder: Path) -> None:
    seen: list[SoakPoint] = []
    report = soak(folder / name, options(folder, tokens=350, every=150, reference=source(folder, name)), seen.append)
    assert report.passed
    assert tuple(seen) == report.points
    assert [point.tokens for point in seen] == [150, 300, 350]
    assert report.drift is not None
    assert 0 < report.drift < 1e-4
    assert all(point.state_max > 0 and point.tokens_per_second > 0 and (point.rss_mb or 1) > 0 for point in seen)
    assert report.tokens == 350
    assert report.nonfinite_at is None


def test_text_is_fed_over_and_over(folder: Path, tmp_path: Path) -> None:
    report = soak(folder / "artifact", options(folder, tokens=100, text="never ", state=tmp_path / "state"))
    assert report.source.startswith("text of 6 tokens")
    assert bytes(read_snapshot(tmp_path / "state").streams[0].last) == ("never " * 17)[36:100].encode()
    session = open_session(folder / "artifact", threads=1)
    state = session.initial_state()
    for token in ("never " * 17)[:100].encode():
        session.step([token], state)
    expected = session.export_state(state)
    found = read_snapshot(tmp_path / "state").arrays
    assert all(np.array_equal(array, expected[name]) for name, array in found.items())


def test_sampled_tokens_follow_the_seed(folder: Path, tmp_path: Path) -> None:
    last = []
    for seed in (1, 1, 2):
        path = tmp_path / f"state-{len(last)}"
        soak(folder / "artifact", options(folder, seed=seed, state=path))
        last.append(read_snapshot(path).streams[0].last)
    assert last[0] == last[1] != last[2]
    assert len(set(last[0])) > 20


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("abc")
    command = ["soak", str(folder / "artifact"), "--tokens", "50", "--checkpoint-every", "20", "--threads", "1"]
    command += ["--text", str(tmp_path / "text")]
    assert run(command) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("passed: 50 tokens (text of 3 tokens")
    assert [line.split()[0] for line in printed.err.splitlines()] == ["20", "40", "50"]
    assert run([*command, "--json", "--reference", str(folder / "artifact.pth")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert report["drift"] == max(max(p["logits_drift"], p["state_drift"]) for p in report["points"])
    assert "onnxruntime" in report["backend"]


def test_past_the_tolerance(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["soak", str(folder / "artifact"), "--tokens", "20", "--tolerance", "1e-12", "--threads", "1"]
    assert run([*command, "--reference", str(folder / "artifact.pth")]) == 1
    assert capsys.readouterr().out.startswith("FAILED: 20 tokens")
    assert run(command) == 0  # without a reference there is nothing to be past


def test_nan_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoiled = torch.ones(SHAPE.vocab_size, SHAPE.n_embd)
    spoiled[ord("c")] = torch.nan
    checkpoint = write_checkpoint(tmp_path / "spoiled.pth", emb__weight=spoiled)
    assert run(["export", str(checkpoint), "-o", str(tmp_path / "artifact"), "--chunk", "0"]) == 0
    capsys.readouterr()
    (tmp_path / "text").write_text("aabc")
    command = ["soak", str(tmp_path / "artifact"), "--text", str(tmp_path / "text"), "--threads", "1"]
    assert run([*command, "--json", "--reference", str(checkpoint)]) == 1
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (printed["nonfinite_at"], printed["drift"]) == (4, None)
    report = soak(tmp_path / "artifact", options(tmp_path, text="aabc", state=tmp_path / "state"))
    assert (report.nonfinite_at, report.passed, report.tokens) == (4, False, 4)
    assert not (tmp_path / "state").exists()
    assert "NaN, infinity  after token 4" in report.to_text()
    assert "memory         not judged: that takes more than 3 checkpoints" in report.to_text()
    assert "largest drift  not judged: that takes a reference" in report.to_text()


def test_growth_of_memory() -> None:
    def points(run: int, *rss: float | None) -> list[SoakPoint]:
        return [SoakPoint(i, run, 1.0, value, 1.0, "wkv.0") for i, value in enumerate(rss)]

    assert rss_growth_mb(points(0, 40, 50, 60, 60.5, 60.25)) == 0.5
    assert rss_growth_mb([*points(0, 50, 50, 60, 60.5), *points(1, 30, 40, 41, 43)]) == 2
    assert rss_growth_mb(points(0, *range(40))) == 36
    assert rss_growth_mb(points(0, 50, 60, 70)) is None
    assert rss_growth_mb(points(0, None, None, None, None)) is None


def test_points_in_an_array() -> None:
    names = ["att_shift.0", "wkv.0"]
    points = [SoakPoint(10, 0, 1.5, None, 2.5, "wkv.0"), SoakPoint(20, 1, 1.0, 3.5, 0.0, "wkv.0", 1e-9, 0.0, names[0])]
    assert points_from_array(array_from_points(points, names), names) == points


def test_resident_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    before = memory.resident_bytes()
    assert before is not None
    ballast = np.ones(50_000_000, np.uint8)
    after = memory.resident_bytes()
    assert after is not None
    assert 45e6 < after - before < 60e6
    monkeypatch.setattr(Path, "exists", lambda self: False)  # another system
    elsewhere = memory.resident_bytes()
    assert elsewhere is not None
    assert elsewhere > ballast.nbytes
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows
    assert memory.resident_bytes() is None


# Going on


def state_of(path: Path) -> tuple[Any, ...]:
    found = read_snapshot(path)
    extra = {name: array for name, array in found.extra.items() if name != "points"}
    arrays = {name: array.tobytes() for name, array in [*found.arrays.items(), *extra.items()]}
    points = points_from_array(found.extra["points"], sorted(found.arrays))
    return found.streams, arrays, [(p.tokens, p.state_max, p.logits_drift, p.state_drift) for p in points]


def test_a_killed_soak_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    soak(folder / "artifact", options(folder, tokens=1000, every=50, state=whole, reference=source(folder)))
    arguments = ["soak", str(folder / "artifact"), "--tokens", "1000", "--checkpoint-every", "50", "--threads", "1"]
    arguments += ["--reference", str(folder / "artifact.pth"), "--state", str(broken), "--json"]
    killed = process(*arguments)
    while not broken.exists() or read_snapshot(broken).streams[0].tokens < 200:
        assert killed.poll() is None
        time.sleep(0.01)
    children = psutil.Process(killed.pid).children()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(children) == 1  # the reference
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert read_snapshot(broken).streams[0].tokens < 1000
    resumed = process(*arguments)
    report = json.loads(resumed.communicate()[0])
    assert resumed.returncode == 0
    assert state_of(broken) == state_of(whole)
    assert [point["run"] for point in report["points"]][:: len(report["points"]) - 1] == [0, 1]
    assert report["tokens"] == 1000


def process(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "error", "-m", "rwkv_edge", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_a_finished_soak_can_be_made_longer(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "state"
    first = soak(folder / "artifact", options(folder, state=path))
    again = soak(folder / "artifact", options(folder, state=path))
    assert again.points == first.points
    longer = soak(folder / "artifact", options(folder, tokens=100, state=path))
    assert [point.tokens for point in longer.points] == [20, 40, 60, 80, 100]
    assert [point.run for point in longer.points] == [0, 0, 0, 1, 1]
    whole = soak(folder / "artifact", options(folder, tokens=100, state=tmp_path / "w"))
    assert [p.state_max for p in whole.points] == [p.state_max for p in longer.points]
    assert state_of(path) == state_of(tmp_path / "w")


def test_a_snapshot_of_something_else(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "state"
    session = open_session(folder / "artifact", threads=1)
    save_snapshot(path, session, session.initial_state(), [History()])
    with pytest.raises(StateError, match="not of a soak"):
        soak(folder / "artifact", options(folder, state=path))
    path.unlink()
    soak(folder / "artifact", options(folder, state=path))
    for changes, sentence in (
        ({"seed": 1}, "with source 'sampled with seed 0', not 'sampled with seed 1'"),
        ({"every": 30}, "with every 20, not 30"),
        ({"reference": source(folder)}, "with reference False, not True"),
    ):
        with pytest.raises(StateError, match=sentence):
            soak(folder / "artifact", options(folder, state=path, **changes))
    assert "another tuned initial state" in refusal(capsys, "soak", folder / "tuned", "--state", path)
    assert "there is no folder" in refusal(capsys, "soak", folder / "artifact", "--state", tmp_path / "no" / "x")


# Refusals


def test_a_reference_of_another_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rwkv_edge.evaluation.synthetic import Shape7, random_v7, save_pth

    other = save_pth(random_v7(Shape7(1, 64)), tmp_path / "other.pth")
    artifact = folder / "artifact"
    assert "n_layer is 2, the checkpoint's 1" in refusal(capsys, "soak", artifact, "--reference", other)


def test_a_reference_without_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Exception, match=r"pip install 'rwkv-edge\[export\]'"):
        soak(folder / "artifact", options(folder, reference=source(folder)))


def test_without_a_reference_torch_stays_out() -> None:
    script = "import sys, rwkv_edge.evaluation.soak, rwkv_edge.cli.soak; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", script], timeout=60).returncode == 0


def test_a_reference_that_dies(folder: Path) -> None:
    session = open_session(folder / "artifact", threads=1)
    reference = Reference(source(folder), session.spec, session.export_state(session.initial_state()), 1)
    reference._process.kill()
    reference._process.wait()
    with pytest.raises(VerificationError, match="process of the float64 reference ended"):
        reference.feed(np.array([1]))
    reference.close()


def test_arguments(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="tokens must be at least 1"):
        SoakOptions(tokens=0)
    with pytest.raises(InputError, match="no tokens to feed"):
        TextTokens([])
    (tmp_path / "empty").write_text("")
    assert "no tokens" in refusal(capsys, "soak", folder / "artifact", "--text", tmp_path / "empty")
    assert "does not exist" in refusal(capsys, "soak", tmp_path / "absent")
    bare = write_artifact(tmp_path / "bare", 0, "--tokenizer", "none")
    (tmp_path / "text").write_text("abc")
    assert "without a tokenizer" in refusal(capsys, "soak", bare, "--text", tmp_path / "text")
    assert soak(bare, options(folder)).passed


def test_draws_depend_on_position_and_seed_alone() -> None:
    logits = np.zeros(256, np.float32)
    tokens = SampledTokens(3, 0)
    tokens.begin(40)
    first = [tokens.token(t, logits) for t in range(40, 50)]
    tokens.begin(50)
    assert [tokens.token(t, logits) for t in range(50, 60)] != first
    tokens.begin(40)
    assert [tokens.token(t, logits) for t in range(40, 50)] == first
