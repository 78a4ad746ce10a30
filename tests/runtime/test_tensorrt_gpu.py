"""Sessions over real engines, against ONNX Runtime on the CPU. Warnings are errors: every run becomes a CUDA graph.

They run where a TensorRT is installed that knows the GPU; elsewhere they skip and say why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from makers import MAKERS

from rwkv_edge.artifact import Artifact
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.engines import ENGINE_BACKENDS
from rwkv_edge.errors import InputError
from rwkv_edge.evaluation.synthetic import save_pth
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.exporters.tensorrt import BuildOptions, build_engines
from rwkv_edge.runtime.cuda_driver import Driver, device_capability
from rwkv_edge.runtime.loop import generate_step
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.sampling import Sampler, SamplerConfig
from rwkv_edge.runtime.session import open_session
from rwkv_edge.runtime.tensorrt import TrtSession

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2}  # over the largest logit of float32


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU")
    pytest.importorskip("cuda.bindings")


def test_the_capability_needs_no_context() -> None:
    assert device_capability() == torch.cuda.get_device_capability(0)
    assert device_capability(1000) is None


def test_pinned_memory_is_copied_by_the_stream() -> None:
    driver = Driver()
    host, back = driver.pinned(1 << 20), driver.pinned(1 << 20)
    assert not host.any()
    there = driver.allocate(host.nbytes)
    with driver.capture() as graph:
        driver.enqueue_upload(host, there)
        driver.enqueue_download(there, back)
    for seed in (1, 2):  # what lies there when the graph runs
        host[:] = np.random.default_rng(seed).integers(0, 256, host.nbytes)
        graph.launch()
        driver.synchronize()
        np.testing.assert_array_equal(back, host)
    part = host[8:16].view(np.int64)
    driver.enqueue_upload(part, there)
    driver.enqueue_download(there, back[:8])
    driver.synchronize()
    assert back[:8].view(np.int64) == part
    driver.free_pinned(host)
    driver.free_pinned(host)  # once is enough
    driver.close()


def test_copies_on_the_stream_are_captured() -> None:
    """What another library enqueues by the handle becomes a graph; here it is torch."""
    driver = Driver()
    stream = torch.cuda.ExternalStream(driver.stream)
    before, after = torch.arange(64, device="cuda"), torch.zeros(64, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        with driver.capture() as graph:
            after.copy_(before)
        assert int(after.sum()) == 0
        for value in (1, 2):
            before.fill_(value)
            graph.launch()
            driver.synchronize()
            assert int(after.sum()) == 64 * value
    driver.close()


@pytest.fixture(scope="module", params=[(b, v, p) for b in ENGINE_BACKENDS for v in MAKERS for p in TOLERANCE], ids=str)
def sessions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Engines, the CPU in float32, and how far they may be apart."""
    backend, version, precision = request.param
    module = pytest.importorskip(ENGINE_BACKENDS[backend].module)
    if not hasattr(module, "Builder"):
        pytest.skip(f"of {module.__name__} only the types are installed")
    folder: Path = tmp_path_factory.mktemp("engines")
    checkpoint = save_pth(MAKERS[version](), folder / "model.pth")
    for name in {precision, "fp32"}:
        options = ExportOptions(precision=name, batch=None, chunks=(16,), all_logits=True, tokenizer="none")
        export_checkpoint(open_checkpoint(checkpoint), folder / name, options)
    try:
        build_engines(folder / precision, BuildOptions(backend=backend, max_batch=3, sample_k=16))
    except InputError as error:
        pytest.skip(str(error))
    session, oracle = open_session(folder / precision, backend), OrtSession(Artifact.open(folder / "fp32"))
    yield session, oracle, TOLERANCE[precision]
    session.close()
    oracle.close()


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("batch", [1, 3])
def test_steps_prompts_and_scores(sessions: tuple[TrtSession, OrtSession, float], batch: int) -> None:
    session, oracle, tolerance = sessions
    tokens = np.random.default_rng(1).integers(0, session.spec.vocab_size, (batch, 64))
    state, expected = session.initial_state(batch), oracle.initial_state(batch)
    for t in range(64):
        assert apart(session.step(tokens[:, t], state), oracle.step(tokens[:, t], expected)) <= tolerance, t
    for _ in range(3):  # as it is, captured, replayed
        assert apart(session.prefill(tokens[:, :37], state), oracle.prefill(tokens[:, :37], expected)) <= tolerance
        assert apart(session.score(tokens[:, :37], state), oracle.score(tokens[:, :37], expected)) <= tolerance
    steps = [bound for (graph, _), bound in state.room._bound.items() if graph.entry.kind == "step"]
    assert [bound.graph is not None for bound in steps] == [True, True]


def test_candidates_give_the_tokens_of_all_logits(sessions: tuple[TrtSession, OrtSession, float]) -> None:
    session, _, _ = sessions
    for config in (SamplerConfig(temperature=0.0), SamplerConfig(top_k=8, seed=1)):
        steps = generate_step(session, Sampler(config), session.initial_state(), [1, 2, 3])
        sampler, state = Sampler(config), session.initial_state()
        logits = session.prefill([[1, 2, 3]], state)
        for _ in range(40):
            token = sampler.sample(logits[0])
            assert next(steps).token == token
            logits = session.step([token], state)
