"""Snapshots: what is read back, what is refused, and what a kill leaves behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny import write_artifact, write_checkpoint

from rwkv_edge.cli import run
from rwkv_edge.errors import StateError
from rwkv_edge.runtime import atomic
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.session import open_session
from rwkv_edge.runtime.snapshot import KEY, History, check_target, load_snapshot, read_snapshot, save_snapshot


def saved(session: OrtSession, path: Path, text: bytes = b"abc") -> Path:
    state = session.initial_state()
    session.prefill([list(text)], state)
    save_snapshot(path, session, state, [History().after(list(text))])
    return path


# Round trips


@pytest.mark.parametrize("name", ["many", "half"])
@pytest.mark.parametrize("batch", [1, 3])
def test_round_trip(name: str, batch: int, artifacts: Path, tmp_path: Path) -> None:
    session = open_session(artifacts / name, threads=1)
    tokens = np.random.default_rng(0).integers(0, 256, (batch, 9))
    state = session.initial_state(batch)
    session.prefill(tokens, state)
    streams = tuple(History().after(row.tolist(), [b]) for b, row in enumerate(tokens))
    extra, notes = {"logits": np.arange(3.0)}, {"who": ["me", None, 1.5]}
    save_snapshot(tmp_path / "state", session, state, streams, extra=extra, notes=notes)
    found = load_snapshot(tmp_path / "state", session)
    assert found.streams == streams
    assert found.streams[-1].tokens == 9
    assert found.streams[-1].last == tuple(tokens[-1])
    assert found.notes == notes
    assert np.array_equal(found.extra["logits"], extra["logits"])
    assert (found.version, found.precision) == ("7", session.spec.precision)
    again = session.import_state(found.arrays)
    for token in (1, 2):
        assert np.array_equal(session.step([token] * batch, again), session.step([token] * batch, state))


def test_bfloat16_is_kept_exactly(tmp_path: Path) -> None:
    session = open_session(write_artifact(tmp_path / "artifact", 0, "--precision", "bf16"), threads=1)
    path = saved(session, tmp_path / "state")
    again = session.import_state(load_snapshot(path, session).arrays)
    state = session.initial_state()
    session.prefill([list(b"abc")], state)
    assert np.array_equal(session.step([9], again), session.step([9], state))


def test_history() -> None:
    history = History().after(range(100), [7])
    assert (history.tokens, history.last, history.pending) == (100, tuple(range(36, 100)), (7,))
    history = history.after([7, 8])
    assert (history.tokens, history.last[-3:], history.pending) == (102, (99, 7, 8), ())


def test_a_link_stays_a_link(session: OrtSession, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target = saved(session, tmp_path / "there" / "state", b"a")
    (tmp_path / "link").symlink_to(target)
    saved(session, tmp_path / "link", b"abcd")
    assert (tmp_path / "link").is_symlink()
    assert read_snapshot(target).streams[0].tokens == 4


def test_the_checkpoint_is_not_needed(artifacts: Path, tmp_path: Path) -> None:
    """The same weights exported twice are the same model."""
    write_checkpoint(tmp_path / "again.pth")
    assert run(["export", str(tmp_path / "again.pth"), "-o", str(tmp_path / "again"), "--chunk", "0"]) == 0
    path = saved(open_session(artifacts / "one", threads=1), tmp_path / "state")
    assert load_snapshot(path, open_session(tmp_path / "again", threads=1)).streams[0].tokens == 3


# Refusals


def test_another_model(session: OrtSession, artifacts: Path, tmp_path: Path) -> None:
    path = saved(session, tmp_path / "state")
    for name in ("other", "half"):
        with pytest.raises(StateError, match="state of another model"):
            load_snapshot(path, open_session(artifacts / name, threads=1))
    with pytest.raises(StateError, match=r"another tuned initial state: none, expected [0-9a-f]{12}"):
        load_snapshot(path, open_session(artifacts / "tuned", threads=1))
    assert load_snapshot(path, open_session(artifacts / "many", threads=1)).streams[0].tokens == 3  # the same weights


def test_every_cut_is_refused(session: OrtSession, tmp_path: Path) -> None:
    content = saved(session, tmp_path / "state").read_bytes()
    for length in [*range(0, 4000, 97), *range(4000, len(content), len(content) // 50), len(content) - 1]:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(StateError, match=r"no snapshot, or was cut|not a snapshot"):
            load_snapshot(tmp_path / "cut", session)


def test_every_flipped_byte_is_refused(session: OrtSession, tmp_path: Path) -> None:
    content = saved(session, tmp_path / "state").read_bytes()
    places = np.random.default_rng(0).integers(0, len(content), 150)
    for place in {*range(0, 900, 11), *places.tolist()}:
        flipped = bytearray(content)
        flipped[place] ^= 0x04
        (tmp_path / "flipped").write_bytes(flipped)
        try:
            found = load_snapshot(tmp_path / "flipped", session)
        except StateError:
            continue
        expected = load_snapshot(tmp_path / "state", session)  # JSON has spaces that mean nothing
        assert found.streams == expected.streams
        assert all(np.array_equal(array, expected.arrays[name]) for name, array in found.arrays.items())


def rewritten(path: Path, **changes: object) -> Path:
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()[KEY])
    save_file(tensors, path, metadata={KEY: json.dumps({**facts, **changes})})
    return path


def test_what_is_no_snapshot(session: OrtSession, tmp_path: Path) -> None:
    cases = {
        "absent": "does not exist",
        "folder": "is not a file",
        "text": "no snapshot, or was cut",
        "weights": "is not a snapshot",
        "newer": "has format version 2, expected 1",
        "edited": "is damaged",
        "scrambled": "is damaged",
    }
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("hello " * 50)
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "weights")
    rewritten(saved(session, tmp_path / "newer"), format_version=2)
    rewritten(saved(session, tmp_path / "edited"), streams=[])
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "scrambled", metadata={KEY: "[1, {"})
    for name, sentence in cases.items():
        with pytest.raises(StateError, match=sentence):
            load_snapshot(tmp_path / name, session)


def test_states_that_cannot_be_meant_are_not_saved(session: OrtSession, tmp_path: Path) -> None:
    path = saved(session, tmp_path / "state")
    content = path.read_bytes()
    arrays = session.export_state(session.initial_state())
    bad = {
        "holds NaN": arrays | {"wkv.1": np.full_like(arrays["wkv.1"], np.nan)},
        "has shape": arrays | {"att_shift.0": arrays["att_shift.0"][:, 1:]},
        "lacks": {name: array for name, array in arrays.items() if name != "wkv.0"},
    }
    for sentence, state in bad.items():
        with pytest.raises(StateError, match=f"was not written: .*{sentence}"):
            save_snapshot(path, session, state, [History()])
    with pytest.raises(StateError, match="but there are 2 histories"):
        save_snapshot(path, session, arrays, [History(), History()])
    assert path.read_bytes() == content


def test_nan_and_other_shapes_in_a_file(
    session: OrtSession, artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = session.export_state(session.initial_state())
    bad = {
        "'wkv.1' holds NaN": arrays | {"wkv.1": np.full_like(arrays["wkv.1"], np.nan)},
        "'wkv.0' has shape": arrays | {"wkv.0": arrays["wkv.0"][..., 1:].copy()},
    }
    for sentence, state in bad.items():
        with monkeypatch.context() as patch:
            patch.setattr("rwkv_edge.runtime.snapshot.stored_from_named", lambda *arguments: None)
            save_snapshot(tmp_path / "state", session, state, [History()])
        with pytest.raises(StateError, match=sentence):
            load_snapshot(tmp_path / "state", session)


def test_a_bare_graph_has_no_snapshots(artifacts: Path, session: OrtSession, tmp_path: Path) -> None:
    bare = open_session(artifacts / "one" / "step.onnx", threads=1)
    with pytest.raises(StateError, match="open its folder"):
        save_snapshot(tmp_path / "state", bare, bare.initial_state(), [History()])
    with pytest.raises(StateError, match="open its folder"):
        load_snapshot(saved(session, tmp_path / "state"), bare)


# Files that cannot be written


def test_places_that_cannot_be_written(session: OrtSession, tmp_path: Path) -> None:
    for path, sentence in (
        (tmp_path, "a folder or a device"),
        (tmp_path / "absent" / "state", "there is no folder"),
        (Path("/dev/null"), "a folder or a device"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(StateError, match=sentence):
            saved(session, path)
    with pytest.raises(StateError, match="there is no folder"):
        check_target(tmp_path / "absent" / "state")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["write", "fsync", "replace"])
def test_a_full_disk(place: str, session: OrtSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(session, tmp_path / "state", b"former")
    content = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if place == "write":
            patch.setattr(atomic.os, "fdopen", lambda descriptor, mode: FullFile(descriptor))
        elif place == "fsync":
            patch.setattr(atomic.os, "fsync", full)
        else:
            patch.setattr(Path, "replace", full)
        with pytest.raises(StateError, match="the disk is full; nothing was changed there"):
            saved(session, path, b"later")
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


class FullFile:
    def __init__(self, descriptor: int) -> None:
        os.close(descriptor)

    def __enter__(self) -> FullFile:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


LIMITED = """
import resource, sys
from rwkv_edge.cli import run
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(run(sys.argv[1:]))
"""


def test_a_file_system_that_takes_no_more(artifacts: Path, session: OrtSession, tmp_path: Path) -> None:
    path = saved(session, tmp_path / "state", b"former")
    content = path.read_bytes()
    arguments = ["generate", str(artifacts / "one"), "x", "-n", "3", "--threads", "1", "--state-out", str(path)]
    done = subprocess.run([sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("cannot be written: File too large; nothing was changed there")
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


# Kills

KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from rwkv_edge.runtime.snapshot import KEY, History, read_snapshot, save_snapshot
from rwkv_edge.spec import ModelSpec, StateTensor
spec = ModelSpec("7", 1, 8, 8, 8, 1, 8, 256, "fp32", None, (StateTensor("wkv.0", (200_000,), "float32"),))
session = SimpleNamespace(spec=spec, model_hash="0" * 64, initial_hash=None)
folder = Path(sys.argv[1])
path = folder / "state"

def write(number):
    save_snapshot(path, session, {"wkv.0": np.full((1, 200_000), number, np.float32)}, [History(number)])

random.seed(0)
write(0)
torn = 0
for turn in range(50):
    child = os.fork()
    if child == 0:
        number = read_snapshot(path).streams[0].tokens
        while True:
            number += 1
            write(number)
    time.sleep(random.uniform(0.005, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = read_snapshot(path)
    assert (found.arrays["wkv.0"] == found.streams[0].tokens).all()
    left = len(list(folder.iterdir())) - 1
    assert left <= 1, sorted(folder.iterdir())
    torn += left
write(0)
assert list(folder.iterdir()) == [path]
print(json.dumps({"torn": torn, "written": found.streams[0].tokens}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fifty_kills_while_it_is_written(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLER, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["torn"] > 5  # kills that met a file half written
    assert counts["written"] > 5


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    descriptor, scratch = atomic._new_scratch(tmp_path / "state")
    atomic.write_whole(tmp_path / "state", b"x")
    atomic.write_whole(tmp_path / "state", b"y")
    assert scratch.exists()
    os.close(descriptor)
    atomic.write_whole(tmp_path / "state", b"z")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
