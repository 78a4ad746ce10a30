"""RWKV-4, 5.x, 6 and 7a through the fused CUDA kernels, against ONNX Runtime on the CPU with the same checkpoint.

Everything runs twice: on a GPU where there is one, and with numpy in the kernels' place. RWKV-7 has `test_fused.py`;
here it has what only the fused kernels take: a vocabulary of odd size, and a stream that is halved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cuda_double
import cuda_versions_double
import numpy as np
import onnxruntime
import pytest
import torch

from rwkv_edge.artifact import Artifact
from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
from rwkv_edge.calibration.schemes import SchemeOptions
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.errors import SessionError
from rwkv_edge.evaluation.synthetic import Shape, Shape7, random_v4, random_v5, random_v6, random_v7, save_pth
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.plugins.fused_spec import FusedKernel
from rwkv_edge.runtime.cuda import CudaSession, dimensions_of
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.session import open_session

MODELS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "4": lambda: random_v4(Shape(3, 128, vocab_size=277)),  # as odd as the 50277 of released ones
    "4, wide attention": lambda: random_v4(Shape(2, 72, ffn_mult=3, n_att=312)),
    "5.0": lambda: random_v5(Shape(3, 128, head_size=32), "5.0"),
    "5.1": lambda: random_v5(Shape(2, 128, head_size=32), "5.1"),
    "5.1, narrow heads": lambda: random_v5(Shape(2, 72, head_size=8, ffn_mult=3), "5.1"),
    "5.2": lambda: random_v5(Shape(3, 128, n_att=192), "5.2"),
    "5.2, wide heads": lambda: random_v5(Shape(2, 128, head_size=128, n_att=256), "5.2"),
    "6": lambda: random_v6(Shape(3, 128)),
    "6, narrow heads": lambda: random_v6(Shape(2, 72, head_size=8, ffn_mult=3, n_att=136, ranks=(8, 24))),
    "6, wide heads": lambda: random_v6(Shape(2, 128, head_size=128, ranks=(64, 32))),
    "7a": lambda: random_v7(Shape7(3), deep_embed=32),
    "7a, odd rank": lambda: random_v7(Shape7(2, 72, head_size=8, ffn_mult=3, ranks=(8, 8, 8, 8)), deep_embed=24),
    "7, odd vocabulary": lambda: random_v7(Shape7(3, vocab_size=277)),
    "4's widths": lambda: random_v4(Shape(2, 768, ffn_mult=4)),
    "5.2's widths": lambda: random_v5(Shape(2, 2048), "5.2"),
    "6's widths": lambda: random_v6(Shape(2, 2048)),
}
"""Version and shape; a quantized model needs widths that are multiples of 32."""
RESCALED = ("4", "5.2", "6", "7, odd vocabulary")
"""Those whose stream is halved after every layer (of 3 in all) in the precision 'rescaled'."""
IN_ALL = ("4", "5.2", "6", "7a")
"""Those that run in all precisions with numpy; on a GPU all do whose widths allow it."""
PRECISIONS = ("fp32", "fp16", "bf16", "rescaled", "w8", "w4", "fp16 w8", "fp16 w4")
TOLERANCE = {"fp32": 3e-5, "fp16": 5e-3, "bf16": 4e-2, "rescaled": 3e-5}
"""Over the oracle's largest logit, as in `test_fused.py`: rounding of the weights in 16 bits; quantized models have the
same weights as their oracle, which in fp16 rounds activations."""
QUANTIZED = {"w8": 3e-5, "w4": 3e-5, "fp16 w8": 1e-2, "fp16 w4": 1e-2}
COUNT = 12


def scheme_of(precision: str) -> SchemeOptions:
    if precision.endswith("w8"):
        return SchemeOptions("w8")
    return SchemeOptions("w4", block=64, head="int4", embedding="int8")


def exported(name: str, precision: str, folder: Path) -> Path:
    """An artifact made when it is first asked for."""
    target = folder / f"{name}-{precision}"
    if target.is_dir():
        return target
    if precision in QUANTIZED:
        source = exported(name, "fp16" if precision.startswith("fp16") else "fp32", folder)
        quantize_artifact(source, target, QuantizeOptions(scheme_of(precision)))
        return target
    checkpoint = folder / f"{name}.pth"
    if not checkpoint.is_file():
        save_pth(MODELS[name](), checkpoint)
    options = ExportOptions(
        precision="fp32" if precision == "rescaled" else precision, chunks=(), batch=None, tokenizer="none",
        rescale=1 if precision == "rescaled" else None,
    )  # fmt: skip
    export_checkpoint(open_checkpoint(checkpoint), target, options)
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("versions")


def numpy_kernels(patch: pytest.MonkeyPatch) -> None:
    """Run the kernels' meaning in numpy."""
    patch.setattr("rwkv_edge.runtime.cuda.Driver", cuda_double.Driver)
    patch.setattr(FusedKernel, "ptx", cuda_double.described)
    patch.setattr(cuda_double, "KERNELS", {**cuda_double.KERNELS, **cuda_versions_double.KERNELS})


def is_a_case(where: str, name: str, precision: str) -> bool:
    if precision == "rescaled":
        return name in RESCALED
    if name.endswith("'s widths"):
        return where == "gpu" and precision in ("fp16", "fp16 w8", "fp16 w4")
    return precision == "fp32" or name in IN_ALL or (where == "gpu" and "," not in name)


CASES = [
    pytest.param((where, name, precision), id=f"{where}-{name}-{precision}", marks=[pytest.mark.gpu] * (where == "gpu"))
    for where in ("numpy", "gpu")
    for name in MODELS
    for precision in PRECISIONS
    if is_a_case(where, name, precision)
]

Case = tuple[CudaSession, OrtSession, float]


@pytest.fixture(scope="module", params=CASES)
def sessions(request: pytest.FixtureRequest, folder: Path) -> Iterator[Case]:
    """The fused kernels, the CPU in float32, and how far they may be apart."""
    where, name, precision = request.param
    with pytest.MonkeyPatch.context() as patch:
        if where == "gpu":
            request.getfixturevalue("gpu")
        else:
            numpy_kernels(patch)
        patch.setattr(onnxruntime.SessionOptions, "add_session_config_entry", float_products)
        session = CudaSession(Artifact.open(exported(name, precision, folder)))
        same = precision if precision in QUANTIZED or precision == "rescaled" else "fp32"
        oracle = OrtSession(Artifact.open(exported(name, same, folder)))
        yield session, oracle, {**TOLERANCE, **QUANTIZED}[precision]
        session.close()
        oracle.close()


ADD_ENTRY = onnxruntime.SessionOptions.add_session_config_entry


def float_products(options: onnxruntime.SessionOptions, name: str, value: str) -> None:
    """Integer weights times activations in float: as fast as it can, the CPU would round those to int8 too."""
    ADD_ENTRY(options, name, "0" if name == "session.qdq_matmulnbits_accuracy_level" else value)


def random_state(session: OrtSession, batch: int, seed: int = 1) -> dict[str, np.ndarray]:
    """RWKV-4's denominators are sums of exponentials: positive."""
    draw = np.random.default_rng(seed)
    state = {t.name: draw.normal(0, 0.5, (batch, *t.shape)).astype(np.float32) for t in session.spec.state}
    return {name: np.abs(x) + 0.5 if name.startswith("wkv_den") else x for name, x in state.items()}


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_steps(sessions: Case, request: pytest.FixtureRequest) -> None:
    """Without a GPU no storage form has kernels of its own for a number of streams."""
    where, _, precision = request.node.callspec.params["sessions"]
    few = (1, 3, 9) if precision == "fp32" else (1, 9)
    for batch in (1, 2, 3, 8, 9) if where == "gpu" else few:
        assert_steps(*sessions, batch)


def assert_steps(session: CudaSession, oracle: OrtSession, tolerance: float, batch: int) -> None:
    arrays = random_state(oracle, batch)
    state, expected_state = session.import_state(arrays), oracle.import_state(arrays)
    tokens = np.random.default_rng(2).integers(0, session.spec.vocab_size, (COUNT, batch))
    tokens[COUNT // 2 :] = tokens[COUNT // 2]  # the same token over and over
    found = [apart(session.step(row, state), oracle.step(row, expected_state)) for row in tokens]
    assert max(found[: COUNT // 2]) <= tolerance
    assert max(found) <= 2 * tolerance  # a token that repeats takes heads to small outputs: group norm lifts rounding
    after, expected = session.export_state(state), oracle.export_state(expected_state)
    for name in expected:
        assert apart(after[name], expected[name]) <= 2 * tolerance, name


def test_first_state(sessions: Case) -> None:
    """RWKV-4 begins with exponents of -1e30. Group norms of the first, small outputs make more of rounding."""
    session, oracle, tolerance = sessions
    state, expected_state = session.initial_state(2), oracle.initial_state(2)
    for token in range(4):
        row = [token, token + 1]
        assert apart(session.step(row, state), oracle.step(row, expected_state)) <= 4 * tolerance


def test_prefill_is_steps(sessions: Case) -> None:
    """To the bit, but where the wide kernels take a prompt in chunks."""
    session, oracle, tolerance = sessions
    arrays, allowed = random_state(oracle, 2), tolerance if session.chunks else 0
    tokens = np.random.default_rng(3).integers(0, session.spec.vocab_size, (2, 5))
    one, other = session.import_state(arrays), session.import_state(arrays)
    logits = session.prefill(tokens, one)
    for t in range(5):
        expected = session.step(tokens[:, t], other)
    assert apart(logits, expected) <= allowed
    for name, array in session.export_state(one).items():
        assert apart(array, session.export_state(other)[name]) <= allowed


def test_greedy(sessions: Case) -> None:
    session, _, _ = sessions
    state, other = session.initial_state(3), session.initial_state(3)
    chosen = session.greedy([1, 2, 3], state, 9)
    tokens = np.array([1, 2, 3])
    for t in range(9):
        tokens = session.step(tokens, other).argmax(1)
        np.testing.assert_array_equal(chosen[:, t], tokens)


def test_states_are_values(sessions: Case) -> None:
    """A fork goes its own way, an exported state comes back bit for bit, and rows do not see each other."""
    session, oracle, _ = sessions
    state = session.import_state(random_state(oracle, 3))
    session.step([1, 2, 3], state)
    fork, exported_state = session.copy_state(state), session.export_state(state)
    session.step([4, 5, 6], state)
    for name, array in session.export_state(fork).items():
        np.testing.assert_array_equal(array, exported_state[name])
    expected = session.step([7, 8, 9], fork)
    np.testing.assert_array_equal(session.step([7, 8, 9], session.import_state(exported_state)), expected)
    alone = session.import_state({name: array[1:2] for name, array in exported_state.items()})
    assert apart(session.step([8], alone)[0], expected[1]) <= 5e-6


def test_outputs_are_written_whole(sessions: Case) -> None:
    """Buffers full of NaN before a step leave none behind: everything that is read was written."""
    session, oracle, _ = sessions
    arrays = random_state(oracle, 2)
    state = session.import_state(arrays)
    expected = session.step([1, 2], session.import_state(arrays))
    for chain in session._chains.values():
        chain.fill_with_nan()
    np.testing.assert_array_equal(session.step([1, 2], state), expected)


def test_halted_streams_stay(sessions: Case) -> None:
    """The state of a stream that is halted stays bit for bit; its neighbours go on as they would alone: to the bit, but
    where what is zero in all streams decides the order of sums."""
    session, oracle, tolerance = sessions
    arrays = random_state(oracle, 3)
    state, free = session.import_state(arrays), session.import_state(arrays)
    session.step([1, 2, 3], state)
    session.step([1, 2, 3], free)
    before = session.export_state(state)
    session._driver.upload(np.array([0, 1, 0], np.int32), state.halted)
    for _ in range(3):  # both directions between the token shifts
        session.step([4, 5, 6], state)
        session.step([4, 5, 6], free)
    after, expected = session.export_state(state), session.export_state(free)
    for name, array in after.items():
        np.testing.assert_array_equal(array[1], before[name][1])
        if session.keeps_rows_apart(3):
            np.testing.assert_array_equal(array[::2], expected[name][::2])
        assert apart(array[::2], expected[name][::2]) <= tolerance
        assert (array[0] != before[name][0]).any()


@pytest.fixture
def numpy_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy_kernels(monkeypatch)


@pytest.mark.parametrize("name", ["4", "5.0", "6", "7a"])
def test_backend_of_open_session(name: str, folder: Path, numpy_gpu: None) -> None:
    """The same text as ONNX Runtime, and states that move between the two."""
    path = exported(name, "fp32", folder)
    with_kernels, with_graph = open_session(path, backend="cuda"), open_session(path)
    state, other = with_kernels.initial_state(), with_graph.initial_state()
    token = other_token = 1
    for _ in range(20):
        token = int(with_kernels.step([token], state)[0].argmax())
        other_token = int(with_graph.step([other_token], other)[0].argmax())
        assert token == other_token
    moved = with_graph.import_state(with_kernels.export_state(state))
    assert apart(with_graph.step([7], moved), with_kernels.step([7], state)) <= 1e-5


def test_unknown_versions_are_refused(folder: Path) -> None:
    spec = Artifact.open(exported("4", "fp32", folder)).manifest.spec
    with pytest.raises(SessionError, match=r"runs RWKV-4, 5\.0, 5\.1, 5\.2, 6, 7, 7a, not RWKV-9; use another backend"):
        dimensions_of(replace(spec, version="9"))


def test_odd_ranks_are_refused(tmp_path: Path, numpy_gpu: None) -> None:
    checkpoint = save_pth(random_v6(Shape(2, 64, ranks=(12, 8))), tmp_path / "odd.pth")
    export_checkpoint(open_checkpoint(checkpoint), tmp_path / "odd", ExportOptions(chunks=(), tokenizer="none"))
    with pytest.raises(SessionError, match=r"need a rank_mix that is a multiple of 8; found 12"):
        open_session(tmp_path / "odd", backend="cuda")
