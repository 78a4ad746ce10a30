"""RWKV-7 through the fused CUDA kernels, against ONNX Runtime on the CPU with the same checkpoint.

Everything runs twice: on a GPU where there is one, and with numpy in the kernels' place.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cuda_double
import numpy as np
import onnxruntime
import pytest
from tiny import write_artifact

from rwkv_edge.artifact import Artifact
from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
from rwkv_edge.calibration.schemes import SchemeOptions
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.errors import ArtifactError, InputError, SessionError
from rwkv_edge.evaluation.synthetic import Shape7, random_v7, save_pth
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.plugins.fused_spec import COLUMNS, FusedKernel
from rwkv_edge.runtime.cuda import CudaSession
from rwkv_edge.runtime.cuda_driver import Driver
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.session import open_session

SHAPES = {
    "one head": Shape7(2, 64, 256, 64, 4, (32, 32, 16, 32)),
    "many heads": Shape7(3, 192, 320, 32, 4, (16, 8, 8, 48)),
    "wide heads": Shape7(2, 256, 512, 128, 3.5, (64, 64, 32, 128)),
    "narrow heads": Shape7(2, 72, 264, 8, 3, (8, 8, 8, 16)),
    "one layer": Shape7(1, 128, 256, 64, 4, (32, 32, 16, 32)),
    "1.5B's widths": Shape7(2, 2048, 4096, 64, 4, (96, 96, 64, 256)),
}
TOLERANCE = {
    "fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2, "w8": 1e-5, "fp16 w8": 1e-2, "w4": 1e-5, "fp16 w4": 1e-2,
    "w4 of 128": 1e-5,
}  # fmt: skip
"""Over the oracle's largest logit. In 16 bits it is the rounding of the weights; w8 and w4 have the same weights as
their oracles, and so have those over fp16, whose oracles round activations."""
SCHEMES = {
    "w8": SchemeOptions("w8", embedding="int8"), "fp16 w8": SchemeOptions("w8"),
    "w4": SchemeOptions("w4", head="int4"), "fp16 w4": SchemeOptions("w4", head="int4", embedding="int8"),
    "w4 of 128": SchemeOptions("w4", block=128),
}  # fmt: skip
COUNT = 24


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Artifacts by shape and precision, made when first asked for."""
    folder = tmp_path_factory.mktemp("fused")

    class Lazy(dict[tuple[str, str], Path]):
        def __missing__(self, key: tuple[str, str]) -> Path:
            name, precision = key
            self[key] = folder / f"{name}-{precision}"
            if precision in SCHEMES:
                source = self[name, "fp16" if precision.startswith("fp16") else "fp32"]
                quantize_artifact(source, self[key], QuantizeOptions(SCHEMES[precision]))
            else:
                checkpoint = save_pth(random_v7(SHAPES[name]), folder / f"{name}.pth")
                options = ExportOptions(precision=precision, chunks=(), batch=None, tokenizer="none")
                export_checkpoint(open_checkpoint(checkpoint), self[key], options)
            return self[key]

    return Lazy()


def fits(shape: Shape7, precision: str) -> bool:
    """Rows of integers begin at 16 bytes."""
    columns = COLUMNS["int4" if "w4" in precision else "int8"] if precision in SCHEMES else 1
    return not (shape.n_embd % columns or shape.vocab_size % columns or shape.head_size % min(columns, COLUMNS["int8"]))


CASES = [
    pytest.param((where, name, precision), id=f"{where}-{name}-{precision}", marks=[pytest.mark.gpu] * (where == "gpu"))
    for where in ("numpy", "gpu")
    for name in SHAPES
    for precision in TOLERANCE
    if where == "gpu" or (SHAPES[name].n_embd < 1024 and (precision == "fp32" or name == "many heads"))
    if fits(SHAPES[name], precision)
]


@pytest.fixture(scope="module", params=CASES)
def sessions(
    request: pytest.FixtureRequest, artifacts: dict[tuple[str, str], Path]
) -> Iterator[tuple[CudaSession, OrtSession, float]]:
    """The fused kernels, the CPU in float32, and how far they may be apart."""
    where, name, precision = request.param
    with pytest.MonkeyPatch.context() as patch:
        if where == "gpu":
            request.getfixturevalue("gpu")
        else:
            patch.setattr("rwkv_edge.runtime.cuda.Driver", cuda_double.Driver)
            patch.setattr(FusedKernel, "ptx", cuda_double.described)
        patch.setattr(onnxruntime.SessionOptions, "add_session_config_entry", float_products)
        session = CudaSession(Artifact.open(artifacts[name, precision]))
        oracle = OrtSession(Artifact.open(artifacts[name, precision if precision in SCHEMES else "fp32"]))
        yield session, oracle, TOLERANCE[precision]
        session.close()
        oracle.close()


ADD_ENTRY = onnxruntime.SessionOptions.add_session_config_entry


def float_products(options: onnxruntime.SessionOptions, name: str, value: str) -> None:
    """Weights of int8 times activations in float: as fast as it can, the CPU would round those to int8 too."""
    ADD_ENTRY(options, name, "0" if name == "session.qdq_matmulnbits_accuracy_level" else value)


def random_state(session: OrtSession, batch: int, seed: int = 1) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {t.name: draw.normal(0, 0.5, (batch, *t.shape)).astype(np.float32) for t in session.spec.state}


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_steps(sessions: tuple[CudaSession, OrtSession, float], request: pytest.FixtureRequest) -> None:
    """Without a GPU no storage form has kernels of its own for a number of streams."""
    where, _, precision = request.node.callspec.params["sessions"]
    few = (1, 3, 9) if precision == "fp32" else (1, 9)
    for batch in (1, 2, 3, 8, 9) if where == "gpu" else few:
        assert_steps(*sessions, batch)


def assert_steps(session: CudaSession, oracle: OrtSession, tolerance: float, batch: int) -> None:
    arrays = random_state(oracle, batch)
    state, expected_state = session.import_state(arrays), oracle.import_state(arrays)
    tokens = np.random.default_rng(2).integers(0, session.spec.vocab_size, (COUNT, batch))
    worst = 0.0
    for row in tokens:
        worst = max(worst, apart(session.step(row, state), oracle.step(row, expected_state)))
    assert worst <= tolerance
    after, expected = session.export_state(state), oracle.export_state(expected_state)
    for name in expected:
        assert apart(after[name], expected[name]) <= tolerance, name


def test_prefill_is_steps(sessions: tuple[CudaSession, OrtSession, float]) -> None:
    session, oracle, tolerance = sessions
    arrays = random_state(oracle, 2)
    tokens = np.random.default_rng(3).integers(0, session.spec.vocab_size, (2, 9))
    one, other = session.import_state(arrays), session.import_state(arrays)
    logits = session.prefill(tokens, one)
    for t in range(9):
        expected = session.step(tokens[:, t], other)
    assert apart(logits, expected) <= tolerance
    for name, array in session.export_state(one).items():
        assert apart(array, session.export_state(other)[name]) <= tolerance


def test_greedy(sessions: tuple[CudaSession, OrtSession, float]) -> None:
    session, _, _ = sessions
    state, other = session.initial_state(3), session.initial_state(3)
    chosen = session.greedy([1, 2, 3], state, 17)
    tokens = np.array([1, 2, 3])
    for t in range(17):
        tokens = session.step(tokens, other).argmax(1)
        np.testing.assert_array_equal(chosen[:, t], tokens)


def test_states_are_values(sessions: tuple[CudaSession, OrtSession, float]) -> None:
    """A fork goes its own way, an exported state comes back bit for bit, and rows do not see each other."""
    session, oracle, _ = sessions
    state = session.import_state(random_state(oracle, 3))
    session.step([1, 2, 3], state)
    fork, exported = session.copy_state(state), session.export_state(state)
    session.step([4, 5, 6], state)
    for name, array in session.export_state(fork).items():
        np.testing.assert_array_equal(array, exported[name])
    expected = session.step([7, 8, 9], fork)
    np.testing.assert_array_equal(session.step([7, 8, 9], session.import_state(exported)), expected)
    alone = session.import_state({name: array[1:2] for name, array in exported.items()})
    assert apart(session.step([8], alone)[0], expected[1]) <= 5e-6


def test_outputs_are_written_whole(sessions: tuple[CudaSession, OrtSession, float]) -> None:
    """Buffers full of NaN before a step leave none behind: everything that is read was written."""
    session, oracle, _ = sessions
    arrays = random_state(oracle, 2)
    state = session.import_state(arrays)
    expected = session.step([1, 2], session.import_state(arrays))
    for chain in session._chains.values():
        chain.fill_with_nan()
    np.testing.assert_array_equal(session.step([1, 2], state), expected)


def test_merged_kernel(sessions: tuple[CudaSession, OrtSession, float]) -> None:
    """The recurrence and the output matrix in one kernel: the same model; a state goes on over the change."""
    session, oracle, tolerance = sessions
    arrays = random_state(oracle, 1)
    state, expected_state = session.import_state(arrays), oracle.import_state(arrays)
    tuning = session.tuning
    try:
        session.retune(replace(tuning, merge=True, wkv=replace(tuning.wkv, threads=512)))
        for token in (3, 1, 1, 4, 1, 5, 9):
            assert apart(session.step([token], state), oracle.step([token], expected_state)) <= tolerance
        session.retune(tuning)
        assert apart(session.step([2], state), oracle.step([2], expected_state)) <= tolerance
    except InputError as error:
        assert re.search(r"blocks of (64|128) rows|bytes of shared memory", str(error))  # noqa: PT017
        pytest.skip(str(error))
    finally:
        session.retune(tuning)
    after, expected = session.export_state(state), oracle.export_state(expected_state)
    for name in expected:
        assert apart(after[name], expected[name]) <= tolerance, name


def small_artifact(folder: Path, *options: str) -> Path:
    return write_artifact(folder / "model", 0, *options)


@pytest.fixture
def numpy_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_edge.runtime.cuda.Driver", cuda_double.Driver)
    monkeypatch.setattr(FusedKernel, "ptx", cuda_double.described)


def test_backend_of_open_session(tmp_path: Path, numpy_gpu: None) -> None:
    """The step loop, the prompt, and snapshots of another backend."""
    folder = small_artifact(tmp_path)
    with_kernels, with_graph = open_session(folder, backend="cuda"), open_session(folder)
    texts = []
    for session in (with_kernels, with_graph):
        state = session.initial_state()
        logits = session.prefill([[1, 2, 3, 4, 5]], state)
        tokens = []
        for _ in range(20):
            tokens.append(int(logits[0].argmax()))
            logits = session.step([tokens[-1]], state)
        texts.append(tokens)
    assert texts[0] == texts[1]
    moved = with_graph.import_state(with_kernels.export_state(state := with_kernels.initial_state()))
    assert apart(with_graph.step([7], moved), with_kernels.step([7], state)) <= 1e-5


def test_memory_is_given_back(tmp_path: Path, numpy_gpu: None) -> None:
    """States that are dropped free theirs, in whatever order session and state end."""
    session = CudaSession(Artifact.open(small_artifact(tmp_path)))
    session.step([1], session.initial_state())
    before = session._driver.free_memory()
    for _ in range(3):
        state = session.initial_state()
        session.step([1], state)
        del state
    gc.collect()
    assert session._driver.free_memory() == before
    state = session.initial_state()
    session.close()
    del state


def test_odd_widths_are_refused(tmp_path: Path, numpy_gpu: None) -> None:
    checkpoint = save_pth(random_v7(Shape7(2, 64, ranks=(12, 8, 8, 8))), tmp_path / "odd.pth")
    export_checkpoint(open_checkpoint(checkpoint), tmp_path / "odd", ExportOptions(chunks=(), tokenizer="none"))
    with pytest.raises(SessionError, match=r"need a rank_w that is a multiple of 8; found 12"):
        open_session(tmp_path / "odd", backend="cuda")


def test_damaged_weights_are_refused(tmp_path: Path, numpy_gpu: None) -> None:
    folder = small_artifact(tmp_path)
    index = folder / "weights.json"
    index.write_text(index.read_text().replace("[256, 64]", "[256, 65]"))
    with pytest.raises(ArtifactError, match=r"weights\.json"):
        open_session(folder, backend="cuda")
    with pytest.raises(ArtifactError, match=r"does not lie inside weights\.bin"):
        open_session(folder, backend="cuda", check_content=False)


def test_too_little_memory(tmp_path: Path, numpy_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_artifact(tmp_path)
    monkeypatch.setattr("rwkv_edge.runtime.cuda.Driver", lambda ordinal: cuda_double.Driver(ordinal, 1000))
    with pytest.raises(SessionError, match=r"of the GPU's memory"):
        open_session(folder, backend="cuda")


def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's library is not there, or sees no GPU: one sentence."""
    monkeypatch.setattr("rwkv_edge.runtime.cuda.Driver", Driver)
    pytest.importorskip("cuda.bindings")
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SessionError, match=r"^no NVIDIA GPU can be used here \(.*[a-z]\); without one, models run on "):
        open_session(small_artifact(tmp_path), backend="cuda")


@pytest.mark.parametrize("batch", [2, 9])
def test_halted_streams_stay(sessions: tuple[CudaSession, OrtSession, float], batch: int) -> None:
    """A stream whose flag is set keeps its state over any number of steps; the others go on as if it was not there."""
    session, oracle, tolerance = sessions  # what is zero in all streams is not read: it decides the order of sums
    arrays = random_state(oracle, batch)
    state, free = session.import_state(arrays), session.import_state(arrays)
    flags = np.zeros(batch, np.int32)
    flags[batch - 1] = 1
    before = session.export_state(state)
    session._driver.upload(flags, state.halted)
    for token in (3, 5, 5):
        found, expected = session.step([token] * batch, state), session.step([token] * batch, free)
        assert apart(found[: batch - 1], expected[: batch - 1]) <= 5e-6
    after, moved = session.export_state(state), session.export_state(free)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name][-1], array[-1])
        assert apart(after[name][:-1], moved[name][:-1]) <= tolerance, name


@pytest.mark.parametrize(
    ("scheme", "words"),
    [(SchemeOptions("w8", target="cpu"), "--target cpu"), (SchemeOptions("w4", target="cpu"), "--target cpu")],
)
def test_other_schemes_are_refused(scheme: SchemeOptions, words: str, tmp_path: Path, numpy_gpu: None) -> None:
    folder = small_artifact(tmp_path)
    quantize_artifact(folder, tmp_path / "quantized", QuantizeOptions(scheme))
    with pytest.raises(SessionError, match=rf"runs float, int8 and int4 weights .*, not {words}; quantize again"):
        open_session(tmp_path / "quantized", backend="cuda")
