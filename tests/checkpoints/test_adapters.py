"""Adapters: merged as torch merges them, tensor by tensor; and refused in words where they do not fit."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_writers import (
    Weights,
    fla_7,
    random_lora,
    save_bin,
    save_sharded,
    save_st,
    targets_of,
    transformers_names,
    web_rwkv,
)
from parity import relative

from rwkv_edge.artifact import Artifact
from rwkv_edge.checkpoints import Checkpoint, open_checkpoint
from rwkv_edge.checkpoints import adapters as adapters_module
from rwkv_edge.checkpoints.adapters import merge_adapter, open_merged
from rwkv_edge.checkpoints.states import load_tuned_state
from rwkv_edge.cli import run
from rwkv_edge.errors import CheckpointError, InputError
from rwkv_edge.evaluation.synthetic import Shape, Shape7, random_v4, random_v7
from rwkv_edge.models.versions import model_from_checkpoint
from rwkv_edge.runtime.session import open_session

V7 = random_v7(Shape7(2, 64, 48, head_size=16, ranks=(8, 8, 4, 12)))
KEY = "blocks.1.att.key"


@pytest.fixture(params=["one chunk", "many chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are merged at once, and a few rows at a time."""
    if request.param == "many chunks":
        monkeypatch.setattr(adapters_module, "CHUNK_NUMEL", 300)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_bin(V7, tmp_path / "base.pth")


def assert_merged(found: Checkpoint, expected: Weights, tolerance: float = 1e-6) -> None:
    assert set(found.tensors) == set(expected)
    for name, info in found.tensors.items():
        tensor = found.load(name)
        assert (tuple(tensor.shape), str(tensor.dtype)) == (info.shape, f"torch.{info.dtype}"), name
        torch.testing.assert_close(tensor, expected[name].reshape(info.shape), rtol=0, atol=tolerance)
        found.release(name)


def with_lora(weights: Weights, adapter: Weights, alpha: float) -> Weights:
    """torch's own merge, in float32 and rounded once."""
    merged = dict(weights)
    for name in adapter:
        if name.endswith(".lora_A"):
            target = name.removesuffix(".lora_A")
            a, b = adapter[name].float(), adapter[f"{target}.lora_B"].float()
            weight = weights[f"{target}.weight"]
            merged[f"{target}.weight"] = (weight.float() + (b @ a) * (alpha / a.shape[0])).to(weight.dtype)
    return merged


@pytest.mark.usefixtures("chunk")
def test_lora_equals_the_merge_of_torch(base: Path, tmp_path: Path) -> None:
    lora = random_lora(V7, rank=6)
    merged = open_merged(base, save_bin(lora, tmp_path / "lora.pth"), 16)
    expected = with_lora(V7, lora, 16)
    assert not torch.equal(expected[f"{KEY}.weight"], V7[f"{KEY}.weight"])
    assert_merged(merged, expected)
    assert merged.layout == "PyTorch .pth, with LoRA (rank 6, alpha 16, 2 layers) of lora.pth"


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_sum_is_rounded_once_to_the_dtype_of_the_base(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in V7.items()}
    lora = random_lora(V7)  # in float32
    merged = open_merged(save_bin(weights, tmp_path / "b.pth"), save_bin(lora, tmp_path / "l.pth"), 8)
    found, expected = merged.load(f"{KEY}.weight"), with_lora(weights, lora, 8)[f"{KEY}.weight"]
    assert found.dtype == dtype
    assert torch.equal(found, expected) or dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-6)


NAMES: dict[str, Callable[[str], str]] = {
    "PEFT": lambda n: f"base_model.model.{n}.weight",
    "PEFT with the adapter's name": lambda n: f"base_model.model.{n}.default.weight",
    "Lightning": lambda n: f"model.{n}",
    "weights": lambda n: f"{n}.weight",
}


@pytest.mark.parametrize("form", NAMES)
def test_variants_of_the_names(form: str, base: Path, tmp_path: Path) -> None:
    lora = random_lora(V7)
    stored = {NAMES[form](name): tensor for name, tensor in lora.items()}
    assert_merged(open_merged(base, save_st(stored, tmp_path / "lora.safetensors"), 4), with_lora(V7, lora, 4))


def test_the_form_of_web_rwkv(base: Path, tmp_path: Path) -> None:
    lora = {name: tensor.half() for name, tensor in random_lora(V7).items()}
    stored = web_rwkv(lora)
    assert stored[f"{KEY}.lora.0"].shape == (64, 4)
    assert_merged(open_merged(base, save_st(stored, tmp_path / "lora.st"), 4), with_lora(V7, lora, 4))


def test_adapters_in_the_names_of_other_layouts(tmp_path: Path) -> None:
    v4 = random_v4(Shape(2, 64, 48))
    lora = random_lora(v4)
    names = {name: f"base_model.model.{new}.weight" for name, new in zip(lora, transformers_names(lora), strict=True)}
    adapter = save_st({names[name]: tensor for name, tensor in lora.items()}, tmp_path / "lora.safetensors")
    folder = save_sharded(transformers_names(v4), tmp_path / "hf")
    for path in (folder, save_bin(v4, tmp_path / "model.pth")):
        assert_merged(open_merged(path, adapter, 4), with_lora(v4, lora, 4))


@pytest.mark.usefixtures("chunk")
def test_a_target_that_the_layout_transposes(base: Path, tmp_path: Path) -> None:
    """PEFT's 'all-linear' on fla's RWKV-7 also changes the low-rank halves, which fla stores transposed."""
    a, b = torch.randn(2, 64), torch.randn(8, 2)
    stem = "base_model.model.model.layers.1.attn.w_lora.lora.0"
    adapter = save_st({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, tmp_path / "lora.safetensors")
    expected = V7["blocks.1.att.w1"] + (b @ a).t() * 2
    for path in (base, save_st(fla_7(V7), tmp_path / "fla.safetensors")):
        found = open_merged(path, adapter, 4).load("blocks.1.att.w1")
        torch.testing.assert_close(found, expected)


def test_whole_tensors_replace_those_of_the_base(base: Path, tmp_path: Path) -> None:
    whole = {
        "blocks.0.ln1.weight": torch.randn(64),
        "blocks.0.att.x_r": torch.randn(64),
        "emb.weight": torch.randn(48, 64).half(),
        f"{KEY}.weight": torch.randn(64, 64),
    }
    lora = random_lora(V7)
    merged = open_merged(base, save_bin({**lora, **whole}, tmp_path / "lora.pth"), 4)
    assert merged.tensors["emb.weight"].dtype == "float16"
    assert merged.load("blocks.0.att.x_r").shape == (1, 1, 64)  # the base's
    assert_merged(merged, with_lora({**V7, **whole}, lora, 4))


@pytest.mark.parametrize("suffix", [".pth", ".st"])
def test_a_tuned_state_in_the_adapter_is_not_lost(suffix: str, base: Path, tmp_path: Path) -> None:
    states = {f"blocks.{i}.att.time_state": torch.randn(4, 16, 16).half() for i in range(2)}
    both = {**{name: tensor.half() for name, tensor in random_lora(V7).items()}, **states}
    path = tmp_path / f"adapter{suffix}"
    merged = open_merged(base, save_bin(both, path) if suffix == ".pth" else save_st(web_rwkv(both), path), 4)
    found = load_tuned_state(merged, model_from_checkpoint(merged).spec)
    assert torch.equal(found.wkv[1], states["blocks.1.att.time_state"])


def test_a_folder_of_peft_says_its_alpha(base: Path, tmp_path: Path) -> None:
    lora = random_lora(V7)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_st({NAMES["PEFT"](name): tensor for name, tensor in lora.items()}, folder / "adapter_model.safetensors")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({"lora_alpha": 10, "r": 4}))
    assert_merged(open_merged(base, folder), with_lora(V7, lora, 10))
    assert_merged(open_merged(base, folder, 3), with_lora(V7, lora, 3))
    config.write_text(json.dumps({"lora_alpha": 10, "use_rslora": True}))
    with pytest.raises(CheckpointError, match="a scale of its own"):
        open_merged(base, folder)
    for text in ("{", "[1]", '{"lora_alpha": "x"}', '{"lora_alpha": true}'):
        config.write_text(text)
        with pytest.raises(InputError, match="--lora-alpha"):
            open_merged(base, folder)


def blocks_by_hand(weight: torch.Tensor, b: torch.Tensor, by_column: bool) -> torch.Tensor:
    """Block by block, as the formula reads."""
    r, merged = b.shape[-1], weight.clone()
    for i in range(weight.shape[0] // r):
        for j in range(weight.shape[1] // r):
            block = weight[i * r : (i + 1) * r, j * r : (j + 1) * r]
            change = b[j] if by_column else b[i]
            merged[i * r : (i + 1) * r, j * r : (j + 1) * r] = block + block @ change + change
    return merged


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("part", ["disha", "bone", "miss_block", "bone_block.default"])
def test_blocks(part: str, base: Path, tmp_path: Path) -> None:
    by_column = part in ("disha", "bone")
    adapter, expected = {}, dict(V7)
    for target in targets_of(V7):
        weight = V7[f"{target}.weight"]
        b = torch.randn(weight.shape[1 if by_column else 0] // 16, 16, 16) * 0.1
        adapter[f"{target}.{part}"] = b
        expected[f"{target}.weight"] = blocks_by_hand(weight, b, by_column)
    merged = open_merged(base, save_bin(adapter, tmp_path / "a.pth"))
    assert_merged(merged, expected, 2e-6)
    assert "DiSHA or Bone (rank 16, 2 layers)" in merged.layout


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(("part", "rank"), [("disha", 16), ("bone", 24), ("miss_block", 24), ("bone_block", 64)])
def test_shards(part: str, rank: int, base: Path, tmp_path: Path) -> None:
    """24 does not divide 64: the last shard of the inputs is narrower."""
    adapter, expected = {}, dict(V7)
    for target in targets_of(V7):
        out, inner = V7[f"{target}.weight"].shape
        d = torch.randn(rank, out) * 0.1
        adapter[f"{target}.{part}"] = d
        # the method as it is trained: y = W x + dᵀ Σ_shards x
        eye = torch.nn.functional.pad(torch.eye(inner), (0, -inner % rank))
        change = eye.reshape(inner, -1, rank).sum(1) @ d
        expected[f"{target}.weight"] = V7[f"{target}.weight"] + change.t()
    merged = open_merged(base, save_bin(adapter, tmp_path / "a.pth"))
    assert_merged(merged, expected)
    assert f"MiSS (rank {rank}, 2 layers)" in merged.layout


def test_mini_shards(base: Path, tmp_path: Path) -> None:
    d = torch.randn(8, 16)
    merged = open_merged(base, save_bin({f"{KEY}.miss_block": d}, tmp_path / "a.pth"))
    expected = V7[f"{KEY}.weight"] + d.repeat(8, 4).t()
    torch.testing.assert_close(merged.load(f"{KEY}.weight"), expected)


class Counting:
    """A checkpoint that counts loads."""

    def __init__(self, stored: Checkpoint) -> None:
        self.path, self.layout, self.tensors = stored.path, stored.layout, stored.tensors
        self.stored, self.loads = stored, list[str]()

    def load(self, name: str) -> torch.Tensor:
        self.loads.append(name)
        return self.stored.load(name)

    def release(self, name: str) -> None:
        self.stored.release(name)


def test_nothing_is_loaded_before_it_is_asked_for_and_nothing_is_kept(base: Path, tmp_path: Path) -> None:
    stored = Counting(open_checkpoint(base))
    merged = merge_adapter(stored, save_bin(random_lora(V7), tmp_path / "lora.pth"), 4)
    assert stored.loads == []
    tensors = [weakref.ref(merged.load(f"{target}.weight")) for target in targets_of(V7)]
    gc.collect()
    assert [ref() for ref in tensors] == [None] * len(tensors)
    assert len(stored.loads) == len(tensors)


def first_logits(artifact: Path) -> np.ndarray:
    session = open_session(artifact)
    return session.step([5], session.initial_state())


def test_the_exported_model_is_the_merged_one(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = random_lora(V7)
    path = save_bin(lora, tmp_path / "lora.pth")
    merged = save_bin(with_lora(V7, lora, 8), tmp_path / "merged.pth")
    options = ["--tokenizer", "none", "-o"]
    assert run(["export", str(base), "--lora", str(path), "--lora-alpha", "8", *options, str(tmp_path / "a")]) == 0
    assert run(["export", str(merged), *options, str(tmp_path / "b")]) == 0
    assert run(["export", str(base), *options, str(tmp_path / "c")]) == 0
    found, expected, plain = (first_logits(tmp_path / name) for name in "abc")
    assert relative(found, expected) < 1e-4
    assert relative(plain, expected) > 1e-2
    assert "LoRA (rank 4, alpha 8" in str(Artifact.open(tmp_path / "a").manifest.source["layout"])
    assert run(["verify", str(tmp_path / "a"), str(base), "--lora", str(path), "--lora-alpha", "8"]) == 0
    assert run(["verify", str(tmp_path / "a"), str(base)]) == 1
    capsys.readouterr()


def test_info_describes_an_adapter(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_bin({**random_lora(V7, rank=6), "emb.weight": V7["emb.weight"]}, tmp_path / "lora.pth")
    assert run(["info", str(path)]) == 0
    text = capsys.readouterr().out
    for part in ("adapter, LoRA", "rank         6, alpha", "2: 0 to 1", "att.key, att.output", "replaces     1 tensor"):
        assert part in text
    assert run(["info", "--json", str(path)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["method"], facts["ranks"], facts["layers"]) == ("adapter", "LoRA", [6], [0, 1])


LORA = random_lora(V7)
A, B = LORA[f"{KEY}.lora_A"], LORA[f"{KEY}.lora_B"]
ILL: dict[str, tuple[Weights, str]] = {
    "no B": ({f"{KEY}.lora_A": A}, r"blocks.1.att.key.weight has a lora_A \('.*lora_A'\) without a lora_B"),
    "no A": ({f"{KEY}.lora_B": B}, "without a lora_A"),
    "no lora.1": ({f"{KEY}.lora.0": A.t()}, "without a lora.1"),
    "ranks": ({f"{KEY}.lora_A": A, f"{KEY}.lora_B": B[:, :3]}, r"is \[64, 64\], which '.*' \[4, 64\] and"),
    "width": ({f"{KEY}.lora_A": A[:, :32], f"{KEY}.lora_B": B}, "do not fit"),
    "vector": ({f"{KEY}.lora_A": A[0], f"{KEY}.lora_B": B}, "do not fit"),
    "scalar": ({f"{KEY}.lora_A": torch.tensor(1.0), f"{KEY}.lora_B": B}, "do not fit"),
    "rank 0": ({f"{KEY}.lora_A": A[:0], f"{KEY}.lora_B": B[:, :0]}, "do not fit"),
    "layer": ({"blocks.7.att.key.lora_A": A, "blocks.7.att.key.lora_B": B}, "blocks.7.att.key.weight, which .* lacks"),
    "target": ({"blocks.1.att.gate.lora_A": A, "blocks.1.att.gate.lora_B": B}, "lacks; is it an adapter of another"),
    "not a matrix": ({"blocks.1.ln1.lora_A": A, "blocks.1.ln1.lora_B": B}, "which is not a matrix of the base"),
    "two kinds": ({f"{KEY}.lora_A": A, f"{KEY}.lora_B": B, f"{KEY}.disha": A}, "parts that do not belong together"),
    "mixed forms": ({f"{KEY}.lora_A": A, f"{KEY}.lora.1": B}, "parts that do not belong together"),
    "two adapters": (
        {f"{KEY}.lora_A.default.weight": A, f"{KEY}.lora_A.other.weight": A, f"{KEY}.lora_B.default.weight": B},
        "are for one place; keep one adapter",
    ),
    "DoRA": ({f"{KEY}.lora_A": A, f"{KEY}.lora_magnitude_vector": B[:, 0]}, "is of DoRA, which cannot be merged here"),
    "PiSSA": ({f"{KEY}.init_lora_A": A}, "is of PiSSA's initial halves"),
    "AdaLoRA": ({f"{KEY}.lora_A": A, f"{KEY}.lora_E": A}, "is of AdaLoRA"),
    "whole tensor": ({**LORA, "emb.weight": torch.zeros(50, 64)}, r"'emb.weight' \[50, 64\] does not fit emb.weight"),
    "unknown tensor": ({**LORA, "blocks.0.att.magic": torch.zeros(3)}, "'blocks.0.att.magic' is for .* lacks; is it"),
    "no adapter": ({"blocks.0.att.r_k": torch.zeros(3)}, "is not an adapter: expected names such as"),
    "block axis": ({"blocks.1.ffn.key.disha": torch.zeros(16, 16, 16)}, r"\[in/r, r, r\] or \[r, out\]"),
    "block axis of PEFT": ({"blocks.1.ffn.key.miss_block": torch.zeros(4, 16, 16)}, r"expected \[out/r, r, r\]"),
    "odd blocks": ({f"{KEY}.disha": torch.zeros(4, 16, 8)}, "does not fit"),
    "block size": ({f"{KEY}.disha": torch.zeros(2, 24, 24)}, "does not fit"),
    "shards": ({f"{KEY}.bone": torch.zeros(64, 8)}, r"does not fit: expected \[in/r, r, r\] or \[r, out\]"),
    "wide shards": ({f"{KEY}.bone": torch.zeros(65, 64)}, "does not fit"),
    "4-D": ({f"{KEY}.disha": torch.zeros(1, 1, 1, 1)}, "does not fit"),
    "transposed whole tensor": (
        {**{f"model.layers.1.attn.k_proj.{p}": t for p, t in (("lora_A", A), ("lora_B", B))},
         "model.layers.1.attn.w_lora.lora.0.weight": torch.zeros(8)}, "does not fit blocks.1.att.w1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ILL)
def test_an_adapter_that_does_not_fit(name: str, base: Path, tmp_path: Path) -> None:
    tensors, words = ILL[name]
    path = save_bin(tensors, tmp_path / "adapter.pth")
    needs_alpha = any("lora" in tensor for tensor in tensors)
    with pytest.raises(CheckpointError, match=words):
        open_merged(base, path, 4 if needs_alpha else None)


def test_alpha(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = save_bin(LORA, tmp_path / "lora.pth")
    disha = save_bin({f"{KEY}.disha": torch.zeros(16, 64)}, tmp_path / "disha.pth")
    with pytest.raises(InputError, match="LoRA of rank 4, whose alpha it does not say: pass --lora-alpha"):
        open_merged(base, lora)
    with pytest.raises(InputError, match="is MiSS, which has no alpha"):
        open_merged(base, disha, 4)
    for alpha in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="must be a finite number"):
            open_merged(base, lora, alpha)
    with pytest.raises(InputError, match="pass its file with --lora too"):
        open_merged(base, None, 4)
    assert run(["export", str(base), "--lora", str(lora), "-o", str(tmp_path / "out")]) == 2
    assert "--lora-alpha" in capsys.readouterr().err


def test_a_base_given_as_its_own_adapter(base: Path) -> None:
    with pytest.raises(CheckpointError, match="is not an adapter"):
        open_merged(base, base, 4)
