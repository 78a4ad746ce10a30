"""Prompts and large batches through the wide CUDA kernels, against ONNX Runtime on the CPU and against single steps.

Everything runs twice: on a GPU where there is one, and with numpy in the kernels' place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cuda_double
import cuda_versions_double
import numpy as np
import onnxruntime
import pytest

from rwkv_edge.artifact import Artifact
from rwkv_edge.calibration.quantize import QuantizeOptions, quantize_artifact
from rwkv_edge.calibration.schemes import SchemeOptions
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.errors import SessionError
from rwkv_edge.evaluation.synthetic import Shape7, random_v7, save_pth
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.plugins.fused_spec import COLUMNS, MAX_BATCH, FusedKernel
from rwkv_edge.runtime.auto import kernels_fit
from rwkv_edge.runtime.cuda import CudaSession
from rwkv_edge.runtime.cuda_pieces import CHUNKS, MOST_ROWS
from rwkv_edge.runtime.onnxruntime import OrtSession

SHAPES = {
    "one head": Shape7(2, 64, 256, 64, 4, (32, 32, 16, 32)),
    "many heads": Shape7(3, 192, 320, 32, 4, (16, 8, 8, 48)),
    "wide heads": Shape7(2, 256, 512, 128, 3.5, (64, 64, 32, 128)),
    "narrow heads": Shape7(2, 72, 288, 8, 3, (8, 8, 8, 16)),
    "one layer": Shape7(1, 128, 256, 64, 4, (32, 32, 16, 32)),
    "1.5B's widths": Shape7(2, 2048, 4096, 64, 4, (96, 96, 64, 256)),
    "7a": Shape7(3, 192, 320, 32, 4, (16, 8, 8, 48)),
    "7a, odd rank": Shape7(2, 64, 256, 32, 3.5, (8, 8, 8, 16)),
    "7a, large rank": Shape7(2, 128, 256, 64, 4, (8, 8, 8, 16)),
    "7a, 1.5B's widths": Shape7(2, 2048, 4096, 64, 4, (96, 96, 64, 256)),
}
DEEP_EMBED = {"7a": 32, "7a, odd rank": 24, "7a, large rank": 136, "7a, 1.5B's widths": 32}
"""Ranks of DeepEmbed; models without are RWKV-7."""
IN_ALL = ("many heads", "1.5B's widths", "7a")
"""Those that run in all precisions on a GPU; the others in fp16 alone."""
TOLERANCE = {
    "fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2, "w8": 1e-5, "fp16 w8": 1e-2, "w4": 1e-5, "fp16 w4": 1e-2,
    "fp16 w4 of 128": 1e-2,
}  # fmt: skip
"""Over the oracle's largest value. In 16 bits it is the rounding of the weights and of what feeds a product."""
SCHEMES = {
    "w8": SchemeOptions("w8", embedding="int8"), "fp16 w8": SchemeOptions("w8", embedding="int8"),
    "w4": SchemeOptions("w4", head="int4"), "fp16 w4": SchemeOptions("w4", head="int4", embedding="int8"),
    "fp16 w4 of 128": SchemeOptions("w4", block=128),
}  # fmt: skip
Sessions = tuple[CudaSession, OrtSession, float]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Artifacts by shape and precision, made when first asked for."""
    folder = tmp_path_factory.mktemp("wide")

    class Lazy(dict[tuple[str, str], Path]):
        def __missing__(self, key: tuple[str, str]) -> Path:
            name, precision = key
            self[key] = folder / f"{name}-{precision}"
            if precision in SCHEMES:
                source = self[name, precision.partition(" ")[0] if " " in precision else "fp32"]
                quantize_artifact(source, self[key], QuantizeOptions(SCHEMES[precision]))
            else:
                weights = random_v7(SHAPES[name], deep_embed=DEEP_EMBED.get(name, 0))
                checkpoint = save_pth(weights, folder / f"{name}.pth")
                options = ExportOptions(precision=precision, chunks=(), batch=None, tokenizer="none")
                export_checkpoint(open_checkpoint(checkpoint), self[key], options)
            return self[key]

    return Lazy()


def fits(shape: Shape7, precision: str) -> bool:
    """Rows of integers begin at 16 bytes, and blocks fill the rows of a matrix."""
    columns = COLUMNS["int4" if "w4" in precision else "int8"] if precision in SCHEMES else 1
    return not (shape.n_embd % columns or shape.head_size % min(columns, COLUMNS["int8"]))


ON_NUMPY = (
    ("many heads", "fp32"), ("many heads", "w8"), ("many heads", "fp16 w4"), ("narrow heads", "fp32"),
    ("7a", "fp32"), ("7a", "w8"), ("7a", "fp16 w4"), ("7a, odd rank", "fp16"),
)  # fmt: skip
ON_GPU = [
    (name, precision)
    for name, shape in SHAPES.items()
    for precision in TOLERANCE
    if (precision == "fp16" or name in IN_ALL) and fits(shape, precision)
]
CASES = [pytest.param(("numpy", *case), id=f"numpy-{'-'.join(case)}") for case in ON_NUMPY]
CASES += [pytest.param(("gpu", *case), id=f"gpu-{'-'.join(case)}", marks=pytest.mark.gpu) for case in ON_GPU]


@pytest.fixture(scope="module", params=CASES)
def sessions(request: pytest.FixtureRequest, artifacts: dict[tuple[str, str], Path]) -> Iterator[Sessions]:
    """The wide kernels, the CPU in float32, and how far they may be apart."""
    where, name, precision = request.param
    with pytest.MonkeyPatch.context() as patch:
        if where == "gpu":
            request.getfixturevalue("gpu")
        else:
            patch.setattr("rwkv_edge.runtime.cuda.Driver", cuda_double.Driver)
            patch.setattr(FusedKernel, "ptx", cuda_double.described)
            patch.setattr(cuda_double, "KERNELS", {**cuda_double.KERNELS, **cuda_versions_double.KERNELS})
        patch.setattr(onnxruntime.SessionOptions, "add_session_config_entry", float_products)
        session = CudaSession(Artifact.open(artifacts[name, precision]))
        oracle = OrtSession(Artifact.open(artifacts[name, oracle_of(precision)]))
        yield session, oracle, TOLERANCE[precision]
        session.close()
        oracle.close()


def oracle_of(precision: str) -> str:
    """The same weights, where the CPU has kernels for them."""
    return precision if precision in SCHEMES else "fp32"


ADD_ENTRY = onnxruntime.SessionOptions.add_session_config_entry


def float_products(options: onnxruntime.SessionOptions, name: str, value: str) -> None:
    """Weights of int8 times activations in float: as fast as it can, the CPU would round those to int8 too."""
    ADD_ENTRY(options, name, "0" if name == "session.qdq_matmulnbits_accuracy_level" else value)


def random_state(session: OrtSession, batch: int, seed: int = 1) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {t.name: draw.normal(0, 0.5, (batch, *t.shape)).astype(np.float32) for t in session.spec.state}


def random_tokens(session: OrtSession, batch: int, count: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, session.spec.vocab_size, (batch, count))


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def assert_states(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    for name in expected:
        assert apart(found[name], expected[name]) <= tolerance, name


@pytest.mark.parametrize(("batch", "count"), [(1, 2), (1, 41), (3, 5)])
def test_prompts(sessions: Sessions, batch: int, count: int) -> None:
    """From a state that is not zero; single steps follow, and a second prompt."""
    session, oracle, tolerance = sessions
    arrays, tokens = random_state(oracle, batch), random_tokens(oracle, batch, count)
    state, other = session.import_state(arrays), oracle.import_state(arrays)
    for _ in range(3):  # as kernels, captured, as a graph; side by side
        assert apart(session.prefill(tokens, state), oracle.prefill(tokens, other)) <= tolerance
        for row in tokens.T[:2]:
            assert apart(session.step(row, state), oracle.step(row, other)) <= tolerance
    assert_states(session.export_state(state), oracle.export_state(other), tolerance)


@pytest.mark.parametrize("batch", [9, 33])
def test_steps_of_large_batches(sessions: Sessions, batch: int) -> None:
    session, oracle, tolerance = sessions
    arrays = random_state(oracle, batch)
    state, other = session.import_state(arrays), oracle.import_state(arrays)
    for row in random_tokens(oracle, batch, 5).T:
        assert apart(session.step(row, state), oracle.step(row, other)) <= tolerance
    assert_states(session.export_state(state), oracle.export_state(other), tolerance)


def test_a_few_streams_through_either_chain(sessions: Sessions) -> None:
    """From which number of streams on the wide kernels run is a choice; a state goes on over a change of it."""
    session, oracle, tolerance = sessions
    arrays, tuning = random_state(oracle, 3), session.tuning
    state, other = session.import_state(arrays), oracle.import_state(arrays)
    launched: list[bool] = []
    try:
        for wide_from in (2, MAX_BATCH + 1, 3):
            session.retune(replace(tuning, wide_from=wide_from))
            for row in random_tokens(oracle, 3, 2, seed=wide_from).T:
                assert apart(session.step(row, state), oracle.step(row, other)) <= tolerance
            launched.append(3 in session._chains)
    finally:
        session.retune(tuning)
    assert launched == [False, True, False]
    assert_states(session.export_state(state), oracle.export_state(other), tolerance)


def test_chunks_are_steps(sessions: Sessions) -> None:
    """Repeated tokens too, which make decays and removal keys of all tokens alike."""
    session, oracle, tolerance = sessions
    arrays = random_state(oracle, 2)
    for tokens in (random_tokens(oracle, 2, 45), np.full((2, 45), 5)):
        state, other = session.import_state(arrays), session.import_state(arrays)
        logits = session.prefill(tokens, state)
        for row in tokens.T:
            expected = session.step(row, other)
        assert apart(logits, expected) <= tolerance
        assert_states(session.export_state(state), session.export_state(other), tolerance)


def test_score(sessions: Sessions) -> None:
    session, oracle, tolerance = sessions
    arrays, tokens = random_state(oracle, 3), random_tokens(oracle, 3, 43)
    state, other = session.import_state(arrays), oracle.import_state(arrays)
    assert apart(session.score(tokens, state), oracle.score(tokens, other)) <= tolerance
    assert_states(session.export_state(state), oracle.export_state(other), tolerance)


def test_watched_prompt(sessions: Sessions) -> None:
    """Told after every chunk; the state may be read then."""
    session, oracle, tolerance = sessions
    tokens = random_tokens(oracle, 2, 13)
    state, seen = session.initial_state(2), []

    def watch(count: int, logits: np.ndarray) -> None:
        seen.append((count, logits.copy(), session.export_state(state)))

    last = session.prefill(tokens, state, watch)
    assert [count for count, _, _ in seen] == [8, 12, 13]
    np.testing.assert_array_equal(seen[-1][1], last)
    for count, logits, arrays in seen:
        other = oracle.initial_state(2)
        assert apart(logits, oracle.prefill(tokens[:, :count], other)) <= tolerance
        assert_states(arrays, oracle.export_state(other), tolerance)


def test_a_watch_that_stops_a_prompt(sessions: Sessions) -> None:
    """The state stands at the end of the chunk that was told last; the session goes on."""
    session, oracle, tolerance = sessions
    tokens = random_tokens(oracle, 1, 13)
    arrays = random_state(oracle, 1)
    state, other = session.import_state(arrays), oracle.import_state(arrays)

    def watch(count: int, _: np.ndarray) -> None:
        if count == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.prefill(tokens, state, watch)
    oracle.prefill(tokens[:, :12], other)
    assert_states(session.export_state(state), oracle.export_state(other), tolerance)
    assert apart(session.prefill(tokens[:, 12:], state), oracle.prefill(tokens[:, 12:], other)) <= tolerance


def test_prompts_of_new_states_find_graphs(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of a length that was seen captures nothing, whichever state it comes to; states stay apart."""
    session, oracle, tolerance = sessions
    tokens = random_tokens(oracle, 2, 13)
    states = [session.import_state(random_state(oracle, 2, seed)) for seed in (1, 2, 3)]
    session.prefill(tokens, states[0])
    monkeypatch.setattr(session._loaded, "captured", None)
    for seed, state in ((2, states[1]), (3, states[2])):
        other = oracle.import_state(random_state(oracle, 2, seed))
        assert apart(session.prefill(tokens, state), oracle.prefill(tokens, other)) <= tolerance
        assert_states(session.export_state(state), oracle.export_state(other), tolerance)
    other = oracle.import_state(random_state(oracle, 2, 1))
    oracle.prefill(tokens, other)
    assert_states(session.export_state(states[0]), oracle.export_state(other), tolerance)


def test_buffers_are_written_before_they_are_read(sessions: Sessions) -> None:
    """Buffers full of NaN leave none behind."""
    session, oracle, _ = sessions
    arrays, tokens = random_state(oracle, 3), random_tokens(oracle, 3, 7)
    expected = session.score(tokens, session.import_state(arrays))
    session._pieces.fill_with_nan()
    np.testing.assert_array_equal(session.score(tokens, session.import_state(arrays)), expected)
    many = np.arange(20) % session.spec.vocab_size
    expected = session.step(many, session.initial_state(20))
    session._pieces.fill_with_nan()
    np.testing.assert_array_equal(session.step(many, session.initial_state(20)), expected)


def test_greedy_choice_of_large_batches(sessions: Sessions) -> None:
    session, _, _ = sessions
    tokens = np.arange(20) % session.spec.vocab_size
    state, other = session.initial_state(20), session.initial_state(20)
    chosen = session.greedy(tokens, state, 5)
    for t in range(5):
        tokens = session.step(tokens, other).argmax(1)
        np.testing.assert_array_equal(chosen[:, t], tokens)


def test_halted_streams_stay(sessions: Sessions) -> None:
    """In prompts and in steps of many."""
    session, oracle, _ = sessions
    for batch, tokens in ((3, random_tokens(oracle, 3, 6)), (11, random_tokens(oracle, 11, 1))):
        state = session.import_state(random_state(oracle, batch))
        before = session.export_state(state)
        flags = np.zeros(batch, np.int32)
        flags[1] = 1
        session._driver.upload(flags, state.halted)
        session.prefill(tokens, state)
        for name, array in session.export_state(state).items():
            np.testing.assert_array_equal(array[1], before[name][1])
            assert not np.array_equal(array[2], before[name][2])


def test_rows_of_a_chain_are_bounded(sessions: Sessions) -> None:
    session, _, _ = sessions
    for batch in (1, 3, 100, MOST_ROWS, 3 * MOST_ROWS):
        with session._pieces.uploaded(np.zeros((batch, CHUNKS[0] + 3), np.int64)) as pieces:
            assert sum(piece.tokens for piece in pieces) == CHUNKS[0] + 3
            assert all(piece.tokens == 1 or piece.tokens * batch <= MOST_ROWS for piece in pieces)


def test_integers_that_no_kernel_takes(artifacts: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of int8 that do not begin at 16 bytes."""
    monkeypatch.setattr("rwkv_edge.runtime.cuda.Driver", cuda_double.Driver)
    monkeypatch.setattr(FusedKernel, "ptx", cuda_double.described)
    monkeypatch.setattr("rwkv_edge.runtime.cuda_driver.device_capability", lambda ordinal=0: (9, 0))
    monkeypatch.setattr("rwkv_edge.plugins.nvrtc.nvrtc_version", lambda: (13, 0))
    assert kernels_fit(Artifact.open(artifacts["narrow heads", "fp32"]))
    artifact = Artifact.open(artifacts["narrow heads", "w8"])
    with pytest.raises(SessionError, match=r"needs columns in multiples of 16.*; use another backend"):
        CudaSession(artifact)
    assert not kernels_fit(artifact)
