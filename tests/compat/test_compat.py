"""The interface of the `rwkv` package where it differs, and where it refuses."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_double
import numpy as np
import pytest
import torch
from tiny import SHAPE, STEP_ONLY, write_checkpoint

from rwkv_edge.cli import run
from rwkv_edge.compat import PIPELINE, PIPELINE_ARGS, RWKV
from rwkv_edge.compat.store import cache_folder, stored_artifact
from rwkv_edge.compat.strategy import strategy_from_text
from rwkv_edge.errors import (
    CheckpointError,
    InputError,
    MissingDependencyError,
    RwkvEdgeError,
    SessionError,
    StateError,
    TokenizerError,
)
from rwkv_edge.evaluation.synthetic import random_v7, save_pth
from rwkv_edge.plugins.fused_spec import FusedKernel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds model.pth, and in 'cache' what was exported of it."""
    folder = tmp_path_factory.mktemp("compat")
    write_checkpoint(folder / "model.pth")
    return folder


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RWKV_EDGE_CACHE", str(folder / "cache"))
    return folder / "cache" / "artifacts"


@pytest.fixture
def model(folder: Path) -> RWKV:
    return RWKV(model=str(folder / "model"), strategy="cpu fp32", verbose=False, threads=1)


def logits(model: RWKV, tokens: Any, state: Any = None) -> np.ndarray:
    found: np.ndarray = np.asarray(model.forward(tokens, state)[0])
    return found


# States are values


def test_a_state_can_be_passed_again(model: RWKV) -> None:
    _, state = model.forward([1, 2, 3], None)
    first = logits(model, [4, 5], state)
    np.testing.assert_array_equal(logits(model, [4, 5], state), first)
    np.testing.assert_array_equal(logits(model, [4, 5], copy.deepcopy(state)), first)
    np.testing.assert_array_equal(logits(model, [4, 5], copy.copy(state)), first)
    np.testing.assert_array_equal(logits(model, [4, 5], pickle.loads(pickle.dumps(state))), first)
    np.testing.assert_array_equal(logits(model, [4, 5], [tensor.clone() for tensor in state]), first)
    np.testing.assert_array_equal(logits(model, [4, 5], state), first)  # looked at by now
    np.testing.assert_allclose(logits(model, [1, 2, 3, 4, 5]), first, atol=1e-5)


def test_tensors_of_a_state_may_be_changed(model: RWKV) -> None:
    _, state = model.forward([1, 2, 3], None)
    before = copy.deepcopy(state)
    assert len(state) == 6
    assert state[1].shape == (1, 64, 64)
    assert isinstance(state[1], torch.Tensor)
    state[1] *= 0
    state[0] = torch.zeros(64)
    changed = logits(model, 4, state)
    assert not np.allclose(changed, logits(model, 4, before))
    state[1], state[0] = before[1], before[0]
    np.testing.assert_array_equal(logits(model, 4, state), logits(model, 4, before))


def test_a_shallow_copy_shares_no_slots(model: RWKV) -> None:
    _, state = model.forward([1, 2, 3], None)
    twin = copy.copy(state)
    twin[0] = torch.zeros(64)
    assert float(state[0].abs().max()) > 0


def test_zero_state(model: RWKV) -> None:
    np.testing.assert_array_equal(logits(model, 7, model.generate_zero_state()), logits(model, 7))


def test_a_state_moves_to_another_session_of_the_model(model: RWKV, folder: Path) -> None:
    other = RWKV(str(folder / "model.pth"), "cpu fp32", verbose=False, threads=1)
    _, state = model.forward([1, 2, 3], None)
    np.testing.assert_array_equal(logits(other, 4, state), logits(model, 4, state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: list(s)[:3], r"a list of 6 tensors, not 3"),
        (lambda s: [*list(s)[:5], torch.zeros(3)], r"'ffn_shift.1' has shape \[1, 3\], expected \[B, 64\]"),
        (lambda s: [*list(s)[:5], "text"], r"an element is str"),
        (lambda s: [*list(s)[:5], list(s)[5] * float("nan")], r"holds NaN"),
    ],
)
def test_states_that_do_not_fit(model: RWKV, change: Any, message: str) -> None:
    with pytest.raises(StateError, match=message):
        model.forward([1], change(model.forward([1, 2], None)[1]))


# Tokens and logits


def test_tokens_of_all_kinds(model: RWKV) -> None:
    expected = logits(model, [9])
    for token in (9, np.int64(9), (9,), np.array([9]), torch.tensor([9]), torch.tensor(9)):
        np.testing.assert_array_equal(logits(model, token), expected)
    for wrong in ([], "text", [1.5], None):
        with pytest.raises(InputError, match="tokens are an integer or a list of integers"):
            model.forward(wrong, None)
    with pytest.raises(InputError, match="token 256 is outside the vocabulary of 256"):
        model.forward([256], None)


def test_all_logits(model: RWKV) -> None:
    tokens = list(range(20))
    every, after = model.forward(tokens, None, full_output=True)
    assert every.shape == (20, 256)
    np.testing.assert_allclose(np.asarray(every[-1]), logits(model, tokens), atol=1e-5)
    np.testing.assert_allclose(logits(model, 3, after), logits(model, [*tokens, 3]), atol=1e-5)
    assert model.forward([1], None, full_output=True)[0].shape == (256,)


def test_what_programs_read_of_a_model(model: RWKV) -> None:
    assert (model.args.n_layer, model.args.n_embd, model.args.vocab_size, model.n_layer) == (2, 64, 256, 2)
    with pytest.raises(AttributeError, match="no attribute 'z': the weights are in the artifact"):
        _ = model.z


def test_without_torch_arrays_answer_like_tensors(model: RWKV, folder: Path) -> None:
    host = RWKV(str(folder / "model"), "cpu fp32", tensors="numpy", verbose=False, threads=1)
    out, state = host.forward([1, 2, 3], None)
    assert type(out.detach().cpu().float().numpy()) is np.ndarray
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, logits(model, [1, 2, 3]))
    np.testing.assert_array_equal(logits(host, 4, [x.clone() for x in state]), logits(host, 4, state))
    with pytest.raises(InputError, match="tensors must be one of torch, numpy"):
        RWKV(str(folder / "model"), "cpu fp32", tensors="jax")


# Strategies


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuda fp16 *20 -> cpu fp32", "splits the layers, but an exported model runs on one device as a whole"),
        ("cuda fp16i8 *10+", "splits the layers"),
        ("cuda fp16i4", "fp32i8 and fp16i8 store weights in 8 bits; for others run 'rwkv-edge quantize'"),
        ("cuda bf16i8", "fp32i8 and fp16i8 store weights"),
        ("dml fp16", "the device must be cpu or cuda, not dml"),
        ("cpu", "a strategy is a device and a precision, such as 'cpu fp32' or 'cuda fp16', not 'cpu'"),
        ("cpu:1 fp32", "a strategy is"),
        ("", "a strategy is"),
    ],
)
def test_strategies_that_cannot_be_meant(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        strategy_from_text(text)


def test_strategies() -> None:
    assert strategy_from_text(" cpu  bf16 ").providers is None
    assert strategy_from_text("cuda fp16").providers == ["CUDAExecutionProvider"]
    assert strategy_from_text("cuda:1 fp16").providers == ["CUDAExecutionProvider:device_id=1"]


def test_a_gpu_that_is_not_there_is_said_before_the_export(folder: Path, cache: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has a CUDA provider here")
    with pytest.raises(SessionError, match="'cuda bf16' needs ONNX Runtime's CUDAExecutionProvider, but here are only"):
        RWKV(str(folder / "model"), "cuda bf16")
    assert not list(cache.glob("model-bf16-*"))


@pytest.mark.parametrize("strategy", ["cuda fp32", "cuda fp32i8"])
def test_own_kernels_where_onnxruntime_has_no_cuda(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With numpy in the kernels' place."""
    import onnxruntime

    save_pth(random_v7(replace(SHAPE, ranks=(16, 16, 16, 16))), tmp_path / "model.pth")
    model = RWKV(str(tmp_path / "model"), "cpu fp32", verbose=False, threads=1)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr("rwkv_edge.compat.strategy._has_kernels", lambda: True)
    monkeypatch.setattr("rwkv_edge.runtime.cuda.Driver", cuda_double.Driver)
    monkeypatch.setattr(FusedKernel, "ptx", cuda_double.described)
    own = RWKV(str(tmp_path / "model"), strategy, verbose=False)
    assert own.session.numerics.startswith("cuda kernels")
    tolerance = 0.1 if strategy.endswith("i8") else 1e-4
    expected = logits(model, [1, 2, 3])
    np.testing.assert_allclose(logits(own, [1, 2, 3]), expected, atol=tolerance * np.abs(expected).max())
    _, state = own.forward([1, 2], None)
    once, again = logits(own, 3, state), logits(own, 3, state)
    np.testing.assert_array_equal(once, again)  # a state is a value here too
    with pytest.raises(SessionError, match=r"'rwkv-edge\[cuda\]'"):
        RWKV(str(tmp_path / "model"), f"cuda:1 {strategy[5:]}")


@pytest.mark.parametrize("strategy", ["cpu fp32i8", "cpu fp16i8"])
def test_weights_in_8_bits(strategy: str, model: RWKV, folder: Path, cache: Path) -> None:
    small = RWKV(str(folder / "model"), strategy, verbose=False, threads=1)
    expected = logits(model, list(range(20)))
    error = np.abs(logits(small, list(range(20))) - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 0.1
    entry = Path(small.session._artifact.path).parent
    assert entry in cache.glob(f"model-{strategy[4:]}-*")
    assert [child.name for child in entry.iterdir() if child.is_dir()] == [Path(small.session._artifact.path).name]
    assert '"w8"' in next(entry.glob("*/manifest.json")).read_text()


@pytest.mark.gpu
@pytest.mark.parametrize(("form", "tolerance"), [("fp32", 1e-4), ("fp16", 2e-2), ("fp32i8", 0.1), ("fp16i8", 0.1)])
def test_the_gpu_gives_what_the_cpu_gives(form: str, tolerance: float, folder: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has no CUDA provider here")
    one, other = (RWKV(str(folder / "model"), strategy, verbose=False) for strategy in ("cpu fp32", f"cuda {form}"))
    assert "CUDAExecutionProvider" in other.session.numerics
    state = one.forward([1, 2, 3], None)[1]
    expected = logits(one, [4, 5], state)
    np.testing.assert_allclose(logits(other, [4, 5], list(state)), expected, atol=tolerance * np.abs(expected).max())
    _, there = other.forward([1, 2, 3], None)
    first = logits(other, 4, there)
    np.testing.assert_array_equal(logits(other, 4, there), first)


# The cache


def test_the_model_is_named_as_a_path(folder: Path, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is neither .*missing nor .*missing\.pth"):
        RWKV(str(tmp_path / "missing"), "cpu fp32")
    with pytest.raises(InputError, match="convert_and_save_and_exit is not needed"):
        RWKV(str(folder / "model"), "cpu fp32", convert_and_save_and_exit="x.pth")
    (tmp_path / "text.pth").write_text("no model")
    with pytest.raises(CheckpointError, match=r"text\.pth should be a PyTorch file, but is text"):
        RWKV(str(tmp_path / "text"), "cpu fp32", verbose=False)
    assert not list(cache.glob("text-*/*[0-9a-f]"))


def test_an_artifact_needs_no_export(folder: Path, tmp_path: Path, model: RWKV) -> None:
    artifact = tmp_path / "artifact"
    assert run(["export", str(folder / "model.pth"), "-o", str(artifact), "--precision", "fp16", *STEP_ONLY]) == 0
    with pytest.raises(InputError, match="was exported in fp16; say so in the strategy: 'cpu fp16'"):
        RWKV(artifact, "cpu fp32")
    half = RWKV(artifact, "cpu fp16", verbose=False)
    np.testing.assert_allclose(logits(half, [1, 2, 3]), logits(model, [1, 2, 3]), atol=0.05)
    assert half.forward([1], None)[1][0].dtype == torch.float16


def test_a_checkpoint_is_exported_once_and_again_when_it_changes(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_checkpoint(tmp_path / "other.pth")
    first = logits(RWKV(str(path), "cpu fp32"), 1)
    assert f"rwkv-edge: exporting {path} in fp32 to {cache}" in capsys.readouterr().err
    RWKV(str(tmp_path / "other"), "cpu fp32")
    assert capsys.readouterr().err == ""
    write_checkpoint(path, seed=1)
    os.utime(path, (1, 1))
    assert not np.allclose(logits(RWKV(str(path), "cpu fp32"), 1), first)
    (entry,) = cache.glob("other-fp32-*")
    assert sum(child.is_dir() for child in entry.iterdir()) == 1  # the former artifact is gone


def test_a_damaged_artifact_is_exported_again(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(tmp_path / "damaged.pth")
    first = logits(RWKV(str(path), "cpu fp32"), 1)
    (weights,) = cache.glob("damaged-fp32-*/*/weights.bin")
    weights.write_bytes(bytes(weights.stat().st_size))
    np.testing.assert_array_equal(logits(RWKV(str(path), "cpu fp32"), 1), first)
    assert "weights.bin is not the file that was exported" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RWKV_EDGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(RwkvEdgeError, match="cannot be written: Not a directory; set RWKV_EDGE_CACHE"):
        RWKV(str(folder / "model"), "cpu fp32")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RWKV_EDGE_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/rwkv-edge")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder().parts[-3:] == ("Library", "Caches", "rwkv-edge")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert cache_folder() == Path("/local/rwkv-edge/Cache")


TWO = "import sys; from rwkv_edge.compat import RWKV; print(RWKV(sys.argv[1], 'cpu fp32').forward(1)[0].sum().item())"


def test_two_processes_export_once(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "shared.pth")
    command = [sys.executable, "-W", "error", "-c", TWO, str(path)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], printed
    assert printed[0][0] == printed[1][0] != ""
    assert sum("exporting" in errors for _, errors in printed) == 1


WITHOUT_TORCH = """
import sys
for name in ("torch", "onnx", "onnxscript", "onnx_ir"):
    sys.modules[name] = None  # an import of it fails
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else found(name, *rest)
from rwkv_edge.compat import RWKV
from rwkv_edge.errors import MissingDependencyError
model = RWKV(sys.argv[1], "cpu fp32")
out, state = model.forward([1, 2, 3], None)
out, state = model.forward(4, [x.clone() for x in state])
print(out.detach().cpu().numpy().argmax())
try:
    RWKV(sys.argv[2], "cpu fp32")
except MissingDependencyError as error:
    print(error)
"""


def test_a_device_without_torch(folder: Path, tmp_path: Path, model: RWKV) -> None:
    """What is in the cache runs; what is not needs an export, and the sentence says what to do."""
    other = shutil.copy(folder / "model.pth", tmp_path / "never exported.pth")
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, str(folder / "model"), str(other)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    best, sentence = done.stdout.splitlines()
    assert int(best) == logits(model, [1, 2, 3, 4]).argmax()
    assert "(or export it elsewhere and pass the artifact's folder as the model) needs the package" in sentence


def test_what_exports_is_missing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rwkv_edge.exporters.onnx", None)
    path = shutil.copy(folder / "model.pth", tmp_path / "new.pth")
    with pytest.raises(MissingDependencyError, match="rwkv-edge\\[export\\]"):
        stored_artifact(Path(path), strategy_from_text("cpu fp32"), lambda _: None)


# The pipeline


class Fixed:
    """Gives the tokens, greedily, after a prompt of so many."""

    def __init__(self, tokens: list[int], prompt: int = 1) -> None:
        self.tokens, self.prompt = tokens, prompt
        self.fed: list[list[int]] = []

    def forward(self, tokens: list[int], state: Any) -> tuple[np.ndarray, int]:
        self.fed.append(list(tokens))
        read = (state or 0) + len(tokens)
        out = np.zeros(65536, np.float32)
        out[self.tokens[max(0, read - self.prompt)]] = 9
        return out, read


@pytest.fixture(scope="module")
def world() -> PIPELINE:
    return PIPELINE(None, "rwkv_vocab_v20230424")


def test_pieces_are_whole_characters(world: PIPELINE) -> None:
    tokens = [*(byte + 1 for byte in "é世".encode()), 34]  # ids 1 to 256 are the bytes
    world.model = Fixed(tokens)
    pieces: list[str] = []
    args = PIPELINE_ARGS(temperature=0, alpha_frequency=0, alpha_presence=0)
    assert world.generate("a", 6, args, pieces.append) == "é世!"
    assert pieces == ["é", "世", "!"]


def test_tokens_are_stopped_at_banned_and_chunked(world: PIPELINE) -> None:
    prompt = world.encode("The sea, the sea")
    world.model = Fixed([50, 50, 60, 0], len(prompt))
    args = PIPELINE_ARGS(temperature=0, alpha_presence=0, alpha_frequency=0, token_stop=[60], chunk_len=2)
    assert world.generate("The sea, the sea", 50, args) == world.decode([50, 50])
    assert len(prompt) > 2
    assert world.model.fed[: -(-len(prompt) // 2)] == [prompt[i : i + 2] for i in range(0, len(prompt), 2)]
    assert args.token_ban == []
    world.model = Fixed([50])
    assert world.generate("a", 1, PIPELINE_ARGS(temperature=0, token_ban=[50])) != world.decode([50])


def test_draws_are_those_of_numpy_s_choice(world: PIPELINE) -> None:
    scores = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    probs = np.exp(scores.astype(np.float64)) / np.exp(scores.astype(np.float64)).sum()
    kept = np.sort(probs)[::-1]
    probs[probs < kept[np.argmax(kept.cumsum() >= 0.8)]] = 0
    probs[np.argsort(probs)[:-20]] = 0
    probs = probs ** (1 / 1.7)
    np.random.seed(3)
    expected = [int(np.random.choice(1000, p=probs / probs.sum())) for _ in range(200)]
    np.random.seed(3)
    assert [world.sample_logits(scores, 1.7, 0.8, 20) for _ in range(200)] == expected
    assert len(set(expected)) > 5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: PIPELINE(None, "cl100k_base"), InputError, "'cl100k_base' is not supported"),
        (lambda p: PIPELINE(None, "missing.json"), TokenizerError, "missing.json cannot be read"),
        (lambda p: p.generate(""), InputError, "ctx must not be empty"),
        (lambda p: p.generate("a", args=PIPELINE_ARGS(chunk_len=0)), InputError, "chunk_len must be at least 1"),
        (lambda p: p.generate("a", args=PIPELINE_ARGS(token_ban=[70000])), InputError, "token_ban names a token"),
        (lambda p: p.sample_logits(np.zeros((2, 3))), InputError, "logits must be one row"),
        (lambda p: p.sample_logits(np.full(9, np.nan)), SessionError, "NaN or \\+inf"),
        (lambda p: p.sample_logits(np.full(9, -np.inf)), SessionError, "every token is banned"),
    ],
)
def test_what_a_pipeline_refuses(world: PIPELINE, call: Any, error: type[Exception], message: str) -> None:
    world.model = Fixed([1] * 9)
    with pytest.raises(error, match=message):
        call(world)
    assert world.generate("", 0) == ""
