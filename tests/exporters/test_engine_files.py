"""Engines in an artifact: all of a build or nothing of it, whatever stops it. The builder is a double, which is fast,
except where a process is stopped at random."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import content, refusal, sentence, write_artifact
from trt_double import IHostMemory, TensorRTDouble

from rwkv_edge.artifact import Artifact
from rwkv_edge.cli import run
from rwkv_edge.engines import ENGINE_BACKENDS
from rwkv_edge.errors import ArtifactError, ExportError, InputError
from rwkv_edge.exporters import tensorrt
from rwkv_edge.exporters.tensorrt import BuildOptions, build_engines, write_engine
from rwkv_edge.exporters.trt_adapter import LoadedBackend
from rwkv_edge.plugins import nvrtc
from rwkv_edge.plugins import tensorrt as plugins

CHILD = """
import os, signal, sys
from pathlib import Path
from trt_double import TensorRTDouble
from rwkv_edge.engines import ENGINE_BACKENDS
from rwkv_edge.exporters import tensorrt
from rwkv_edge.exporters.trt_adapter import LoadedBackend
left, replace = [int(sys.argv[2])], Path.replace
def killed(self, target):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = killed
tensorrt.load_backend = lambda name: LoadedBackend(ENGINE_BACKENDS["tensorrt"], TensorRTDouble())
tensorrt.device_capability = lambda: (8, 7)
tensorrt.build_engines(sys.argv[1])
"""


def use_double(patch: pytest.MonkeyPatch, trt: TensorRTDouble | None = None) -> TensorRTDouble:
    """Build with a double of TensorRT on a machine with an sm87."""
    trt = trt or TensorRTDouble()
    patch.setattr(tensorrt, "load_backend", lambda name: LoadedBackend(ENGINE_BACKENDS["tensorrt"], trt))
    patch.setattr(tensorrt, "device_capability", lambda: (8, 7))
    return trt


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two artifacts, 'onnx' and 'function', and 'built', the first with engines; not to be written to."""
    folder = tmp_path_factory.mktemp("made")
    write_artifact(folder / "onnx", 0, "--chunk", "16")
    write_artifact(folder / "function", 0, "--wkv", "function")
    shutil.copytree(folder / "onnx", folder / "built")
    with pytest.MonkeyPatch.context() as patch:
        use_double(patch)
        patch.setattr(sys.modules["trt_double"], "IHostMemory", lambda data: IHostMemory(b"old " + data))
        build_engines(folder / "built")
    assert (folder / "built" / "step.engine").read_bytes() == b"old engine"
    return folder


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "built", tmp_path / "artifact"))


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> TensorRTDouble:
    return use_double(monkeypatch)


def check_whole(folder: Path) -> Artifact:
    """The artifact opens and everything that it lists is there."""
    artifact = Artifact.open(folder)
    artifact.check_content(*artifact.manifest.files)
    return artifact


# What stops a build


def test_a_build_that_ends_replaces_everything(artifact: Path, trt: TensorRTDouble) -> None:
    names = content(artifact).keys()
    assert run(["build", str(artifact)]) == 0
    assert content(artifact).keys() == names
    assert (artifact / "prefill-16.engine").read_bytes() == b"engine"
    assert [engine.targets for engine in check_whole(artifact).manifest.engines] == [("sm87",)] * 2


@pytest.mark.parametrize("error", [ExportError("no"), KeyboardInterrupt(), ValueError("a bug"), MemoryError()])
def test_a_failed_build_leaves_the_artifact_as_it_was(
    error: BaseException, artifact: Path, trt: TensorRTDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, written = content(artifact), tensorrt.write_engine

    def write(memory: Any, path: Path) -> Any:
        if path.name != "step.engine":  # the second of two
            raise error
        return written(memory, path)

    monkeypatch.setattr(tensorrt, "write_engine", write)
    with pytest.raises(type(error)):
        build_engines(artifact)
    assert content(artifact) == before


def test_a_full_disk_is_one_sentence(
    artifact: Path, trt: TensorRTDouble, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = content(artifact)
    monkeypatch.setattr(tensorrt, "write_engine", write)
    found = refusal(capsys, "build", artifact)
    assert found == f"{artifact} cannot be written: the disk is full; nothing was changed there"
    assert content(artifact) == before


def test_too_little_room_is_told_before_the_build(
    artifact: Path, trt: TensorRTDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 50, 50))  # type: ignore[attr-defined]
    with pytest.raises(ArtifactError, match=r"the engines need some [\d.]+ MB, but only 0\.0 MB are free there"):
        build_engines(artifact)
    assert trt.told.builds == 0


def test_a_folder_that_cannot_be_written(
    artifact: Path, trt: TensorRTDouble, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mkdir(self: Path, *_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", mkdir)  # root may write everywhere
    assert "artifact cannot be written: Permission denied; nothing was changed" in refusal(capsys, "build", artifact)
    assert trt.told.builds == 0


@pytest.mark.parametrize("moment", range(1, 7))
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_the_former_engines_return_if_the_exchange_fails(
    error: BaseException, moment: int, artifact: Path, trt: TensorRTDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exchange: the manifest without engines, two old engines, two new ones, the manifest."""
    before, replaced, left = content(artifact), Path.replace, [moment]

    def replace(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] == 0:
            raise error
        return replaced(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ArtifactError):
        build_engines(artifact)
    assert content(artifact) == before


@pytest.mark.skipif(os.name != "posix", reason="there is no kill -9")
@pytest.mark.parametrize("moment", range(1, 8))
def test_killed_during_the_exchange_the_artifact_is_whole(
    moment: int, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    child = [sys.executable, "-c", CHILD, artifact, str(moment)]
    done = subprocess.run(child, env=environment, capture_output=True, timeout=120)
    assert done.returncode == (-signal.SIGKILL if moment < 7 else 0), done.stderr.decode()
    found = check_whole(artifact).manifest.engines
    assert len(found) == (0 if 1 < moment < 7 else 2)  # before the manifest changes the old ones, after it the new
    assert run(["generate", str(artifact), "a", "-n", "1"]) == 0
    use_double(monkeypatch)
    assert run(["build", str(artifact)]) == 0
    assert len(check_whole(artifact).manifest.engines) == 2
    assert not list(artifact.glob(".build-*"))


@pytest.mark.skipif(os.name != "posix", reason="there is no kill -9")
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_stopped_at_random_the_artifact_is_whole(stop: int, made: Path, artifact: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    options = ["--backend", "tensorrt-rtx", "--target", "sm86"]
    command = [sys.executable, "-m", "rwkv_edge", "build", str(artifact), *options]
    for _ in range(3):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not list(artifact.glob(f".build-{child.pid}")) and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 1.5))
        child.send_signal(stop)
        out, err = child.communicate(timeout=120)
        if stop == signal.SIGINT and child.returncode:
            assert (child.returncode, out, err.strip()) == (130, b"", b"stopped")
            assert content(artifact).keys() == content(made / "built").keys()
        assert len(check_whole(artifact).manifest.engines) == 2 or stop == signal.SIGKILL


def test_leftovers_of_killed_builds_go_and_those_of_running_ones_stay(artifact: Path, trt: TensorRTDouble) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    for name in (f".build-{child.pid}", f".build-{os.getpid()}", f".build-{os.getppid()}", ".build-mine"):
        (artifact / name).mkdir()
    build_engines(artifact)
    assert sorted(path.name for path in artifact.glob(".build-*")) == [f".build-{os.getppid()}", ".build-mine"]


def test_an_artifact_that_was_exported_again_meanwhile_is_left_alone(
    artifact: Path, trt: TensorRTDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tensorrt.write_engine

    def write(memory: Any, path: Path) -> Any:
        manifest = json.loads((artifact / "manifest.json").read_text())
        manifest["model_hash"] = "0" * 64
        (artifact / "manifest.json").write_text(json.dumps(manifest))
        return written(memory, path)

    monkeypatch.setattr(tensorrt, "write_engine", write)
    with pytest.raises(ArtifactError, match="was exported again meanwhile"):
        build_engines(artifact)
    assert (artifact / "step.engine").read_bytes() == b"old engine"


def test_weights_that_were_changed_are_not_built(artifact: Path, trt: TensorRTDouble) -> None:
    data = (artifact / "weights.bin").read_bytes()
    (artifact / "weights.bin").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"weights\.bin is not the file that was exported"):
        build_engines(artifact)
    assert trt.told.builds == 0


# Large engines, plugins, timing caches


def test_an_engine_is_written_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(0).randbytes(100_003)
    monkeypatch.setattr(tensorrt, "BLOCK", 1 << 12)
    entry = write_engine(IHostMemory(data), tmp_path / "step.engine")
    assert (tmp_path / "step.engine").read_bytes() == data
    assert (entry.nbytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_plugin_takes_the_place_of_the_function(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(made / "function", tmp_path / "artifact"))
    trt = use_double(monkeypatch, TensorRTDouble("10.16.1.2", layers=[("PLUGIN_V3", "FLOAT")] * 2))
    registered: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(plugins, "register_plugins", lambda *arguments: registered.append(arguments))
        assert [engine.wkv for engine in build_engines(folder, BuildOptions(wkv="plugin")).engines] == ["plugin"]
    assert registered == [(trt, 87)]
    before = content(folder)
    trt.__name__ = "absent_trt"  # whose .plugin cannot be imported
    found = refusal(capsys, "build", folder, "--wkv", "plugin")
    assert "has no plugins that are compiled ahead of time (No module named 'absent_trt')" in found
    trt.__name__ = "plain_trt"
    known = SimpleNamespace(register=str, autotune=str, aot_impl=str)
    monkeypatch.setitem(sys.modules, "plain_trt.plugin", known)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)  # type: ignore[arg-type]
    nvrtc._nvrtc.cache_clear()
    found = refusal(capsys, "build", folder, "--wkv", "plugin")
    nvrtc._nvrtc.cache_clear()
    assert found == "compiling the CUDA kernels needs the package 'cuda-bindings': pip install 'rwkv-edge[cuda]'"
    assert content(folder) == before


def test_plugins_take_the_places_of_fused_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ten of two layers, and none in the chunks, which are in plain operators."""
    write_artifact(tmp_path / "fused", 0, "--wkv", "fused", "--chunk", "16")
    use_double(monkeypatch, TensorRTDouble("10.16.1.2", layers=[("PLUGIN_V3", "FLOAT")] * 10))
    monkeypatch.setattr(plugins, "register_plugins", lambda *arguments: None)
    engines = build_engines(tmp_path / "fused", BuildOptions(wkv="plugin")).engines
    assert [(engine.kind, engine.wkv) for engine in engines] == [("step", "plugin"), ("prefill", "inline")]
    use_double(monkeypatch, TensorRTDouble("10.16.1.2", layers=[("PLUGIN_V3", "FLOAT")] * 9))
    with pytest.raises(ExportError, match="took 9 plugins for 10 functions"):
        build_engines(tmp_path / "fused", BuildOptions(wkv="plugin"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--batch", "dynamic"),
            "compiles fused nodes for a fixed number of streams, but this artifact has --batch dyn",
        ),
        (("--batch", "9"), "carries 1 to 8 streams; found 9; build with --wkv fused"),
    ],
)
def test_fused_nodes_that_no_kernel_takes(
    options: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_artifact(tmp_path / "fused", 0, "--wkv", "fused", *options)
    trt = use_double(monkeypatch, TensorRTDouble("10.16.1.2"))
    assert words in refusal(capsys, "build", tmp_path / "fused", "--wkv", "plugin")
    assert trt.told.builds == 0


def test_a_timing_cache_is_kept(artifact: Path, trt: TensorRTDouble, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for times in (2, 4):
        assert run(["build", str(artifact), "--timing-cache", str(cache)]) == 0
        assert cache.read_bytes() == b"timed;" * times  # two graphs a build
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "cache"]


@pytest.mark.parametrize(
    ("place", "words"),
    [("missing/cache", "there is no such folder"), ("artifact", "Is a directory"), ("damaged", "is damaged, or of")],
)
def test_a_timing_cache_that_cannot_be(
    place: str, words: str, artifact: Path, trt: TensorRTDouble, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "damaged").write_bytes(b"damaged")
    before = content(tmp_path)
    assert words in refusal(capsys, "build", artifact, "--timing-cache", tmp_path / place)
    assert content(tmp_path) == before


def test_values_that_cannot_be_meant() -> None:
    for options in ({"workspace": 0}, {"opt_level": 6}, {"max_batch": 0}):
        with pytest.raises(InputError, match=r"must (be|have)"):
            BuildOptions(**options)


def test_a_failure_of_the_library_is_one_sentence(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_double(monkeypatch, TensorRTDouble(fails="build"))
    capsys.readouterr()
    code = run(["build", str(artifact)])
    assert "cannot build step.onnx for sm87: Error Code 2: out of memory" in sentence(code, capsys.readouterr().err)
