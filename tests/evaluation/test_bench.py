"""`rwkv-edge bench`: no speed without parity, and figures that are what they are called."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jtop_double
import numpy as np
import psutil
import pytest
from tiny import refusal, write_artifact

from rwkv_edge.artifact import Artifact, file_entry, write_manifest
from rwkv_edge.cli import run
from rwkv_edge.errors import SessionError, VerificationError
from rwkv_edge.evaluation.bench_jtop import JtopMeter
from rwkv_edge.evaluation.bench_parity import Parity, self_consistency
from rwkv_edge.evaluation.bench_report import BenchReport, Measured, Turn, percentile
from rwkv_edge.evaluation.bench_run import BenchOptions, bench, bytes_per_step, gpu_of
from rwkv_edge.evaluation.bench_worker import Contender, Worker
from rwkv_edge.evaluation.describe import describe
from rwkv_edge.runtime.session import open_session

CHUNKED = ("--chunk", "16", "--chunk", "32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """'chunks' takes any batch, 'three' three streams; 'other' is another model of the same sizes."""
    folder = tmp_path_factory.mktemp("bench")
    write_artifact(folder / "one")
    write_artifact(folder / "other", 1)
    write_artifact(folder / "three", 0, "--batch", "3")
    checkpoint = str(folder / "one.pth")
    assert run(["export", checkpoint, "-o", str(folder / "chunks"), "--batch", "dynamic", *CHUNKED]) == 0
    return folder


def options(**changes: Any) -> BenchOptions:
    return BenchOptions(**{"tokens": 5, "prompt": 20, "runs": 2, "threads": 1, **changes})


# Parity


class Broken:
    """A session that is wrong in one way."""

    def __init__(self, session: Any, **ways: Callable[..., Any]) -> None:
        self._session, self._ways = session, ways

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._session, name)
        if name not in self._ways:
            return real
        return lambda *arguments: self._ways[name](real, *arguments)


def consistency(artifact: Path, session: Any = None, batch: int = 2) -> Parity:
    opened = Artifact.open(artifact)
    return self_consistency(opened, session or open_session(artifact, threads=1), 50, batch, 1e-4)


def failures(artifact: Path, batch: int = 2, **ways: Callable[..., Any]) -> list[str]:
    session = Broken(open_session(artifact, threads=1), **ways)
    return [check.name for check in consistency(artifact, session, batch).checks if not check.passed]


def test_what_is_right_passes(folder: Path) -> None:
    for name, batch in (("chunks", 1), ("chunks", 3), ("three", 3), ("one", 1)):
        found = consistency(folder / name, batch=batch)
        assert found.passed
        assert found.method == "self-consistency"
        assert len(found.checks) == 8
    assert consistency(folder / "chunks").tokens == 16 + 32 + 24 + 5  # a prompt of 50 takes both chunks


def test_every_check_can_fail(folder: Path) -> None:
    chunks = folder / "chunks"

    def nearly(real: Callable[..., np.ndarray], tokens: Any, state: Any) -> np.ndarray:
        return real(tokens, state) * np.float32(1.001)

    def forgets(real: Callable[..., np.ndarray], tokens: np.ndarray, state: Any) -> np.ndarray:
        return real(tokens[:, -1:], state)

    assert failures(chunks, prefill=nearly) == ["chunks give the logits of steps"]
    assert "chunks leave the state of steps" in failures(chunks, prefill=forgets)

    def spoiled(real: Callable[..., np.ndarray], tokens: np.ndarray, state: Any) -> np.ndarray:
        logits = real(tokens, state)
        logits[-1, 3] = np.nan
        return logits

    assert "all logits are finite" in failures(chunks, step=spoiled)
    stateless = open_session(chunks, threads=1)

    def anew(real: Callable[..., np.ndarray], tokens: np.ndarray, state: Any) -> np.ndarray:
        return real(tokens, stateless.initial_state(len(tokens)))

    assert "the logits depend on the state" in failures(chunks, step=anew)

    def mixed(real: Callable[..., np.ndarray], tokens: np.ndarray, state: Any) -> np.ndarray:
        logits = real(tokens, state)
        return logits + np.float32(0.01) * logits.mean(0, keepdims=True) if len(logits) > 1 else logits

    assert "a stream alone is as in the batch" in failures(chunks, step=mixed)

    def by_place(real: Callable[..., np.ndarray], tokens: np.ndarray, state: Any) -> np.ndarray:
        return real(tokens, state) * np.arange(1, 4, dtype=np.float32)[:, None]

    assert "a stream is the same in another place of the batch" in failures(folder / "three", 3, step=by_place)
    drift = iter(range(10**6))

    def drifting(real: Callable[..., np.ndarray], tokens: np.ndarray, state: Any) -> np.ndarray:
        return real(tokens, state) + np.float32(next(drift))

    assert "the same tokens give the same logits again" in failures(folder / "one", 1, step=drifting)
    assert failures(chunks, copy_state=lambda real, state: state) == ["a copy of a state goes on as the state"]

    def rounded(real: Callable[..., dict[str, np.ndarray]], state: Any) -> dict[str, np.ndarray]:
        return {name: np.round(array, 2) for name, array in real(state).items()}

    assert "a state taken out and put back goes on as before" in failures(chunks, export_state=rounded)


def test_no_speed_without_parity(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of another model, put in with their right hash: consistent with itself, but not with the checkpoint."""
    swapped = Path(shutil.copytree(folder / "one", tmp_path / "swapped"))
    shutil.copy(folder / "other" / "weights.bin", swapped)
    manifest = Artifact.open(swapped).manifest
    entry = file_entry(swapped / "weights.bin")
    write_manifest(swapped, replace(manifest, files={**manifest.files, "weights.bin": entry}, model_hash=entry.sha256))
    short = ("--tokens", "3", "--prompt", "4", "--runs", "1", "--threads", "1")
    assert run(["bench", str(swapped), *short]) == 0
    assert "parity by self-consistency: 8 checks" in capsys.readouterr().out
    json_file = tmp_path / "figures.json"
    found = refusal(capsys, "bench", swapped, *short, "--checkpoint", folder / "one.pth", "--json", json_file)
    assert "swapped is not right, so its speed means nothing" in found
    assert "'the logits are those of the checkpoint (relative difference" in found
    assert not json_file.exists()
    assert run(["bench", str(folder / "one"), *short, "--checkpoint", str(folder / "one.pth")]) == 0
    assert "parity by checkpoint and self-consistency: 10 checks" in capsys.readouterr().out
    content = bytearray((swapped / "weights.bin").read_bytes())
    content[1000] ^= 1
    (swapped / "weights.bin").write_bytes(content)
    assert "is not the file that was exported" in refusal(capsys, "bench", swapped, *short)
    assert "so its speed means nothing" in refusal(
        capsys, "bench", folder / "chunks", "--tolerance", "1e-12", *short[2:]
    )


def test_a_quantized_artifact(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is far from its checkpoint in logits, but not in what it predicts; another model is."""
    pytest.importorskip("onnx_graphsurgeon", reason="onnx-graphsurgeon is not installed")
    assert run(["quantize", str(folder / "chunks"), "--scheme", "w4", "-o", str(tmp_path / "w4")]) == 0
    report = bench(tmp_path / "w4", options(checkpoint=folder / "one.pth", compare="rwkv"))
    ours, theirs = report.contenders
    assert ours.precision == "fp32 w4"
    for parity in (ours.parity, theirs.parity):
        assert parity.checks[0].measure == "KL divergence in nats"
        assert 0 < (parity.checks[0].difference or 0) < 0.2
    short = ("--tokens", "3", "--prompt", "4", "--runs", "1", "--threads", "1")
    found = refusal(capsys, "bench", tmp_path / "w4", *short, "--checkpoint", folder / "other.pth")
    assert "'it predicts what the checkpoint does (KL divergence in nats" in found


# Figures


def test_an_artifact(folder: Path) -> None:
    told: dict[str, list[int]] = {}

    def start(name: str, length: int) -> Any:
        told[name] = [length]
        return told[name].append

    report = bench(folder / "chunks", options(batch=2), start)
    assert told == {"parity": [1, 1], "turns": [2, 1, 1]}
    (found,) = report.contenders
    assert len(found.turns) == 2
    assert len(found.latencies) == 10
    assert all(seconds > 0 for seconds in (found.load, found.first_prefill, found.prefill, *found.latencies))
    assert found.peak_host_bytes is not None
    assert found.host_bytes_before is not None
    assert 10e6 < found.host_bytes_before < found.peak_host_bytes < 500e6
    figures = json.loads(json.dumps(report.to_json()), parse_constant=pytest.fail)
    contender = figures["contenders"][0]
    assert contender["prefill_tokens_per_second"] == pytest.approx(2 * 20 / found.prefill)
    assert contender["latency_ms"]["p50"] <= contender["latency_ms"]["p90"] <= contender["latency_ms"]["p99"]
    assert 0 < contender["share_of_bandwidth"] < 2
    assert contender["peak_device_bytes"] is None
    assert figures["ratios"] is None
    assert contender["model_hash"] == Artifact.open(folder / "chunks").manifest.model_hash


def test_two_artifacts_in_turns(folder: Path) -> None:
    report = bench(folder / "one", options(compare=str(folder / "chunks"), runs=3))
    assert [found.name for found in report.contenders] == ["one", "chunks"]
    first, second = (found.turns for found in report.contenders)
    ratios = report.ratios()
    assert ratios is not None
    assert ratios["decode"] == pytest.approx(
        np.median([b.decode / a.decode for a, b in zip(first, second, strict=True)])
    )
    assert "one over chunks: prefill" in report.to_text()
    assert not [child for child in psutil.Process().children() if "bench_worker" in " ".join(child.cmdline())]


def test_the_rwkv_package(shared_models: Path, tmp_path: Path) -> None:
    pytest.importorskip("rwkv", reason="the rwkv package is not installed")
    checkpoint = shared_models / "tiny-rwkv-7v0-834K.pth"
    assert run(["export", str(checkpoint), "-o", str(tmp_path / "artifact"), "--chunk", "16"]) == 0
    report = bench(tmp_path / "artifact", options(compare="rwkv", checkpoint=checkpoint))
    ours, theirs = report.contenders
    assert ours.parity.method == "checkpoint and self-consistency"
    assert theirs.runs_on.startswith("rwkv 0.8")
    (check,) = theirs.parity.checks
    assert check.difference is not None
    assert 0 < check.difference < 1e-4
    assert report.ratios() is not None


def test_the_package_must_give_the_same_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint's parity is skipped here, so that only the package's is left to fail."""
    pytest.importorskip("rwkv", reason="the rwkv package is not installed")
    from rwkv_edge.evaluation import bench_run

    monkeypatch.setattr(bench_run, "_against_checkpoint", lambda artifact, checkpoint, options, own: own)
    with pytest.raises(VerificationError, match="the rwkv package is not right"):
        bench(folder / "one", options(compare="rwkv", checkpoint=folder / "other.pth"))


def test_arithmetic() -> None:
    parity = Parity("self-consistency", 1, 1e-4, ())

    def measured(name: str, turns: list[Turn]) -> Measured:
        return Measured(
            name, "here", "artifact", "fp32", "0" * 64, parity, 1.0, 0.5, 3, 1, None, 200_000_000, None, turns
        )

    a = measured("a", [Turn(0.5, [0.01, 0.03], 10.0), Turn(0.25, [0.02, 0.02], 20.0)])
    a.joules_per_token = 1.25
    b = measured("b", [Turn(1.0, [0.02, 0.06]), Turn(1.0, [0.01, 0.01])])
    report = BenchReport((a, b), 100, 2, 4, {"cores": 2}, {"before": {}, "after": {}}, "NVML", "today")
    assert report.ratios() == {"prefill": pytest.approx(3), "decode": pytest.approx((2 + 0.5) / 2)}
    figures = report.to_json()["contenders"][0]
    assert figures["prefill_tokens_per_second"] == pytest.approx(400 / 0.375)
    assert figures["decode_tokens_per_second"] == pytest.approx(4 * 2 / 0.04)
    assert figures["latency_ms"] == {"p50": 20, "p90": 30, "p99": 30}
    assert figures["share_of_bandwidth"] == pytest.approx((1 + 0.5) / 2)  # 0.2 GB in 20 ms is 10 GB/s
    assert figures["joules_per_token"] == 1.25
    assert "1.25 J per token (NVML)" in report.to_text()
    assert "energy" not in report.to_text().split("b: fp32")[1]
    assert [percentile(range(1, 101), p) for p in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert percentile([3.0], 1) == 3


def test_energy_is_that_of_steps_long_enough_for_the_meter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a meter of 100 W: the figure is the power times the time of a token, though a turn has only 5 steps."""
    monkeypatch.setitem(sys.modules, "jtop", jtop_double.module({"rail": {}, "tot": {"name": "VIN", "power": 100_000}}))
    monkeypatch.setattr(JtopMeter, "least", 1.0)
    asked: list[int] = []
    decode = Worker.decode
    monkeypatch.setattr(Worker, "decode", lambda self, count: asked.append(count) or decode(self, count))
    report = bench(folder / "one", options())
    assert report.energy_source == "jtop, VIN"
    assert (report.machine["power_mode"], report.machine["clocks_fixed"]) == ("15W", True)
    (found,) = report.contenders
    step = statistics.median(found.latencies)
    assert asked == [1, 5, 5, math.ceil(1 / step)]
    assert found.joules_per_token is not None
    # What the question and the answer take counts too, and the machine may be busy.
    assert 0.3 < found.joules_per_token / (100 * step) < 30


def test_bytes_of_a_step(folder: Path) -> None:
    bound = describe(folder / "one", 1e-3)["tokens_per_second_bound"]["fp32"]["this machine"]
    one = bytes_per_step(Artifact.open(folder / "one"), 1)
    assert one is not None
    assert one == pytest.approx(1e6 / bound, rel=0.02)
    spec = Artifact.open(folder / "one").manifest.spec
    three = bytes_per_step(Artifact.open(folder / "three"), 3)
    assert three == one + 2 * (4 * spec.n_embd + 2 * spec.state_nbytes)


def test_where_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_of("onnxruntime 1.32.0, CPUExecutionProvider, threads 1", options()) is None
    assert gpu_of("TensorRT 10.3, Orin, step.engine 0123, wkv plugin", options()) == 0
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert gpu_of("onnxruntime 1.32.0, CUDAExecutionProvider:device_id=1", options(providers=["cuda:device_id=1"])) == 1


# The process and the command


def test_a_process_that_dies_or_cannot(folder: Path, tmp_path: Path) -> None:
    worker = Worker(Contender("artifact", folder / "one", threads=1))
    worker.load()
    worker._process.kill()
    with pytest.raises(SessionError, match="one ended; is there enough memory"):
        worker.prefill(np.zeros((1, 3), np.int64))
    worker.close()
    worker = Worker(Contender("artifact", tmp_path / "none"))
    with pytest.raises(SessionError, match="none does not exist"):
        worker.load()
    worker.close()
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    worker = Worker(Contender("rwkv", tmp_path / "bad.pth", "7"))
    with pytest.raises(SessionError, match="it cannot be run"):
        worker.load()
    worker.close()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c(folder: Path) -> None:
    """One word, the exit code, and no process that stays."""
    command = [sys.executable, "-m", "rwkv_edge", "bench", str(folder / "one"), "--tokens", "10000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        until = time.monotonic() + 60
        while not (workers := psutil.Process(child.pid).children()):
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(1)  # it is at work
        child.send_signal(signal.SIGINT)
        printed = child.communicate(timeout=60)
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode
    assert (code, printed) == (130, ("", "\nstopped\n"))
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    command = ["bench", str(folder / "chunks"), "--tokens", "4", "--prompt", "20", "--runs", "2", "--threads", "1"]
    assert run([*command, "--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "p.png")]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert re.search(r"decode +[\d,.]+ tokens/s; p50 [\d.]+ ms, p90 [\d.]+ ms, p99", printed.out)
    assert "prompt of 20 tokens, 4 steps, batch 1, medians of 2 turns" in printed.out
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["kind"] == "benchmark"
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert run([*command, "--batch", "2", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["batch"] == 2
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batch"] == 1


def test_the_package_to_compare_with_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rwkv" else find(name))
    asked = ("bench", folder / "one", "--compare", "rwkv", "--checkpoint", folder / "one.pth")
    assert refusal(capsys, *asked).endswith("needs the package 'rwkv': pip install rwkv")


def test_refusals(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = folder / "one"
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((tmp_path / "none",), "none does not exist"),
        ((one, "--batch", "2"), "exported for batch 1, not 2"),
        ((one, "--compare", tmp_path / "none"), "none does not exist"),
        ((one, "--compare", folder / "three"), "exported for batch 3, not 1"),
        ((one, "--compare", "rwkv"), "add --checkpoint FILE"),
        ((folder / "three", "--compare", "rwkv", "--checkpoint", folder / "one.pth"), "runs one stream, not 3"),
        ((one, "--json", tmp_path / "no" / "f.json"), "there is no folder"),
        ((one, "--plot", tmp_path / "p.gif"), "a plot is a file ending in .png, .svg, .pdf, not 'p.gif'"),
        ((one, "--backend", "abacus"), "'abacus' is not one of"),
        ((one, "--provider", "Foo"), "'Foo' is not available here"),
        ((one, "--checkpoint", tmp_path / "none.pth"), "none.pth cannot be read"),
    ]
    for arguments, sentence in cases:
        assert sentence in refusal(capsys, "bench", *arguments)
    assert not list(tmp_path.iterdir())
