"""The wheel: made of a clean copy by way of the source archive, as `python -m build` does; whole; and it runs alone."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "build", "dist", "artifacts", "*.egg-info", "tests", "benchmarks", "examples", "docs"
)
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def built(kind: str, source: Path, target: Path) -> Path:
    """What the build backend makes of a source tree: 'build_sdist' or 'build_wheel'."""
    command = [sys.executable, "-c", BUILD, kind, str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


def test_the_source_archive_holds_what_the_tests_need(tmp_path: Path) -> None:
    """Helpers of the tests, pages, scripts: all that git knows but its own files."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or importlib.util.find_spec("setuptools") is None:
        pytest.skip("no git checkout, or no setuptools")
    known = {name for name in listed.stdout.splitlines() if name[0] != "." and (ROOT / name).is_file()}
    for name in known:
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / "clone" / name)
    with tarfile.open(built("build_sdist", tmp_path / "clone", tmp_path)) as opened:
        held = {member.name.partition("/")[2] for member in opened.getmembers()}
    assert {"tests/conftest.py", "MANIFEST.in"} < known
    assert known <= held


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked source archive of a copy that holds no earlier build."""
    try:
        if int(version("setuptools").partition(".")[0]) < 77:
            pytest.skip("the build needs setuptools 77, which pip would download")
    except PackageNotFoundError:
        pytest.skip("the build needs setuptools, which pip would download")
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "clone", ignore=LEFT_OUT)
    archive = built("build_sdist", folder / "clone", folder)
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return built("build_wheel", source, folder)


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone; its dependencies are those of this interpreter, found after it."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    found = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(found), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=120)
    if "No module named pip" in done.stderr:
        pytest.skip("there is no pip beside this interpreter")
    assert done.returncode == 0, done.stderr
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([str(found), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return found


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
        (metadata,) = (opened.read(name).decode() for name in opened.namelist() if name.endswith("/METADATA"))
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "rwkv_edge").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert {
        "rwkv_edge/py.typed",
        "rwkv_edge/plugins/kernels/wkv7_step.cu",
        "rwkv_edge/plugins/kernels/common.cuh",
    } <= names
    assert any(name.startswith("rwkv_edge/data/demo/") and name.endswith(".safetensors") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: torch" in metadata  # with its extra only:
    assert all("extra ==" in line for line in metadata.splitlines() if line.startswith("Requires-Dist: torch"))


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel(python: Path, tmp_path: Path) -> None:
    command = python.with_name("rwkv-edge.exe" if os.name == "nt" else "rwkv-edge")
    quick = os.environ | {"OMP_NUM_THREADS": "1"}  # of torch: threads that wait for each other on a busy machine
    done = subprocess.run([str(command), "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=240, env=quick)
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout
    assert (tmp_path / "rwkv-edge-demo" / "manifest.json").is_file()


def test_kernels_and_types_are_found_in_the_wheel(python: Path, tmp_path: Path) -> None:
    code = (
        "import json, pathlib, rwkv_edge\nfrom rwkv_edge.plugins.nvrtc import kernel_text\n"
        "root = pathlib.Path(rwkv_edge.__file__).parent\n"
        "print(json.dumps([str(root), (root / 'py.typed').is_file(), kernel_text('wkv7_step.cu')]))"
    )
    done = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    root, typed, kernel = json.loads(done.stdout)
    assert Path(root).is_relative_to(python.parents[1])
    assert typed
    assert kernel == (ROOT / "rwkv_edge" / "plugins" / "kernels" / "wkv7_step.cu").read_text(encoding="utf-8")
