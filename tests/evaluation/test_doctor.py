"""What the doctor says of machines that lack something, or have something broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rwkv_edge.cli import run
from rwkv_edge.evaluation import doctor, doctor_machine, doctor_packages
from rwkv_edge.evaluation.doctor_machine import Board, Gpu, Gpus, find_board, find_gpus, gpus_from_driver, gpus_from_smi
from rwkv_edge.evaluation.doctor_packages import EXTRAS, Package, imported, present
from rwkv_edge.runtime.ort_providers import CPU, CUDA

H100 = Gpu("NVIDIA H100", (9, 0), 80 << 30)
WITH_GPU = Gpus((H100,), "cuda-bindings", (13, 0))
NAMES = ("onnxruntime", "tensorrt", "tensorrt-rtx", "cuda-bindings", "nvidia-cuda-nvrtc", *doctor_packages.NOT_IMPORTED)
NOTHING = {name: Package(name, "missing") for name in NAMES}
HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "onnx_graphsurgeon", "tokenizers", "huggingface_hub")


def test_it_imports_nothing_heavy() -> None:
    code = f"""
import sys
from rwkv_edge.cli import run
assert run(["doctor", "--json"]) == 0
assert not set(sys.modules) & {set(HEAVY)!r}, sorted(set(sys.modules) & {set(HEAVY)!r})
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    cpu = next(ability for ability in found["runs"] if ability["name"] == "onnxruntime, CPU")
    assert cpu["works"]
    assert found["packages"]["onnxruntime"]["state"] == "ok"


def test_a_bare_machine_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "packages", lambda: NOTHING)
    monkeypatch.setattr(doctor_machine, "SMI", "no-such-program")
    assert run(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "pip install 'rwkv-edge[ort]'" in printed
    assert "pip install 'rwkv-edge[export]'" in printed
    assert "rwkv-edge[tensorrt]" not in printed  # of no use without a GPU
    assert "yes" not in printed


def test_a_broken_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    sources = {
        "doc_library": "raise ImportError('libnvinfer.so.10: cannot open shared object file\\nsecond line')",
        "doc_dependency": "import doc_not_there",
        "doc_exit": "raise SystemExit('needs a licence')",
        "doc_whole": "__version__ = '1.2'\nclass Builder: ...",
    }
    for name, text in sources.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "doc_stubs").mkdir()
    found = {name: imported(name, name, "Builder") for name in (*sources, "doc_stubs", "doc_absent")}
    assert {name: package.state for name, package in found.items()} == {
        "doc_library": "broken", "doc_dependency": "broken", "doc_exit": "broken", "doc_whole": "ok",
        "doc_stubs": "broken", "doc_absent": "missing",
    }  # fmt: skip
    assert found["doc_library"].problem == "libnvinfer.so.10: cannot open shared object file"
    assert "doc_not_there" in str(found["doc_dependency"].problem)
    assert "not its library" in str(found["doc_stubs"].problem)
    assert found["doc_whole"].version == "1.2"
    assert present("doc_stubs", "doc_stubs").state == "broken"
    assert present("doc_absent", "doc_absent").state == "missing"


def test_a_broken_package_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken = NOTHING | {"tensorrt": Package("tensorrt", "broken", "10.3.0", "libcudart.so.12 is not there")}
    monkeypatch.setattr(doctor, "packages", lambda: broken)
    assert run(["doctor"]) == 0
    assert "warning: tensorrt cannot be used: libcudart.so.12 is not there\n" in capsys.readouterr().out


def test_extras_are_those_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib")
    path = Path(__file__).parents[2] / "pyproject.toml"
    declared = tomllib.loads(path.read_text("utf-8"))["project"]["optional-dependencies"]
    made_of_others = {"all", "dev"}
    assert {extra.name for extra in EXTRAS} == set(declared) - made_of_others
    assert {name for extra in EXTRAS for name in extra.packages} <= set(NAMES)


def fake_driver(version: int = 13000, **answers: Any) -> Any:
    values = {75: 9, 76: 0}

    class Status(int):
        name = "CUDA_ERROR_NO_DEVICE"

    ok = Status(0)
    return SimpleNamespace(
        CUdevice_attribute=SimpleNamespace(
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76
        ),
        cuDriverGetVersion=lambda: (ok, version),
        cuInit=lambda flags: (Status(answers.get("init", 0)),),
        cuDeviceGetCount=lambda: (ok, 1),
        cuDeviceGet=lambda ordinal: (ok, ordinal),
        cuDeviceGetName=lambda size, device: (ok, b"NVIDIA H100\0\0"),
        cuDeviceGetAttribute=lambda attribute, device: (ok, values[attribute]),
        cuDeviceTotalMem=lambda device: (ok, 80 << 30),
    )


def test_gpus_by_the_driver() -> None:
    assert gpus_from_driver(fake_driver()) == WITH_GPU
    assert gpus_from_driver(fake_driver(12060)).cuda == (12, 6)
    without = gpus_from_driver(fake_driver(init=100))
    assert (without.found, without.cuda, without.problem) == ((), (13, 0), "the driver sees no GPU")

    def absent() -> None:
        raise RuntimeError("cuda is an NVIDIA driver library")

    lost = fake_driver()
    lost.cuDriverGetVersion = absent
    assert gpus_from_driver(lost).problem == "no NVIDIA driver was found"


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for nvidia-smi is a shell script")
def test_gpus_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\nif [ -n "$1" ]; then echo "NVIDIA RTX A2000, 8.6, 12282"; echo "Orin (nvgpu), [N/A], [N/A]"\n'
        'else echo "| Driver Version: 580.1  CUDA Version: 13.0 |"; fi\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    expected = (Gpu("NVIDIA RTX A2000", (8, 6), 12282 << 20), Gpu("Orin (nvgpu)", None, None))
    assert gpus_from_smi() == Gpus(expected, "nvidia-smi", (13, 0))
    assert find_gpus(None) == gpus_from_smi()
    assert find_gpus(fake_driver()).source == "cuda-bindings"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpus_from_smi().found == ()


def test_boards(tmp_path: Path) -> None:
    assert find_board(tmp_path) is None
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic\n")
    assert find_board(tmp_path) == Board(None, "36.4.3", None)
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_text("NVIDIA Jetson Orin Nano\0")
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(
        "Package: a\nVersion: 1\n\nPackage: nvidia-jetpack\nStatus: install ok installed\nVersion: 6.2+b77\n"
    )
    assert find_board(tmp_path) == Board("NVIDIA Jetson Orin Nano", "36.4.3", "6.2")


@pytest.mark.parametrize(
    ("nvrtc", "cuda", "advice"),
    [
        ("13.5", (13, 0), "pip install 'nvidia-cuda-nvrtc==13.0.*'"),
        ("13.5", (12, 6), "update the driver to CUDA 13.5"),
        ("13.0", (13, 0), None),
        ("12.6", (13, 0), None),
    ],
)
def test_an_nvrtc_that_the_driver_refuses(nvrtc: str, cuda: tuple[int, int], advice: str | None) -> None:
    found = NOTHING | {
        "cuda-bindings": Package("cuda-bindings", "ok", "13.0.0"),
        "nvidia-cuda-nvrtc": Package("nvidia-cuda-nvrtc", "ok", nvrtc),
    }
    gpus = Gpus((H100,), "cuda-bindings", cuda)
    sentence = doctor.newer_nvrtc(found, gpus)
    if advice is None:
        assert sentence is None
    else:
        assert advice in str(sentence)
        assert doctor.warnings_of(found, gpus) == (sentence,)
        assert doctor.cuda_ability(found, gpus) == doctor.Ability("cuda", False, str(sentence))


def test_a_provider_that_does_not_load_is_no_ability() -> None:
    """ONNX Runtime opens the session on the CPU instead, and says nothing."""
    ort = pytest.importorskip("onnxruntime")
    package = Package("onnxruntime", "ok", "1.31", None, ort)
    assert doctor.onnxruntime_ability(package, CPU, (CPU,), Gpus()).works
    without = doctor.onnxruntime_ability(package, CUDA, (CUDA, CPU), Gpus(problem="no NVIDIA driver was found"))
    assert (without.works, without.detail) == (False, "no NVIDIA driver was found")
    if CUDA not in ort.get_available_providers():
        refused = doctor.onnxruntime_ability(package, CUDA, (CUDA, CPU), WITH_GPU)
        assert not refused.works
        assert "does not load" in refused.detail


def test_what_is_missing_depends_on_the_machine() -> None:
    def installs(gpus: Gpus, board: Board | None) -> dict[str, str]:
        return {entry["extra"]: entry["install"] for entry in doctor.lacking(NOTHING, (CPU,), gpus, board)}

    assert set(installs(Gpus(), None)) == {"ort", "export", "quantize", "tensorrt-rtx", "hf", "hub", "report"}
    assert set(installs(WITH_GPU, None)) == {extra.name for extra in EXTRAS}
    jetson = installs(WITH_GPU, Board(None, "36.4.3", "6.2"))
    assert jetson["tensorrt"] == "sudo apt install python3-libnvinfer"
    assert "tensorrt-rtx" not in jetson


def test_builders_say_their_targets() -> None:
    members = {"NONE": 0, "CURRENT": 1, "SM120": 2, "SM86": 3}
    rtx = SimpleNamespace(__version__="1.7", ComputeCapability=SimpleNamespace(__members__=members))
    backends = doctor.ENGINE_BACKENDS
    built = doctor.build_ability(backends["tensorrt-rtx"], Package("tensorrt-rtx", "ok", "1.7", None, rtx), Gpus())
    assert built.targets == ("sm86", "sm120")
    for version, gpus, works in (("10.13.3", WITH_GPU, True), ("10.13.3", Gpus(), False), ("8.6.1", WITH_GPU, False)):
        package = Package("tensorrt", "ok", version, None, SimpleNamespace(__version__=version))
        ability = doctor.build_ability(backends["tensorrt"], package, gpus)
        assert ability.works is works
        assert ability.targets == (("sm90",) if works else ())


def test_engines_run_where_the_backend_knows_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT for RTX has no Hopper."""
    monkeypatch.setattr(doctor, "BACKENDS", ("tensorrt", "tensorrt-rtx"))
    capabilities = SimpleNamespace(__members__={"SM86": 3})
    rtx = SimpleNamespace(__version__="1.7", ComputeCapability=capabilities)
    found = NOTHING | {
        "tensorrt-rtx": Package("tensorrt-rtx", "ok", "1.7", None, rtx),
        "tensorrt": Package("tensorrt", "ok", "10.13.3", None, SimpleNamespace(__version__="10.13.3")),
    }
    backends = doctor.ENGINE_BACKENDS
    without = doctor.engine_ability(backends["tensorrt"], found, WITH_GPU)
    assert (without.works, without.detail) == (False, "cuda-bindings is not installed")
    found["cuda-bindings"] = Package("cuda-bindings", "ok", "13.0", None, fake_driver())
    assert doctor.engine_ability(backends["tensorrt"], found, WITH_GPU).works
    hopper = doctor.engine_ability(backends["tensorrt-rtx"], found, WITH_GPU)
    assert (hopper.works, hopper.detail) == (False, "TensorRT for RTX is for sm86, but this GPU is sm90")
    ampere = Gpus((Gpu("NVIDIA RTX A2000", (8, 6), None),), "nvidia-smi", (13, 0))
    assert doctor.engine_ability(backends["tensorrt-rtx"], found, ampere).works
    monkeypatch.setattr(doctor, "BACKENDS", ("onnxruntime",))
    assert "no session over them" in doctor.engine_ability(backends["tensorrt"], found, WITH_GPU).detail
