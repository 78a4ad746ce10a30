"""Calibration: what is recorded, that it can be repeated and interrupted, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import refusal, weights, write_artifact

from rwkv_edge.artifact import Artifact
from rwkv_edge.calibration import calibrate as module
from rwkv_edge.calibration.calibrate import CalibrateOptions, calibrate
from rwkv_edge.calibration.checkpoint import Checkpoint
from rwkv_edge.calibration.collect import Statistics
from rwkv_edge.calibration.record import load_calibration, overlap
from rwkv_edge.calibration.text import Text, WindowOptions, windows_of
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.errors import CalibrationError, InputError
from rwkv_edge.evaluation.synthetic import save_pth
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint

TEXT = "".join(f"{i} and {i * i % 97}, said the {i % 13}th; and so on.\n" for i in range(400))
WINDOWS = WindowOptions(samples=6, length=32, warmup=16)


def files_of(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    return write_artifact(folder / "float", 0, "--chunk", "16")


def test_chunks_and_steps_see_the_same(artifact: Path, tmp_path: Path) -> None:
    """Also the head, whose input a chunk computes for its last token only; tensors have other names in a step."""
    steps = write_artifact(tmp_path / "steps")
    found = [
        calibrate(path, [Text("t", TEXT)], tmp_path / f"{i}.json", CalibrateOptions(WINDOWS, threads=1))
        for i, path in enumerate((artifact, steps))
    ]
    assert [f.settings["graph"] for f in found] == ["prefill-16.onnx", "step.onnx"]
    assert found[0].inputs.keys() == found[1].inputs.keys() >= {"head", "blocks.0.ffn.value", "blocks.1.att.output"}
    assert "blocks.0.att.output" not in found[0].inputs, "the version keeps it in float"
    for name, entry in found[0].inputs.items():
        other = found[1].inputs[name]
        assert entry.count == other.count == 6 * 32 * entry.width
        assert entry.rms == pytest.approx(other.rms, rel=1e-4)
        assert entry.thresholds["minmax"] == pytest.approx(other.thresholds["minmax"], rel=1e-3)
        square = found[0].statistic("square", name)
        assert np.sqrt(square.mean()) == pytest.approx(entry.rms, rel=1e-4)


def test_twice_the_same_and_seed_changes(artifact: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        windows = WindowOptions(samples=6, length=32, warmup=16, seed=seed)
        calibrate(artifact, [Text("t", TEXT)], tmp_path / name / "x.json", CalibrateOptions(windows, hessian=True))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert files_of(tmp_path / "a") != files_of(tmp_path / "c")


def test_killed_and_resumed_gives_the_same_files(artifact: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 8)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    arguments = ["calibrate", str(artifact), "--text", str(text), "--length", "64", "--warmup", "16", "--samples"]
    arguments += ["300", "--checkpoint-every", "1", "--threads", "1", "-o"]
    command = [sys.executable, "-m", "rwkv_edge", *arguments]
    assert subprocess.run([*command, str(tmp_path / "whole" / "c.json")], timeout=120).returncode == 0
    target = tmp_path / "killed" / "c.json"
    process = subprocess.Popen([*command, str(target)], stderr=subprocess.DEVNULL)
    partial = target.with_name("c.json.partial")
    deadline = time.monotonic() + 60
    while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.exists(), "it was too fast to be killed"
    assert not target.exists()
    began = time.monotonic()
    assert subprocess.run([*command, str(target)], timeout=120).returncode == 0
    assert time.monotonic() - began < 60
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_resume_does_not_begin_anew(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after four windows, it feeds the last two only."""
    target = tmp_path / "c.json"
    fed: list[int] = []
    real = module.WindowRunner.run

    def counted(self: object, window: np.ndarray, names: object) -> object:
        fed.append(len(window))
        if len(fed) == 5 and not target.exists():
            raise KeyboardInterrupt
        return real(self, window, names)

    monkeypatch.setattr(module.WindowRunner, "run", counted)
    options = CalibrateOptions(WINDOWS, every=2, threads=1)
    with pytest.raises(KeyboardInterrupt):
        calibrate(artifact, [Text("t", TEXT)], target, options)
    assert not target.exists()
    fed[:] = [0] * 10
    calibrate(artifact, [Text("t", TEXT)], target, options)
    assert fed[10:] == [1, 1]
    assert not target.with_name("c.json.partial").exists()


def test_checkpoint_of_other_settings_is_not_used(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "c.json", "one").write(3, {"a": np.ones(2)})
    assert Checkpoint(tmp_path / "c.json", "one").read()[0] == 3
    assert Checkpoint(tmp_path / "c.json", "two").read() == (0, {})


def test_statistics_survive_saving() -> None:
    random = np.random.default_rng(0)
    whole, first = Statistics.empty(8), Statistics.empty(8)
    parts = [random.normal(scale=3.0**i, size=(20, 8)).astype(np.float32) for i in range(4)]
    for part in parts:
        whole.add("x", part)
    for part in parts[:2]:
        first.add("x", part)
    second = Statistics.restored("x", first.saved("x"))
    for part in parts[2:]:
        second.add("x", part)
    for name, array in whole.saved("x").items():
        assert np.array_equal(array, second.saved("x")[name]), name


def test_overlap(artifact: Path, tmp_path: Path) -> None:
    found = calibrate(artifact, [Text("t", TEXT)], tmp_path / "c.json", CalibrateOptions(WINDOWS, threads=1))
    found = load_calibration(found.path)
    other = "".join(f"The {i}th of {i * 7} others was something else entirely. " for i in range(500))
    assert overlap(found, TEXT) == 1
    assert overlap(found, other) == 0
    assert 0.3 < overlap(found, TEXT + other) < 0.6
    assert overlap(found, "short") == 0


def test_windows_do_not_overlap_and_stay_in_their_text() -> None:
    streams = [np.arange(1000), np.arange(5000, 5400)]
    windows = windows_of(streams, WindowOptions(samples=12, length=60, warmup=40))
    assert windows.shape == (12, 100)
    assert (np.diff(windows, axis=1) == 1).all()
    assert len(np.unique(windows)) == windows.size
    assert sum(window[0] >= 5000 for window in windows) == 3


def test_memory_does_not_grow_with_the_text() -> None:
    found = Statistics.empty(4)
    size = sum(array.nbytes for array in found.saved("x").values())
    for scale in (1e-6, 1.0, 1e6):
        found.add("x", np.full((1000, 4), scale, np.float32))
    assert sum(array.nbytes for array in found.saved("x").values()) == size


# What is refused


def test_text_that_is_too_short(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("", "a few words"):
        (tmp_path / "t.txt").write_text(content)
        found = refusal(capsys, "calibrate", artifact, "--text", tmp_path / "t.txt", "-o", tmp_path / "c.json")
        assert "too short" in found
        assert not (tmp_path / "c.json").exists()


def test_too_many_samples(artifact: Path, tmp_path: Path) -> None:
    windows = WindowOptions(samples=10_000, length=32, warmup=16)
    with pytest.raises(InputError, match=r"hold \d+ windows"):
        calibrate(artifact, [Text("t", TEXT)], tmp_path / "c.json", CalibrateOptions(windows))


def test_nan_in_the_weights(tmp_path: Path) -> None:
    bad = weights() | {"blocks.1.ln2.weight": torch.full((64,), float("nan"))}
    path = save_pth(bad, tmp_path / "bad.pth")
    export_checkpoint(open_checkpoint(path), tmp_path / "bad", ExportOptions(chunks=(16,)))
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        calibrate(tmp_path / "bad", [Text("t", TEXT)], tmp_path / "c.json", CalibrateOptions(WINDOWS))
    assert not (tmp_path / "c.json").exists()


def test_bf16_is_refused(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "float", 0, "--precision", "bf16")
    with pytest.raises(CalibrationError, match="bf16"):
        calibrate(artifact, [Text("t", TEXT)], tmp_path / "c.json", CalibrateOptions(WINDOWS))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is absent")
def test_full_disk(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        with Path("/dev/full").open("wb") as file:
            file.write(data)

    monkeypatch.setattr(module, "write_whole", full)
    with pytest.raises(CalibrationError, match="disk is full"):
        calibrate(artifact, [Text("t", TEXT)], tmp_path / "c.json", CalibrateOptions(WINDOWS))
    assert not (tmp_path / "c.json").exists()


def test_no_folder(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no folder"):
        calibrate(artifact, [Text("t", TEXT)], tmp_path / "no" / "c.json", CalibrateOptions(WINDOWS))


Damage = Callable[[dict], object]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda data: data.pop("inputs"), "lacks 'inputs'"),
        (lambda data: data["inputs"]["head"]["thresholds"].update(mse=float("nan")), "threshold of 'head' is nan"),
        (lambda data: data["inputs"]["head"]["thresholds"].update(mse=-1), "not a magnitude"),
        (lambda data: data["inputs"]["head"].update(rms="1"), "rms of 'head'"),
        (lambda data: data.update(method="best"), "method is 'best'"),
        (lambda data: data.update(format="x"), "not a calibration"),
        (lambda data: data.update(format_version=99), "format version 99"),
        (lambda data: data.update(files={"../x": "0" * 64}), "no file beside it"),
        (lambda data: data["fingerprint"].update(shift=99), "fingerprint"),
    ],
)
def test_damaged_json(damage: Damage, expected: str, calibrated: Callable, tmp_path: Path) -> None:
    data = json.loads(calibrated("7").calibration.read_bytes())
    damage(data)
    (tmp_path / "c.json").write_text(json.dumps(data))
    with pytest.raises(CalibrationError, match=expected):
        load_calibration(tmp_path / "c.json")


def test_truncated_json_and_statistics(calibrated: Callable, tmp_path: Path) -> None:
    source = calibrated("7").calibration
    (tmp_path / "c.json").write_bytes(source.read_bytes()[:1000])
    with pytest.raises(CalibrationError, match="damaged"):
        load_calibration(tmp_path / "c.json")
    (tmp_path / "c.json").write_bytes(source.read_bytes())
    found = load_calibration(tmp_path / "c.json")
    with pytest.raises(CalibrationError, match="beside it"):
        found.check_files()
    for name in found.files:
        (tmp_path / name).write_bytes((source.parent / name).read_bytes()[:-5])
    with pytest.raises(CalibrationError, match="not the file that was written"):
        found.check_files()


def test_artifact_is_read_only(artifact: Path, tmp_path: Path) -> None:
    """Nothing is written beside the graphs."""
    before = set(artifact.iterdir())
    calibrate(artifact, [Text("t", TEXT)], tmp_path / "c.json", CalibrateOptions(WINDOWS, threads=1))
    assert set(artifact.iterdir()) == before
    Artifact.open(artifact).check_content()
