"""Sessions over engines, bit for bit those of ONNX Runtime: everything around TensorRT itself is ours and proved here;
what an engine computes is proved where TensorRT is, by `rwkv-edge verify ARTIFACT CHECKPOINT --backend tensorrt`."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda_double
import numpy as np
import pytest
import torch
from tiny import write_checkpoint
from trt_runtime_double import RuntimeDouble, add_engines

from rwkv_edge.artifact import Artifact, write_manifest
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.cli import run
from rwkv_edge.cli.common import SESSION_BACKENDS
from rwkv_edge.engines import error_log
from rwkv_edge.errors import ArtifactError, InputError, MissingDependencyError, RwkvEdgeError, SessionError
from rwkv_edge.evaluation.synthetic import save_pth
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.exporters.trt_candidates import add_candidates
from rwkv_edge.runtime.loop import generate_step
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.sampling import Sampler, SamplerConfig
from rwkv_edge.runtime.session import BACKENDS, open_session
from rwkv_edge.runtime.tensorrt import TrtSession
from rwkv_edge.runtime.trt_graph import expected_ports

FORMS = {
    "fp32": ExportOptions(tokenizer="bytes", chunks=(4, 16), all_logits=True),
    "fp16": ExportOptions(tokenizer="bytes", chunks=(8,), precision="fp16"),
    "batch": ExportOptions(tokenizer="bytes", chunks=(8,), batch=None),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    checkpoint = write_checkpoint(folder / "model.pth")
    for name, options in FORMS.items():
        export_checkpoint(open_checkpoint(checkpoint), folder / name, options)
        add_engines(folder / name)
    return folder


Open = Callable[..., tuple[TrtSession, OrtSession]]


@pytest.fixture
def opened(made: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """A session over a double, and the one over ONNX Runtime that it must equal."""

    def both(form: str, **options: Any) -> tuple[TrtSession, OrtSession]:
        RuntimeDouble(**options).install(monkeypatch)
        session = open_session(made / form, "tensorrt", threads=1)
        assert isinstance(session, TrtSession)
        return session, OrtSession(Artifact.open(made / form), threads=1)

    return both


def random_state(session: Any, batch: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Values that the state's dtypes hold."""
    draw = np.random.default_rng(seed)
    arrays = {t.name: draw.normal(0, 0.5, (batch, *t.shape)).astype(np.float32) for t in session.spec.state}
    return session.export_state(session.import_state(arrays))


def random_tokens(*shape: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape)


def assert_same(session: Any, state: Any, oracle: Any, expected: Any) -> None:
    found = session.export_state(state)
    for name, array in oracle.export_state(expected).items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


CASES = [(form, batch) for form, batch in (("fp32", 1), ("fp16", 1), ("batch", 1), ("batch", 3))]


@pytest.mark.filterwarnings("ignore:steps run without")
@pytest.mark.parametrize("fails", ["", "capture", "capture writes"])
@pytest.mark.parametrize(("form", "batch"), CASES)
def test_steps(form: str, batch: int, fails: str, opened: Open) -> None:
    """Past the first run, the capture and replays of both directions, or past the capture that failed."""
    session, oracle = opened(form, fails=fails)
    arrays = random_state(oracle, batch)
    state, expected = session.import_state(arrays), oracle.import_state(arrays)
    for tokens in random_tokens(9, batch):
        np.testing.assert_array_equal(session.step(tokens, state), oracle.step(tokens, expected))
        assert_same(session, state, oracle, expected)


class Seen(list[tuple[int, np.ndarray]]):
    """What a watch is told."""

    def __call__(self, at: int, logits: np.ndarray) -> None:
        self.append((at, logits.copy()))


@pytest.mark.parametrize(("form", "batch"), CASES)
def test_prompts(form: str, batch: int, opened: Open) -> None:
    """Chunks of both lengths, single steps after them, what is seen in between, and steps after that."""
    session, oracle = opened(form)
    assert session.chunks == oracle.chunks
    state, expected = session.initial_state(batch), oracle.initial_state(batch)
    for length in (1, 3, 4, 16, 43, 43):
        tokens = random_tokens(batch, length, seed=length)
        seen, wanted = Seen(), Seen()
        np.testing.assert_array_equal(session.prefill(tokens, state, seen), oracle.prefill(tokens, expected, wanted))
        assert [at for at, _ in seen] == [at for at, _ in wanted]
        for (_, one), (_, other) in zip(seen, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
        assert_same(session, state, oracle, expected)
        np.testing.assert_array_equal(
            session.prefill(tokens, session.copy_state(state)), oracle.prefill(tokens, oracle.copy_state(expected))
        )


@pytest.mark.parametrize(("form", "batch"), CASES)
def test_scores(form: str, batch: int, opened: Open) -> None:
    session, oracle = opened(form)
    state, expected = session.initial_state(batch), oracle.initial_state(batch)
    for _ in range(3):
        tokens = random_tokens(batch, 37)
        np.testing.assert_array_equal(session.score(tokens, state), oracle.score(tokens, expected))
    assert_same(session, state, oracle, expected)


def test_states_are_values(opened: Open) -> None:
    """A fork goes its own way from either side, and an exported state comes back bit for bit."""
    session, _ = opened("batch")
    state = session.initial_state(3)
    for count in range(5):
        session.step([1, 2, count], state)
        fork, exported = session.copy_state(state), session.export_state(state)
        session.step([4, 5, 6], state)
        for name, array in session.export_state(fork).items():
            np.testing.assert_array_equal(array, exported[name])
        expected = session.step([7, 8, 9], fork)
        np.testing.assert_array_equal(session.step([7, 8, 9], session.import_state(exported)), expected)


def test_runs_are_captured_once(opened: Open) -> None:
    """Each direction runs as it is once, is captured at its second run, and nothing runs in vain."""
    session, _ = opened("fp32")
    trt, driver = session._loader.trt, session._driver
    state = session.initial_state()
    for count in range(1, 9):
        session.step([1], state)
        assert trt.runs == count
    assert trt.contexts == 2
    graphs = [bound.graph for bound in state.room._bound.values()]
    assert [len(graph.work) for graph in graphs] == [1, 1]  # type: ignore[union-attr]
    launches = driver.launches
    session.step([1], state)
    assert driver.launches == launches  # only graphs run


@pytest.mark.parametrize("fails", ["capture", "capture writes"])
def test_what_cannot_be_captured_warns_once(fails: str, opened: Open) -> None:
    session, oracle = opened("fp32", fails=fails)
    states, expected = [session.initial_state() for _ in range(2)], oracle.initial_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for state in states:
            for token in range(6):
                session.step([token], state)
            session.prefill(random_tokens(1, 40), state)
    assert [str(w.message).partition(":")[0] for w in caught] == ["steps run without CUDA graphs, which is slower"]
    assert caught[0].filename == __file__
    for token in range(6):
        oracle.step([token], expected)
    oracle.prefill(random_tokens(1, 40), expected)
    for state in states:
        assert_same(session, state, oracle, expected)


def test_memory_is_given_back(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """States that are dropped free theirs where it is not kept, in whatever order session and state end."""
    monkeypatch.setattr("rwkv_edge.runtime.trt_state.KEPT_BYTES", 0)
    session, _ = opened("fp32")
    prompt = random_tokens(1, 21)
    session.prefill(prompt, session.initial_state())
    gc.collect()
    before = session._driver.free_memory()
    for _ in range(3):
        state = session.initial_state()
        for _ in range(3):
            session.prefill(prompt, state)
        assert session._driver.free_memory() < before
        del state
        gc.collect()
        assert session._driver.free_memory() == before
    state = session.initial_state()
    session.step([1], state)
    session.close()
    assert not state.room._bound
    del state


def test_a_state_takes_over_what_another_left(opened: Open) -> None:
    """Memory, contexts and CUDA graphs, but none of its values."""
    session, oracle = opened("fp32")
    trt, driver = session._loader.trt, session._driver
    prompt = random_tokens(1, 23)
    known = []
    for seed in range(4):
        arrays = random_state(oracle, 1, seed)
        state, expected = session.import_state(arrays), oracle.import_state(arrays)
        np.testing.assert_array_equal(session.prefill(prompt, state), oracle.prefill(prompt, expected))
        fork, other = session.copy_state(state), oracle.copy_state(expected)
        for token in (5, 6, 7):
            np.testing.assert_array_equal(session.step([token], state), oracle.step([token], expected))
        assert_same(session, fork, oracle, other)
        np.testing.assert_array_equal(session.prefill(prompt, fork), oracle.prefill(prompt, other))
        known.append((trt.contexts, driver.free_memory()))
        del state, fork
        gc.collect()
    assert len(set(known)) == 1


def test_an_engine_that_does_not_fit_is_done_without(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """By shorter pieces, which give the same up to rounding: here single steps, to the bit those of the oracle."""
    session, oracle = opened("fp32")
    tokens = random_tokens(1, 21)
    expected = oracle.initial_state()
    steps = [oracle.step(token, expected)[0] for token in tokens.T]
    enough = session._driver.free_memory()
    monkeypatch.setattr(session._driver, "free_memory", lambda: 100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            state = session.initial_state()
            np.testing.assert_array_equal(session.prefill(tokens, state)[0], steps[-1])
            assert_same(session, state, oracle, expected)
        np.testing.assert_array_equal(session.score(tokens, session.initial_state())[0], steps)
    assert [str(w.message).split(", 0.0 GB")[0] for w in caught] == [
        "prompts are read in shorter pieces, which is slower: prefill-16.engine needs some 0.0 GB of the GPU's memory"
    ]
    assert caught[0].filename == __file__
    assert list(session._graphs) == ["step.engine"]
    monkeypatch.setattr(session._driver, "free_memory", lambda: enough)
    session.prefill(tokens, session.initial_state())
    assert sorted(session._graphs) == ["prefill-16.engine", "prefill-4.engine", "step.engine"]


def test_a_tuned_state_is_where_streams_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "model.pth")
    values = {f"blocks.{i}.att.time_state": torch.randn(1, 64, 64) for i in range(2)}
    options = replace(FORMS["batch"], state=save_pth(values, tmp_path / "state.pth"))
    export_checkpoint(open_checkpoint(checkpoint), tmp_path / "tuned", options)
    RuntimeDouble().install(monkeypatch)
    session, oracle = (
        TrtSession(add_engines(tmp_path / "tuned"), "tensorrt"),
        OrtSession(Artifact.open(tmp_path / "tuned")),
    )
    assert session.initial_hash == oracle.initial_hash is not None
    state = session.initial_state(2)
    assert np.abs(session.export_state(state)["wkv.1"]).max() > 1
    assert_same(session, state, oracle, oracle.initial_state(2))


# Candidates


@pytest.fixture
def few(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrtSession:
    """An engine of up to 3 streams that finds 8 candidates."""
    RuntimeDouble().install(monkeypatch)
    shutil.copytree(made / "batch", tmp_path / "few")
    return TrtSession(add_engines(tmp_path / "few", most=3, sample_k=8), "tensorrt")


def test_candidates_are_those_of_the_logits(few: TrtSession) -> None:
    state, other = few.initial_state(3), few.initial_state(3)
    for tokens in random_tokens(7, 3):
        expected = few.step(tokens, other)
        for found, logits in zip(few.step_candidates(tokens, state), expected, strict=True):
            assert found.vocab_size == 256
            assert found.is_sound
            np.testing.assert_array_equal(found.logits, np.sort(logits)[::-1][:8])
            np.testing.assert_array_equal(logits[found.tokens], found.logits)
            assert found.norm == pytest.approx(np.log(np.exp(logits.astype(np.float64)).sum()), rel=1e-6)
            np.testing.assert_array_equal(found.full(), logits)
    assert_same(few, state, few, other)


def test_candidates_of_a_stream_that_has_gone_on(few: TrtSession) -> None:
    state = few.initial_state()
    (found,) = few.step_candidates([1], state)
    few.prefill([[1, 2]], state)
    with pytest.raises(SessionError, match="the stream has gone on since these candidates"):
        found.full()


@pytest.mark.parametrize(
    "config",
    [SamplerConfig(0.0), SamplerConfig(0.7, top_k=4, seed=1), SamplerConfig(top_p=0.02, seed=2), SamplerConfig(seed=3)],
    ids=["greedy", "top-k", "top-p", "all"],
)
def test_generated_tokens_are_those_of_all_logits(
    config: SamplerConfig, few: TrtSession, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []
    download = cuda_double.Driver.download

    def counted(self: Any, pointer: int, array: np.ndarray) -> None:
        fetched.append(array.nbytes)
        download(self, pointer, array)

    monkeypatch.setattr(cuda_double.Driver, "download", counted)
    texts = []
    for session in (few, opened("batch")[1]):
        steps = generate_step(session, Sampler(config), session.initial_state(), [1, 2, 3])
        texts.append([next(steps).token for _ in range(40)])
    assert texts[0] == texts[1]
    whole = sum(nbytes >= 4 * 256 for nbytes in fetched)
    if config.temperature == 0:
        assert whole == 1  # after the prompt


def test_an_engine_without_candidates(opened: Open, made: Path) -> None:
    session, _ = opened("fp32")
    assert session.candidates == 0
    with pytest.raises(SessionError, match=r"step\.engine has no candidates; run 'rwkv-edge build' with --sample-k"):
        session.step_candidates([1], session.initial_state())


# Names, types and shapes


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("batch", [1, None])
def test_inputs_and_outputs_are_those_of_nvidias_parser(batch: int | None, precision: str, tmp_path: Path) -> None:
    """What a session expects of an engine is what the parser makes of the graph, which needs no GPU."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    options = ExportOptions(precision=precision, batch=batch, chunks=(8,), all_logits=True, tokenizer="none")
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "model.pth"))
    manifest = export_checkpoint(checkpoint, tmp_path / "model", options)
    for entry in add_engines(tmp_path / "model", sample_k=5).manifest.engines:
        log = error_log(trt)
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        assert parser.parse_from_file(str(tmp_path / "model" / entry.graph))
        if entry.sample_k:
            add_candidates(trt, network, entry.sample_k)
        tensors = [("INPUT", network.get_input(i)) for i in range(network.num_inputs)]
        tensors += [("OUTPUT", network.get_output(i)) for i in range(network.num_outputs)]
        found = {tensor.name: (mode, tensor.dtype.name, tuple(tensor.shape)) for mode, tensor in tensors}
        assert found == expected_ports(manifest.spec, entry)


# Refusals


def refused(made: Path, backend: str = "tensorrt", form: str = "fp32", **options: Any) -> str:
    with pytest.raises(RwkvEdgeError) as caught:
        open_session(made / form, backend, **options)
    assert str(caught.value).count("\n") == 0
    return str(caught.value)


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another GPU": ({}, {"capability": (8, 7)}, "was built for sm90, but this GPU is sm87; run 'rwkv-edge build'"),
    "no GPU": ({}, {"capability": None}, "was built for sm90, but no NVIDIA GPU was found here"),
    "another version": ({"version": "10.16.1.2"}, {}, "built by TensorRT 10.13.3.9, but 10.16.1.2 is installed"),
    "no start": ({"fails": "start"}, {}, "TensorRT 10.13.3.9 cannot start: Error Code 6: CUDA initialization failure"),
    "no engine": ({"fails": "load"}, {}, "step.engine: Error Code 1: Serialization (no engine); run 'rwkv-edge build'"),
    "no logits": ({"ports": {"logits": None}}, {}, "has 'logits' as None, but its model says ('OUTPUT', 'FLOAT'"),
    "one more": ({"ports": {"x": ("OUTPUT", "FLOAT", (1,))}}, {}, "has 'x' as ('OUTPUT', 'FLOAT', (1,)), but"),
    "another type": ({"ports": {"wkv.0": ("INPUT", "HALF", (1, 1, 64, 64))}}, {}, "has 'wkv.0' as ('INPUT', 'HALF'"),
    "another shape": ({"ports": {"wkv.1": ("INPUT", "FLOAT", (1, 1, 8, 64))}}, {}, "has 'wkv.1' as ('INPUT', 'FLOAT'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(name: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, machine, words = REFUSALS[name]
    RuntimeDouble(**module).install(monkeypatch, **machine)
    assert words in refused(made)


FAILURES = {
    "context": "cannot run step.engine: it does not say why; is the GPU's memory full?",
    "address": "takes no memory for 'token' of step.engine",
    "enqueue": "failed at a run of step.engine: Error Code 1: Cuda Runtime (operation not permitted)",
}


@pytest.mark.parametrize("fails", FAILURES)
def test_a_run_that_fails(fails: str, opened: Open) -> None:
    session, _ = opened("fp32", fails=fails)
    state = session.initial_state()
    before = session.export_state(state)
    with pytest.raises(SessionError) as caught:
        session.step([1], state)
    assert FAILURES[fails] in str(caught.value)
    for name, array in session.export_state(state).items():
        np.testing.assert_array_equal(array, before[name])


@pytest.fixture
def copied(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    RuntimeDouble().install(monkeypatch)
    return Path(shutil.copytree(made / "fp32", tmp_path / "fp32"))


def test_engines_of_other_weights(copied: Path) -> None:
    add_engines(copied, model_hash="a" * 64)
    assert "step.engine was built from other weights" in refused(copied.parent)


def test_a_later_version_runs_version_compatible_engines(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_engines(copied, version_compatible=True)
    RuntimeDouble("10.16.1.2").install(monkeypatch)
    session = open_session(copied, "tensorrt")
    assert session.numerics.startswith("TensorRT 10.16.1.2, numpy, step.engine ")
    session.step([1], session.initial_state())


@pytest.mark.parametrize("damage", ["changed", "cut", "empty", "missing"])
def test_damaged_engines(damage: str, copied: Path) -> None:
    path = copied / "prefill-16.engine"
    data = path.read_bytes()
    path.write_bytes({"changed": data[:-1] + b"!", "cut": data[:-1]}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    words = {"changed": "is not the file that was built", "missing": "is missing"}.get(damage, f"expected {len(data)}")
    found = refused(copied.parent)
    assert "prefill-16.engine" in found
    assert words in found
    assert found.endswith("; run 'rwkv-edge build' again")
    if damage == "changed":  # the library itself says so, when a prompt first needs it
        session = open_session(copied, "tensorrt", check_content=False)
        with pytest.raises(SessionError, match=r"cannot load .*prefill-16\.engine: Error Code 1: Serialization"):
            session.prefill(random_tokens(1, 16), session.initial_state())


def test_no_engines(made: Path, copied: Path) -> None:
    assert "has no engines of TensorRT for RTX; run 'rwkv-edge build' on it with --backend" in refused(
        made, "tensorrt-rtx"
    )
    with pytest.raises(ArtifactError, match="is a file; an artifact is the folder"):
        open_session(copied / "step.onnx", "tensorrt")


@pytest.mark.parametrize("module", [None, SimpleNamespace()], ids=["absent", "types only"])
def test_no_module(module: Any, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(
        MissingDependencyError, match=r"running engines needs the package 'tensorrt': pip install .*tens"
    ):
        open_session(made / "fp32", "tensorrt")


def test_a_module_that_does_not_load(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open\\nshared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert "TensorRT is installed but cannot be loaded: libnvinfer.so.10: cannot open shared" in refused(made)


def test_too_many_streams(opened: Open) -> None:
    session, oracle = opened("batch")
    assert session.initial_state(8).batch == 8
    with pytest.raises(InputError, match="up to 8 streams, not 9; run 'rwkv-edge build' again with --max-batch 9"):
        session.initial_state(9)
    with pytest.raises(InputError, match="up to 8 streams, not 9"):
        session.import_state(random_state(oracle, 9))
    session, _ = opened("fp32")
    with pytest.raises(InputError, match="was exported for batch 1, not 2"):
        session.initial_state(2)


# The backend 'auto'


def test_auto_takes_engines_that_fit(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RuntimeDouble().install(monkeypatch)
    assert isinstance(open_session(made / "fp32"), TrtSession)
    assert isinstance(open_session(made / "fp32", providers=["cpu"]), OrtSession)
    assert isinstance(open_session(made / "fp32", "onnxruntime"), OrtSession)


@pytest.mark.parametrize("case", ["version", "GPU", "no GPU", "no driver", "no module", "cut"])
def test_auto_else_takes_onnx_runtime(case: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capability = {"GPU": (8, 7), "no GPU": None}.get(case, (9, 0))
    RuntimeDouble("10.16.1.2" if case == "version" else "10.13.3.9").install(monkeypatch, capability=capability)
    if case == "no driver":
        monkeypatch.setattr("rwkv_edge.runtime.tensorrt.device_capability", missing_bindings)
    if case == "no module":
        monkeypatch.setitem(sys.modules, "tensorrt", None)
    if case == "cut":
        (copied / "step.engine").write_bytes(b"engine ")
    assert isinstance(open_session(copied), OrtSession)


def missing_bindings(ordinal: int = 0) -> None:
    raise MissingDependencyError("cuda-bindings", "cuda", "running kernels on an NVIDIA GPU")


def test_auto_imports_nothing_without_engines(made: Path, copied: Path) -> None:
    write_manifest(copied, replace(Artifact.open(copied).manifest, engines=()))
    code = """
import sys
from rwkv_edge.runtime.session import BACKENDS, open_session
open_session(sys.argv[1])
assert not {"tensorrt", "tensorrt_rtx", "rwkv_edge.runtime.tensorrt"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code, copied], check=True)


def test_engines_alone_say_why_they_do_not_run(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_manifest(copied, replace(Artifact.open(copied).manifest, graphs=()))
    RuntimeDouble().install(monkeypatch, capability=(8, 7))
    with pytest.raises(SessionError, match="was built for sm90, but this GPU is sm87"):
        open_session(copied)


# Commands


def test_backends_of_the_command_line() -> None:
    assert SESSION_BACKENDS == BACKENDS


def test_providers_are_of_onnx_runtime(made: Path) -> None:
    for backend in ("tensorrt", "cuda"):
        with pytest.raises(InputError, match="execution providers are ONNX Runtime's; name none, or another backend"):
            open_session(made / "fp32", backend, providers=["cpu"])


@pytest.mark.parametrize("form", ["fp32", "fp16"])
def test_verify(form: str, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An engine is compared with its checkpoint; one that computes something else is found out."""
    module = RuntimeDouble().install(monkeypatch)
    command = ["verify", str(made / form), str(made / "model.pth"), "--backend", "tensorrt"]
    assert run(command) == 0
    assert "passed" in capsys.readouterr().out
    assert module.runs >= 64
    RuntimeDouble(wrong=True).install(monkeypatch)
    assert run(command) == 1


def test_every_command_takes_engines(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("The sea is wide, and the boat is small. " * 40)
    texts = []
    for backend in ("onnxruntime", "tensorrt"):
        module = RuntimeDouble().install(monkeypatch)
        shared = ["--backend", backend]
        assert run(["generate", str(made / "fp32"), "The sea", "-n", "24", "--temperature", "0", *shared]) == 0
        assert run(["soak", str(made / "fp32"), "--tokens", "40", "--checkpoint-every", "20", "--json", *shared]) == 0
        capsys.readouterr()
        evaluated = ["eval", str(made / "batch"), "--text", str(tmp_path / "text"), "--window", "64", "--json"]
        assert run([*evaluated, *shared]) == 0
        texts.append(json.loads(capsys.readouterr().out)["score"]["nats"])
        assert (module.runs > 100) == (backend == "tensorrt")
    assert texts[0] == pytest.approx(texts[1], rel=1e-6)
