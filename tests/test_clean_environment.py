"""What runs on the device needs numpy, click, the tokenizer and one backend: proved in an environment that has nothing
else."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from rwkv_edge.evaluation.demo import export_demo

ROOT = Path(__file__).parents[1]
RUN = """
import sys
import rwkv_edge, rwkv_edge.runtime
from rwkv_edge import Sampler, SamplerConfig, generate_text, open_model
model = open_model(sys.argv[1])
sampler = Sampler(SamplerConfig(seed=1))
text = "".join(generate_text(model.session, model.tokenizer, "ROMEO:", sampler=sampler, max_tokens=20))
assert len(text) > 0
state = model.session.initial_state()
model.session.prefill([[1, 2, 3]], state)
assert model.session.import_state(model.session.export_state(state)).batch == 1
for name in ("torch", "onnx", "onnxscript", "onnx_ir", "tokenizers"):
    assert name not in sys.modules, name
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(f"{name} is installed, so this environment proves nothing")
print("ran without them")
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the base package and ONNX Runtime."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    done = subprocess.run([*pip, "install", "-q", f"{ROOT}[ort]"], capture_output=True, text=True, timeout=600)
    if "No module named pip" in done.stderr:
        pytest.skip("there is no pip beside this interpreter")
    if done.returncode and any(
        word in done.stderr for word in ("NewConnectionError", "Temporary failure", "Max retries")
    ):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    return python


@pytest.mark.slow
def test_an_artifact_runs_with_the_base_package_and_one_backend(bare_python: Path, tmp_path: Path) -> None:
    export_demo(tmp_path / "demo")
    done = subprocess.run(
        [str(bare_python), "-W", "error", "-c", RUN, str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "ran without them", done.stderr


@pytest.mark.slow
def test_commands_that_need_more_say_what_to_install(bare_python: Path, tmp_path: Path) -> None:
    command = [str(bare_python), "-m", "rwkv_edge"]
    done = subprocess.run([*command, "export", str(tmp_path / "x.pth")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "pip install 'rwkv-edge[export]'" in done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "generate" in done.stdout
    done = subprocess.run([*command, "doctor"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "yes onnxruntime, CPU" in done.stdout
    assert "pip install 'rwkv-edge[export]'" in done.stdout
