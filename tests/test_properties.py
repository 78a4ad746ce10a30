"""Whatever bytes of a file are flipped, cut or replaced: an answer or one sentence, never a traceback, never a crash.

The cases are the same in every run; a longer search: raise `SEARCH.max_examples`, and drop ``derandomize``.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import STEP_ONLY, content, sentence, weights, write_artifact

from rwkv_edge.cli import run
from rwkv_edge.errors import RwkvEdgeError
from rwkv_edge.runtime.session import open_session

SEARCH = settings(
    max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """artifact/, artifact.pth and artifact.safetensors of one model; not to be written to."""
    folder = tmp_path_factory.mktemp("made")
    write_artifact(folder / "artifact")
    save_file(weights(), folder / "artifact.safetensors")
    return folder


@dataclass(frozen=True)
class Damage:
    """A cut at a share of the length, or bytes replaced at shares of the length."""

    cut: float | None
    flips: tuple[tuple[float, int], ...]

    def applied(self, data: bytes) -> bytes:
        changed = bytearray(data)
        for place, value in self.flips:
            changed[int(place * len(data))] ^= value
        return bytes(changed if self.cut is None else changed[: int(self.cut * len(data))])


PLACE = st.floats(0, 1, exclude_max=True)
FLIPS = st.lists(st.tuples(PLACE, st.integers(1, 255)), min_size=1, max_size=8).map(tuple)
DAMAGE = st.builds(Damage, st.none(), FLIPS) | st.builds(Damage, PLACE, st.just(()))

ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        None, True, -1, 0, 1, 1.5, 2**31, 2**63, 10**30, float("inf"), float("nan"), "", "x", "\ud800", "\x1b[2J\n",
        "../x", "/etc/passwd", "weights.bin", "step.onnx", [], [1], {}, {"a": 1}, [[]], ["x"] * 3,
    ]
)  # fmt: skip


def changed_json(data: st.DataObject, value: Any) -> Any:
    """``value`` with something in it replaced, removed or added."""
    inside = isinstance(value, (dict, list)) and value and data.draw(st.integers(0, 5), "descend")
    if not inside:
        return data.draw(ODD, "instead")
    copy: Any = value.copy()
    key = data.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))), "key")
    if data.draw(st.integers(0, 7), "remove") == 0:
        del copy[key]
    else:
        copy[key] = changed_json(data, value[key])
    return copy


def answer(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and error of the command line, which are an answer or one sentence that names its last path."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    if code:
        sentence(code, err.getvalue())
    return code, err.getvalue()


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def check_checkpoint(made: Path, suffix: str, data: bytes) -> None:
    """`info` and `export` agree on a damaged file; a refused export leaves the artifact that stands there alone."""
    with folder() as place:
        path = place / f"model{suffix}"
        path.write_bytes(data)
        target = Path(shutil.copytree(made / "artifact", place / "artifact"))
        before = content(place)
        told = answer("info", path, "--no-probe")
        made_it = answer("export", path, "-o", target, "--tokenizer", "none", *STEP_ONLY)
        assert told[0] == made_it[0]
        if told[0]:
            assert told == made_it
            assert str(path) in told[1]
            assert content(place) == before
        else:
            answer("generate", target, "a", "-n", "2", "--tokenizer", "bytes")
            assert sorted(entry.name for entry in place.iterdir()) == ["artifact", path.name]


def check_artifact(target: Path) -> int:
    """`info` and `generate` answer or refuse by one sentence that names the folder."""
    for command in (["info", target, "--no-probe"], ["info", target, "--no-probe", "--json"]):
        code, error = answer(*command)
        assert not code or str(target) in error
    code, error = answer("generate", target, "a", "-n", "2")
    assert not code or str(target) in error or "tokenizer in the manifest" in error
    return code


@SEARCH
@given(damage=DAMAGE)
def test_pth(damage: Damage, made: Path) -> None:
    check_checkpoint(made, ".pth", damage.applied((made / "artifact.pth").read_bytes()))


@SEARCH
@given(damage=DAMAGE)
def test_records_and_directory_of_pth(damage: Damage, made: Path) -> None:
    """Most of a file is weights, so these strike the first record and the directory at the end."""
    data = (made / "artifact.pth").read_bytes()
    with zipfile.ZipFile(made / "artifact.pth") as archive:
        middle = archive.infolist()[1].header_offset, archive.start_dir
    check_checkpoint(
        made, ".pth", damage.applied(data[: middle[0]]) + data[slice(*middle)] + damage.applied(data[middle[1] :])
    )


@SEARCH
@given(damage=DAMAGE)
def test_pickle_in_pth(damage: Damage, made: Path) -> None:
    """With the right checksum, so that the unpickler sees it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(made / "artifact.pth") as source, zipfile.ZipFile(packed, "w") as target:
        for name in source.namelist():
            record = source.read(name)
            target.writestr(name, damage.applied(record) if name.endswith("data.pkl") else record)
    check_checkpoint(made, ".pth", packed.getvalue())


@SEARCH
@given(damage=DAMAGE)
def test_header_of_safetensors(damage: Damage, made: Path) -> None:
    data = (made / "artifact.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    check_checkpoint(made, ".safetensors", damage.applied(data[:end]) + data[end:])


@SEARCH
@given(data=st.data())
def test_values_in_the_header_of_safetensors(data: st.DataObject, made: Path) -> None:
    stored = (made / "artifact.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", stored[:8])[0]
    header = json.dumps(changed_json(data, json.loads(stored[8:end]))).encode()
    check_checkpoint(made, ".safetensors", struct.pack("<Q", len(header)) + header + stored[end:])


@SEARCH
@given(damage=DAMAGE)
def test_cut_safetensors(damage: Damage, made: Path) -> None:
    check_checkpoint(made, ".safetensors", damage.applied((made / "artifact.safetensors").read_bytes()))


@SEARCH
@given(damage=DAMAGE, name=st.sampled_from(["step.onnx", "weights.bin", "weights.json"]))
def test_files_of_an_artifact(damage: Damage, name: str, made: Path) -> None:
    """They are refused by their hash or size, whatever was changed."""
    with folder() as place:
        target = Path(shutil.copytree(made / "artifact", place / "artifact"))
        intact = (target / name).read_bytes()
        (target / name).write_bytes(damage.applied(intact))
        assert check_artifact(target) == (0 if damage.applied(intact) == intact else 1)
        if damage.applied(intact) != intact:
            assert str(target / name) in answer("generate", target, "a")[1]


@SEARCH
@given(damage=DAMAGE)
def test_manifest(damage: Damage, made: Path) -> None:
    with folder() as place:
        target = Path(shutil.copytree(made / "artifact", place / "artifact"))
        (target / "manifest.json").write_bytes(damage.applied((target / "manifest.json").read_bytes()))
        check_artifact(target)


@SEARCH
@given(data=st.data())
def test_values_in_the_manifest(data: st.DataObject, made: Path) -> None:
    with folder() as place:
        target = Path(shutil.copytree(made / "artifact", place / "artifact"))
        path = target / "manifest.json"
        path.write_text(json.dumps(changed_json(data, json.loads(path.read_text()))))
        check_artifact(target)


@SEARCH
@given(damage=DAMAGE, name=st.sampled_from(["step.onnx", "weights.bin"]))
def test_a_bare_graph_has_no_hash(damage: Damage, name: str, made: Path) -> None:
    """Here ONNX Runtime itself sees the damage."""
    with folder() as place:
        target = Path(shutil.copytree(made / "artifact", place / "artifact"))
        (target / name).write_bytes(damage.applied((target / name).read_bytes()))
        with contextlib.suppress(RwkvEdgeError):
            session = open_session(target / "step.onnx")
            session.step([1], session.initial_state())
            session.close()
