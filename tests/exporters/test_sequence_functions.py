"""Chunks whose recurrence is a local function: the same prompts as inline, and as single steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from makers import MAKERS
from onnx import TensorProto, helper

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.synthetic import save_pth
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.runtime.session import Session, open_session

RELATIVE = {"fp32": 5e-6, "fp16": 2e-3, "bf16": 2e-2}  # of the largest value; one rounding of activations may differ


def opened(checkpoint: Path, folder: Path, **options: Any) -> Session[Any]:
    export_checkpoint(open_checkpoint(checkpoint), folder, ExportOptions(tokenizer="none", **options))
    return open_session(folder, "onnxruntime", threads=1)


def assert_close(found: np.ndarray, expected: np.ndarray, relative: float) -> None:
    assert np.abs(found - expected).max() <= relative * max(np.abs(expected).max(), 1e-3)


CASES = [(version, "fp32") for version in ("4", "5.0", "5.2", "6", "7a", "7")]
CASES += [(version, precision) for version in ("6", "7") for precision in ("fp16", "bf16")]


@pytest.mark.parametrize(("version", "precision"), CASES)
def test_the_function_is_the_chunk(version: str, precision: str, tmp_path: Path) -> None:
    """Chunks of one run and of several, a rest of single steps, two streams, then a second prompt."""
    checkpoint = save_pth(MAKERS[version](), tmp_path / "model.pth")
    common = {"chunks": (5, 48), "precision": precision, "batch": None, "all_logits": True}
    function = opened(checkpoint, tmp_path / "function", wkv="function", **common)
    inline = opened(checkpoint, tmp_path / "inline", wkv="inline", **common)
    tokens = np.random.default_rng(0).integers(0, function.spec.vocab_size, (2, 107))
    states = [session.initial_state(2) for session in (function, inline)]
    for part in (tokens[:, :60], tokens):
        found, expected = (s.prefill(part, state) for s, state in zip((function, inline), states, strict=True))
        assert_close(found, expected, RELATIVE[precision])
    found, expected = (s.score(tokens, state) for s, state in zip((function, inline), states, strict=True))
    assert_close(found, expected, RELATIVE[precision])
    after = inline.export_state(states[1])
    for name, array in function.export_state(states[0]).items():
        assert_close(array, after[name], RELATIVE[precision])


@pytest.mark.parametrize("version", ["5.2", "6"])
def test_decays_that_leave_nothing(version: str, tmp_path: Path) -> None:
    """e^−e^20 is 0 in float32: its logarithm must not be."""
    weights = MAKERS[version]()
    for name in weights:
        if name.endswith("time_decay"):
            weights[name].view(-1)[::3] = 20.0
    session = opened(save_pth(weights, tmp_path / "model.pth"), tmp_path / "a", wkv="function", chunks=(40,))
    tokens = np.random.default_rng(1).integers(0, session.spec.vocab_size, (1, 40))
    states = session.initial_state(1), session.initial_state(1)
    steps = np.concatenate([session.step(token, states[0]) for token in tokens.T])
    assert_close(session.prefill(tokens, states[1]), steps[-1:], 5e-6)
    after = session.export_state(states[0])
    for name, array in session.export_state(states[1]).items():
        assert np.isfinite(array).all()
        assert_close(array, after[name], 5e-6)


def test_a_function_runs_alone(tmp_path: Path) -> None:
    """Its body takes what the kernel takes and needs nothing of the graph around it: it can be tested by itself."""
    checkpoint = save_pth(MAKERS["7"](), tmp_path / "model.pth")
    opened(checkpoint, tmp_path / "a", wkv="function", chunks=(9,))
    (function,) = onnx.load(tmp_path / "a" / "prefill-9.onnx", load_external_data=False).functions
    assert (function.domain, function.name) == ("rwkv", "wkv7_sequence")
    heads, size = 2, 64
    shapes = {name: [1, 9, heads, size] for name in function.input} | {"state": [1, heads, size, size]}
    values = {name: np.random.default_rng(2).normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    values["w"] = np.exp(-0.6 / (1 + np.exp(-values["w"]))).astype(np.float32)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "after")]
    node = helper.make_node(function.name, list(function.input), ["y", "after"], domain="rwkv")
    graph = helper.make_graph([node], "alone", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("rwkv", 1)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets, functions=[function])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, after = session.run(None, values)
    state = values["state"].astype(np.float64)
    for t in range(9):
        now = [values[name][:, t].astype(np.float64)[..., None, :] for name in ("r", "w", "k", "v", "kk", "a")]
        r, w, k, v, kk, a = now
        removed = (state * kk).sum(-1, keepdims=True)
        state = state * w - removed * (kk * a) + np.swapaxes(v, -1, -2) * k
        np.testing.assert_allclose(y[:, t], (state * r).sum(-1), rtol=0, atol=2e-5)
    np.testing.assert_allclose(after, state, rtol=0, atol=2e-5)
