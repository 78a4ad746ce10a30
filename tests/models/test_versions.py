"""RWKV-4 to 7a against the `rwkv` package on random checkpoints with every oddity, and against the models in
../shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import Oracle
from parity import exported_session, random_tokens, relative, worst_state

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.evaluation.synthetic import Shape, Shape7, random_v4, random_v5, random_v6, random_v7, save_pth
from rwkv_edge.models.torch_ops import TorchModel
from rwkv_edge.models.versions import model_from_checkpoint

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    version: str
    make: Callable[[], Weights]


SIZES = {
    "head 64": Shape(2, 128),
    "head 32": Shape(2, 96, head_size=32),
    "head 8": Shape(2, 32, head_size=8),
    "1 layer": Shape(1, 128),
    "odd ffn": Shape(2, 128, ffn_mult=2.25),
}
CASES = {
    **{f"4, {n}": Case("4", lambda s=s: random_v4(s)) for n, s in SIZES.items() if not n.startswith("head")},
    "4, plain": Case("4", lambda: random_v4(Shape(3, 64))),
    "4, attention width": Case("4", lambda: random_v4(Shape(2, 64, n_att=96))),
    **{
        f"{form}, {n}": Case(form, lambda s=s, form=form: random_v5(s, form))
        for form in ("5.0", "5.1", "5.2")
        for n, s in SIZES.items()
    },
    **{f"6, {n}": Case("6", lambda s=s: random_v6(s)) for n, s in SIZES.items()},
    "6, odd ranks": Case("6", lambda: random_v6(Shape(2, 128, ranks=(7, 12)))),
    "6, bf16 file": Case("6", lambda: random_v6(Shape(2, 128), dtype=torch.bfloat16)),
    "7a, head 64": Case("7a", lambda: random_v7(Shape7(2, 128), deep_embed=32)),
    "7a, head 32": Case("7a", lambda: random_v7(Shape7(2, 64, head_size=32), deep_embed=32)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_rwkv_package(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    weights = case.make()
    path = save_pth(weights, tmp_path / "model.pth")
    tokens = random_tokens(64, 256)
    # the package folds ln0 into the embedding in the dtype of the file, so it gets the same values in float32
    oracle = Oracle(save_pth({n: t.float() for n, t in weights.items()}, tmp_path / "oracle.pth"), case.version)
    expected, expected_state = oracle.steps(tokens)
    session = exported_session(path, tmp_path / "artifact", wkv="function" if "head 32" in name else "inline")
    assert session.spec.version == case.version
    state = session.initial_state()
    found = np.stack([session.step([token], state)[0] for token in tokens])
    assert relative(found, expected) < 1e-4
    assert worst_state(session.export_state(state), oracle.named_state(expected_state))[0] < 1e-4


@pytest.mark.parametrize("version", ["4", "5.0", "5.1", "5.2", "6", "7", "7a"])
def test_torch_sequence_equals_torch_steps_from_a_state(version: str, tmp_path: Path) -> None:
    makers: dict[str, Callable[[], Weights]] = {
        "4": lambda: random_v4(Shape()),
        "6": lambda: random_v6(Shape()),
        "7": lambda: random_v7(Shape7()),
        "7a": lambda: random_v7(Shape7(), deep_embed=32),
    }
    weights = makers.get(version, lambda: random_v5(Shape(), version))()
    checkpoint = open_checkpoint(save_pth(weights, tmp_path / "model.pth"))
    model = TorchModel(model_from_checkpoint(checkpoint), torch.float64)
    tokens = np.array([random_tokens(21, 256, seed) for seed in range(3)])
    _, begun = model.forward(tokens[:, :8], model.initial_state(3))
    at_once, state_at_once = model.forward(tokens[:, 8:], begun)
    state = begun
    for t in range(8, 21):
        logits, state = model.forward(tokens[:, t : t + 1], state)
    assert torch.allclose(at_once, logits, atol=1e-10)
    assert all(torch.allclose(state[name], tensor, atol=1e-10) for name, tensor in state_at_once.items())


def test_recorded_logits_of_rwkv_cpp_for_version_4(shared_models: Path, tmp_path: Path) -> None:
    session = exported_session(shared_models / "tiny-rwkv-4v0-660K.pth", tmp_path / "artifact")
    found = session.prefill([list(b'"in')], session.initial_state())[0]
    expected = np.load(shared_models / "tiny-rwkv-4v0-660K.logits.npy")
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("fp16", 2e-2)])
def test_trained_model_of_version_5(
    precision: str, bound: float, shared_models: Path, shared_text: Path, tmp_path: Path
) -> None:
    path = shared_models / "tiny-rwkv-5v2-730K.pth"
    tokens = list((shared_text / "wikitext2-valid.txt").read_bytes()[:512])
    expected, _ = Oracle(path, "5.2").steps(tokens)
    session = exported_session(path, tmp_path / "artifact", precision=precision)
    state = session.initial_state()
    found = np.stack([session.step([token], state)[0] for token in tokens])
    assert np.isfinite(found).all()
    assert all(np.isfinite(array).all() for array in session.export_state(state).values())
    assert relative(found, expected) < bound


def loud(weights: Weights, factor: float) -> Weights:
    """The same model with what adds to the residual stream, and the stream's beginning, scaled up by ``factor``."""
    scaled = dict(weights)
    for name, tensor in weights.items():
        if name.endswith("att.output.weight") or ".ln0." in name:
            scaled[name] = tensor * factor
        elif name.endswith("ffn.key.weight"):
            scaled[name] = tensor * 12  # its square is a part of the factor: weights stay in an ordinary range
        elif name.endswith("ffn.value.weight"):
            scaled[name] = tensor * factor / 144
    return scaled


@pytest.mark.parametrize("version", ["4", "5.2", "6"])
def test_activations_beyond_fp16_stay_finite_in_fp16(version: str, tmp_path: Path) -> None:
    make = {"4": random_v4, "5.2": random_v5, "6": random_v6}[version]
    weights = make(Shape(24, 64, head_size=32))
    tokens = random_tokens(32, 256)
    calm = residual_peak(save_pth(loud(weights, 1.0), tmp_path / "calm.pth"), tokens)
    path = save_pth(loud(weights, 80_000 / calm), tmp_path / "model.pth")
    assert residual_peak(path, tokens) > 65504
    expected, _ = Oracle(path, version).steps(tokens)
    plain = exported_session(path, tmp_path / "plain", precision="fp16", rescale=0)
    state = plain.initial_state()
    assert not np.isfinite(np.stack([plain.step([token], state)[0] for token in tokens])).all()
    session = exported_session(path, tmp_path / "artifact", precision="fp16")
    assert session.spec.rescale == 6
    state = session.initial_state()
    found = np.stack([session.step([token], state)[0] for token in tokens])
    assert np.isfinite(found).all()
    assert relative(found, expected) < 5e-2
    ranked = np.sort(expected, axis=-1)
    decided = ranked[:, -1] - ranked[:, -2] > 5e-2 * np.abs(expected).max()  # random logits nearly tie now and then
    assert decided.mean() > 0.25
    assert (found.argmax(-1) == expected.argmax(-1))[decided].all()


def residual_peak(path: Path, tokens: list[int]) -> float:
    """Largest |value| of the residual stream in float32."""
    from rwkv_edge.models import torch_ops

    class Watching(torch_ops.TorchOps):
        peak = 0.0

        def residual(self, x: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
            total = super().residual(x, update)
            Watching.peak = max(Watching.peak, float(total.abs().max()))
            return total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_ops, "TorchOps", Watching)
        model = TorchModel(model_from_checkpoint(open_checkpoint(path)))
        model.forward([tokens], model.initial_state())
    return Watching.peak


def test_keys_beyond_the_root_of_fp16_do_not_overflow(tmp_path: Path) -> None:
    weights = random_v7(Shape7(2, 64))
    for i in range(2):
        weights[f"blocks.{i}.ffn.key.weight"] *= 150  # keys of several hundred: squares beyond 65504
    path = save_pth(weights, tmp_path / "model.pth")
    tokens = random_tokens(16, 256)
    logits = {}
    for precision in ("fp32", "fp16"):
        session = exported_session(path, tmp_path / precision, precision=precision)
        state = session.initial_state()
        logits[precision] = np.stack([session.step([token], state)[0] for token in tokens])
    assert np.isfinite(logits["fp16"]).all()
    assert relative(logits["fp16"], logits["fp32"]) < 2e-2
