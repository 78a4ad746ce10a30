"""The exported folder: replaced whole or not at all, nothing else of the user's is touched, and damage is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from tiny import STEP_ONLY, content, refusal, weights, write_artifact

from rwkv_edge.artifact import Artifact
from rwkv_edge.cli import run
from rwkv_edge.errors import ArtifactError, SessionError
from rwkv_edge.evaluation.synthetic import Shape7, random_v7, save_pth
from rwkv_edge.exporters.folder import artifact_folder
from rwkv_edge.runtime import onnxruntime as backend
from rwkv_edge.runtime.session import open_session


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two artifacts of the same shape, 'a' and 'b', and their checkpoints; not to be written to."""
    folder = tmp_path_factory.mktemp("made")
    write_artifact(folder / "a", 0)
    write_artifact(folder / "b", 1)
    return folder


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "a", tmp_path / "artifact"))


@pytest.fixture(scope="module")
def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def edit(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


# Writing


def fail_half_way(target: Path, error: BaseException) -> None:
    with artifact_folder(target, 0) as folder:
        (folder / "weights.bin").write_bytes(b"half")
        raise error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("a bug")])
def test_a_failed_export_leaves_the_target_as_it_was(error: BaseException, artifact: Path) -> None:
    before = content(artifact.parent)
    with pytest.raises(ArtifactError if isinstance(error, OSError) else type(error)):
        fail_half_way(artifact, error)
    assert content(artifact.parent) == before


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"artifact cannot be written: the disk is full; nothing was changed"):
        fail_half_way(tmp_path / "artifact", OSError(28, "No space left on device"))


def test_more_than_the_free_space_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"artifact needs 1000000000000\.0 MB, but only [\d.]+ MB are free"),
        artifact_folder(tmp_path / "new" / "artifact", 10**18),
    ):
        pytest.fail("the block must not run")
    assert not list(tmp_path.iterdir())


def test_folders_made_for_a_failed_export_are_removed_again(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(ValueError, match="a bug"):
        fail_half_way(tmp_path / "old" / "new" / "deep" / "artifact", ValueError("a bug"))
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]


@pytest.mark.parametrize("moment", ["before the first", "before the second"])
def test_the_former_artifact_returns_if_the_exchange_fails(
    moment: str, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, renamed, left = content(artifact.parent), Path.rename, [0 if moment == "before the first" else 1]

    def rename(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(5, "Input/output error")
        return renamed(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with (
        pytest.raises(ArtifactError, match="Input/output error; nothing was changed"),
        artifact_folder(artifact, 0) as folder,
    ):
        (folder / "manifest.json").write_text("{}")
    assert content(artifact.parent) == before


FOREIGN = {
    "text": {"notes.txt": "mine"},
    "a web extension": {"manifest.json": '{"name": "extension"}', "background.js": "1"},
    "its manifest alone": {"manifest.json": '{"name": "extension"}'},
    "another tool's model": {"model.onnx": "1", "weights.bin": "2"},
    "graphs without weights": {"step.onnx": "1"},
    "a checkpoint": {"model.safetensors": "1", "tokenizer.json": "{}"},
    "a folder in it": {"src/main.py": "1"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_of_something_else_is_left_alone(
    name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, text in FOREIGN[name].items():
        (tmp_path / "mine" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / file).write_text(text)
    before = content(tmp_path)
    found = refusal(capsys, "export", made / "a.pth", "-o", tmp_path / "mine")
    assert "mine exists and is a folder " in found
    assert "so it is left alone; choose another folder" in found
    assert content(tmp_path) == before


@pytest.mark.parametrize("damage", ["whole", "damaged"])
def test_what_the_user_put_beside_an_artifact_is_left_alone(
    damage: str, artifact: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (artifact / "my-state.safetensors").write_text("mine")
    if damage == "damaged":
        (artifact / "manifest.json").write_text("{")
    before = content(artifact)
    assert "holds 'my-state.safetensors'" in refusal(capsys, "export", made / "b.pth", "-o", artifact)
    assert content(artifact) == before


@pytest.mark.parametrize(
    "state", ["whole", "cut manifest", "no manifest", "cut weights", "of an older format", "empty"]
)
def test_an_artifact_is_replaced_even_if_it_is_damaged(state: str, artifact: Path, made: Path) -> None:
    manifest = (artifact / "manifest.json").read_bytes()
    if state == "cut manifest":
        (artifact / "manifest.json").write_bytes(manifest[: len(manifest) // 2])
    elif state == "no manifest":
        (artifact / "manifest.json").unlink()
    elif state == "cut weights":
        (artifact / "weights.bin").write_bytes(b"")
    elif state == "of an older format":
        edit(artifact, lambda manifest: manifest.update(format_version=0, files={"old-graph.onnx": {}}))
        (artifact / "old-graph.onnx").write_bytes(b"")
    elif state == "empty":
        shutil.rmtree(artifact)
        artifact.mkdir()
    assert run(["export", str(made / "b.pth"), "-o", str(artifact), *STEP_ONLY]) == 0
    assert content(artifact).keys() == content(made / "b").keys()
    assert (artifact / "weights.bin").read_bytes() == (made / "b" / "weights.bin").read_bytes()
    assert [path.name for path in artifact.parent.iterdir()] == ["artifact"]


@pytest.mark.skipif(os.name != "posix", reason="links need rights there")
def test_a_link_to_an_artifact_stays_a_link(artifact: Path, made: Path) -> None:
    link = artifact.parent / "link"
    link.symlink_to(artifact.name)
    assert run(["export", str(made / "b.pth"), "-o", str(link), *STEP_ONLY]) == 0
    assert link.is_symlink()
    assert (artifact / "weights.bin").read_bytes() == (made / "b" / "weights.bin").read_bytes()
    assert sorted(path.name for path in artifact.parent.iterdir()) == ["artifact", "link"]


@pytest.mark.parametrize("name", ["artifact", "[a]*", "a**b"])
def test_leftovers_of_killed_exports_go_and_those_of_running_ones_stay(
    name: str, dead_pid: int, made: Path, tmp_path: Path
) -> None:
    dead = tmp_path / f".{name}.partial-{dead_pid}"
    same = tmp_path / f".{name}.partial-{os.getpid()}"  # in containers every export may have the same number
    running = tmp_path / f".{name}.partial-{os.getppid()}"
    others = [tmp_path / f".other.partial-{dead_pid}", tmp_path / f".{name}.partial-mine"]
    for folder in (dead, same, running, *others):
        folder.mkdir()
        (folder / "weights.bin").write_bytes(b"half")
    assert run(["export", str(made / "a.pth"), "-o", str(tmp_path / name), *STEP_ONLY]) == 0
    assert sorted(tmp_path.iterdir()) == sorted([running, *others, tmp_path / name])


def test_an_artifact_that_a_killed_export_had_moved_away_returns(dead_pid: int, artifact: Path) -> None:
    before = content(artifact)
    artifact.rename(artifact.parent / f".artifact.partial-{dead_pid}.former")
    with pytest.raises(ValueError, match="this one fails"):
        fail_half_way(artifact, ValueError("this one fails too"))
    assert content(artifact) == before


# Opening


def refused(artifact: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """`generate` refuses the artifact, naming it."""
    found = refusal(capsys, "generate", artifact, "a", "-n", "2")
    for word in (str(artifact), *words):
        assert word in found


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (lambda m: m.update(format_version=2), "has format version 2, expected 1"),
    "other format": (lambda m: m.update(format="x"), "is not the manifest of an rwkv-edge artifact"),
    "outside": (lambda m: m["files"].update({"../x": m["files"]["step.onnx"]}), "file name '../x' leaves the folder"),
    "graph outside": (lambda m: m["graphs"][0].update(file="/etc/passwd"), "'/etc/passwd' leaves the folder"),
    "tokenizer outside": (lambda m: m["tokenizer"].update(file="../x"), "'../x' leaves the folder"),
    "hidden": (lambda m: m["files"].update({"..": m["files"]["step.onnx"]}), "'..' leaves the folder"),
    "no weights": (lambda m: m["files"].pop("weights.bin"), "does not list 'weights.bin'"),
    "no size": (lambda m: m["files"]["step.onnx"].pop("nbytes"), "lacks 'nbytes'"),
    "size of another type": (lambda m: m["files"]["step.onnx"].update(nbytes="1"), "nbytes is '1', not a count"),
    "hash": (lambda m: m["files"]["step.onnx"].update(sha256=1), "a sha256 is 1"),
    "short hash": (lambda m: m.update(model_hash="12"), "not 64 hex digits"),
    "no spec": (lambda m: m.pop("spec"), "lacks 'spec'"),
    "huge": (lambda m: m["spec"].update(n_embd=10**30), "not a count"),
    "infinite": (lambda m: m["spec"]["state"][0].update(shape=[float("inf")]), "is damaged"),
    "huge state": (lambda m: m["spec"]["state"][0].update(shape=[2**30] * 9), "not a count"),
    "batch": (lambda m: m["spec"].update(batch="two"), "is damaged"),
    "extra": (lambda m: m["spec"].update(extra=[]), "extra is [], not an object"),
    "parameters": (lambda m: m["source"].update(parameters="many"), "parameters is 'many', not a count"),
    "no graph": (lambda m: m.update(graphs=[]), "holds no step graph for cpu"),
    "graph of another form": (lambda m: m["graphs"].append(3), "but is 3"),
    "unlisted graph": (lambda m: m["files"].pop("step.onnx"), "does not list 'step.onnx'"),
    "other model": (lambda m: m["spec"].update(n_ffn=8), "describes another model than step.onnx"),
    "other start": (lambda m: m["spec"]["state"][0].update(fill=1.0), "describes another model than step.onnx"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_cannot_be_meant(name: str, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = MANIFESTS[name]
    edit(artifact, change)
    refused(artifact, capsys, words)
    code = run(["info", str(artifact), "--no-probe"])
    assert (code, capsys.readouterr().err.count("\n")) in ((0, 0), (1, 1))


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"\x00"])
def test_a_manifest_that_is_not_json(text: bytes, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (artifact / "manifest.json").write_bytes(text)
    refused(artifact, capsys, "manifest.json is")
    assert "manifest.json is" in refusal(capsys, "info", artifact, "--no-probe")


@pytest.mark.parametrize("name", ["manifest.json", "step.onnx", "weights.bin"])
def test_a_file_of_another_artifact(name: str, artifact: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Same shapes, same sizes: only the hashes tell."""
    if name == "step.onnx":  # graphs of one shape are the same, so take one of another shape but its size
        (artifact / name).write_bytes((artifact / name).read_bytes()[::-1])
    else:
        shutil.copy(made / "b" / name, artifact / name)
    blamed = "weights.bin" if name == "manifest.json" else name
    refused(artifact, capsys, f"{blamed} is not the file that was exported", "expected", "export the checkpoint again")


@pytest.mark.parametrize("name", ["step.onnx", "weights.bin"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer", "folder"])
def test_a_damaged_file(name: str, damage: str, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = artifact / name
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "cut": data[:-1], "longer": data + b"\0"}[damage])
    expected = "is missing" if damage == "missing" else f"expected {len(data)}"
    refused(artifact, capsys, str(path), expected)
    assert str(path) in refusal(capsys, "info", artifact, "--no-probe")


def test_no_manifest_no_artifact(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (artifact / "manifest.json").unlink()
    refused(artifact, capsys, "has no manifest.json")


def test_a_damaged_graph_does_not_reach_the_parser(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = artifact / "step.onnx"
    graph.write_bytes(bytes([graph.read_bytes()[0] ^ 1]) + graph.read_bytes()[1:])
    monkeypatch.setattr(backend, "open_graph", lambda *_: pytest.fail("ONNX Runtime must not see this file"))
    with pytest.raises(ArtifactError, match=r"step\.onnx is not the file that was exported"):
        open_session(artifact)


def test_a_damaged_vocabulary_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One changed byte can make another valid vocabulary, which would spell another text."""
    lines = [f"{i + 1} {(chr(i) if i < 128 else bytes([i]))!r} 1" for i in range(256)]
    (tmp_path / "vocabulary.txt").write_text("\n".join(lines) + "\n")
    checkpoint = save_pth(random_v7(Shape7(1, 64, 300)), tmp_path / "model.pth")
    target, vocabulary = tmp_path / "artifact", tmp_path / "artifact" / "vocabulary.txt"
    options = ["--tokenizer", str(tmp_path / "vocabulary.txt"), *STEP_ONLY]
    assert run(["export", str(checkpoint), "-o", str(target), *options]) == 0
    assert run(["generate", str(target), "a", "-n", "1"]) == 0
    vocabulary.write_bytes(vocabulary.read_bytes().replace(b"98 'a'", b"98 '?'").replace(b"64 '?'", b"64 'a'"))
    monkeypatch.setattr("rwkv_edge.runtime.open.load_tokenizer", lambda *_: pytest.fail("it must not be read"))
    refused(target, capsys, f"{vocabulary} is not the file that was exported")


def test_a_bare_graph_that_is_damaged(artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    graph = artifact / "step.onnx"
    data = graph.read_bytes()
    graph.write_bytes(data[: len(data) // 2])
    with pytest.raises(SessionError, match=f"ONNX Runtime cannot open {re.escape(str(graph))}"):
        open_session(graph)
    graph.write_bytes(data.replace(b'"n_layer": 2', b'"n_layer": \xff'))
    with pytest.raises(SessionError, match=r"step\.onnx"):
        open_session(graph)
    graph.write_bytes(data.replace(b'"fill": 0.0', b'"fill": 1e9', 1))
    with pytest.raises(ArtifactError, match=r"describes another model"):
        open_session(artifact, check_content=False)
    graph.write_bytes(data.replace(b"blocks.0.att.key", b"blocks.0.att.ke\xff", 1))
    with pytest.raises(SessionError, match=r"step\.onnx"):
        open_session(graph)
    assert capfd.readouterr().out == ""  # ONNX Runtime's own retry would print where the text goes


def test_opening_reports_one_artifact(artifact: Path) -> None:
    assert Artifact.open(artifact).manifest.spec.n_layer == 2
    Artifact.open(artifact).check_content()
    with pytest.raises(ArtifactError, match="does not list 'other'"):
        Artifact.open(artifact).check_content("other")


def test_a_source_whose_name_is_not_text(tmp_path: Path) -> None:
    """Bytes of a file name that are no UTF-8 must not reach manifest.json as such."""
    if sys.platform != "linux":
        pytest.skip("file names are Unicode there")
    checkpoint = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.safetensors"))
    save_file(weights(), tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").rename(checkpoint)
    assert run(["export", str(checkpoint), "-o", str(tmp_path / "artifact"), *STEP_ONLY]) == 0
    assert Artifact.open(tmp_path / "artifact").manifest.source["file"] == "m\udcff.safetensors"
