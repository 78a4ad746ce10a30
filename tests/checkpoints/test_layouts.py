"""The same model in every layout is the same model, bit by bit, and folders that are not whole are refused in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from layout_writers import (
    Weights,
    behind_prefix,
    fla_6,
    fla_7,
    save_bin,
    save_sharded,
    save_st,
    transformers_names,
    web_rwkv,
)

from rwkv_edge.artifact import Artifact
from rwkv_edge.checkpoints import Checkpoint, open_checkpoint
from rwkv_edge.cli import run
from rwkv_edge.errors import CheckpointError
from rwkv_edge.evaluation.synthetic import Shape, Shape7, random_v4, random_v5, random_v6, random_v7, save_pth

SHAPE = Shape(2, 64, 48, head_size=16, ranks=(6, 10))
SHAPE_7 = Shape7(2, 64, 48, head_size=16, ranks=(8, 8, 4, 12))
HALF = torch.float16
V7 = random_v7(SHAPE_7, dtype=HALF)
MODELS: dict[str, Weights] = {
    "4": random_v4(SHAPE, dtype=HALF),
    "5.0": random_v5(SHAPE, "5.0", dtype=HALF),
    "5.1": random_v5(SHAPE, "5.1", dtype=HALF),
    "5.2": random_v5(SHAPE, "5.2", dtype=HALF),
    "6": random_v6(SHAPE, dtype=HALF),
    "7": V7,
    "7a": random_v7(SHAPE_7, dtype=HALF, deep_embed=4),
}


@dataclass(frozen=True)
class Case:
    model: str
    write: Callable[[Weights], Weights]
    words: str


CASES = {
    **{f"transformers {v}": Case(v, transformers_names, "transformers' names") for v in ("4", "5.0", "5.2", "6")},
    "fla 7": Case("7", fla_7, "fla's names of RWKV-7"),
    "fla 7 stacked": Case("7", lambda w: fla_7(w, stacked=True), "fla's names of RWKV-7"),
    "fla 6": Case("6", fla_6, "fla's names of RWKV-6"),
    "web-rwkv 4": Case("4", web_rwkv, "safetensors"),
    "web-rwkv 5.2": Case("5.2", web_rwkv, "web-rwkv's names of RWKV-5"),
    "web-rwkv 6": Case("6", web_rwkv, "web-rwkv's names of RWKV-6"),
    "web-rwkv 7": Case("7", web_rwkv, "web-rwkv's transposition of RWKV-7"),
    "web-rwkv 7a": Case("7a", web_rwkv, "web-rwkv's transposition of RWKV-7"),
    "prefix 7": Case("7", behind_prefix, "official names behind a prefix"),
    "prefix 4": Case("4", lambda w: behind_prefix(w, "model."), "official names behind a prefix"),
    "official 7": Case("7", dict, "safetensors"),
}


def assert_same(found: Checkpoint, expected: Weights) -> None:
    """Names, dtypes and bits; axes of length 1 do not count, and neither does the unused value residual of layer 0."""
    unused = {f"blocks.0.att.v{i}" for i in range(3)}
    assert set(expected) - unused <= set(found.tensors) <= set(expected)
    for name, info in found.tensors.items():
        tensor = found.load(name)
        assert tuple(tensor.shape) == info.shape, name
        assert tensor.dtype == expected[name].dtype == getattr(torch, info.dtype), name
        assert [n for n in info.shape if n != 1] == [n for n in expected[name].shape if n != 1], name
        assert torch.equal(tensor.reshape(expected[name].shape), expected[name]), name
        found.release(name)


@pytest.mark.parametrize("name", CASES)
def test_every_layout_is_the_same_model(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    stored = case.write(MODELS[case.model])
    for path in (save_st(stored, tmp_path / "model.safetensors"), save_bin(stored, tmp_path / "model.bin")):
        opened = open_checkpoint(path)
        assert_same(opened, MODELS[case.model])
        assert case.words in opened.layout or case.words == "safetensors"
    assert torch.equal(opened.load("emb.weight"), MODELS[case.model]["emb.weight"])  # after its pages were dropped


def test_web_rwkv_spreads_the_decay_of_5_1_over_the_heads(tmp_path: Path) -> None:
    official = MODELS["5.1"]
    found = open_checkpoint(save_st(web_rwkv(official), tmp_path / "model.st"))
    for name in ("time_decay", "time_faaaa"):
        tensor = found.load(f"blocks.1.att.{name}")
        assert tensor.shape == (4, 16)
        assert torch.equal(tensor, official[f"blocks.1.att.{name}"][:, None].expand(4, 16))


def test_views_are_not_copies(tmp_path: Path) -> None:
    found = open_checkpoint(save_st(fla_7(V7), tmp_path / "model.safetensors"))
    low = found.load("blocks.0.att.w1")
    assert low.t().is_contiguous()
    assert low.data_ptr() == found.load("blocks.0.att.w1").data_ptr()


@pytest.mark.parametrize("stem", ["model", "pytorch_model"])
def test_shards_of_a_hugging_face_folder(stem: str, tmp_path: Path) -> None:
    folder = save_sharded(fla_7(V7, stacked=True), tmp_path / "rwkv7-hf", stem)
    suffix = "safetensors" if stem == "model" else "bin"
    for path in (folder, folder / f"{stem}.{suffix}.index.json"):
        opened = open_checkpoint(path)
        assert_same(opened, V7)
        assert "3 shards" in opened.layout
        assert opened.path == path


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "RWKV-x070-World-0.1B.pth"])
def test_one_file_in_a_folder(file: str, tmp_path: Path) -> None:
    (save_st if file.endswith("safetensors") else save_bin)(V7, tmp_path / file)
    (tmp_path / "training_args.bin").write_bytes(b"not weights")
    assert_same(open_checkpoint(tmp_path), V7)


def test_a_symlink_into_a_cache_is_followed(tmp_path: Path) -> None:
    save_st(V7, tmp_path / "blob.safetensors")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to("../blob.safetensors")
    assert_same(open_checkpoint(snapshot), V7)


def test_an_export_from_another_layout_is_the_same_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pth(V7, tmp_path / "model.pth")
    save_sharded(fla_7(V7, stacked=True), tmp_path / "rwkv7-hf")
    save_st(web_rwkv(V7), tmp_path / "model.st")
    hashes = set()
    for source in ("model.pth", "rwkv7-hf", "model.st"):
        target = tmp_path / f"{source}.out"
        assert run(["export", str(tmp_path / source), "-o", str(target), "--tokenizer", "none"]) == 0
        assert run(["info", "--no-probe", str(tmp_path / source)]) == 0
        hashes.add(Artifact.open(target).manifest.model_hash)
    assert len(hashes) == 1
    assert "fla's names of RWKV-7" in capsys.readouterr().out


def test_a_real_model_in_the_layout_of_transformers(shared_models: Path, tmp_path: Path) -> None:
    official = torch.load(shared_models / "tiny-rwkv-4v0-660K.pth", weights_only=True)
    assert_same(open_checkpoint(save_sharded(transformers_names(official), tmp_path / "hf")), official)


def _index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _spoil_none(folder: Path) -> None:
    (folder / "README.md").write_text("no weights")


def _spoil_several(folder: Path) -> None:
    save_st(V7, folder / "model.safetensors")
    save_bin(V7, folder / "pytorch_model.bin")


def _spoil_two_pths(folder: Path) -> None:
    save_bin(V7, folder / "a.pth")
    save_bin(V7, folder / "b.pth")


def _spoil_artifact(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")
    (folder / "weights.bin").write_bytes(b"x")


def _spoil_index_gone(folder: Path) -> None:
    save_sharded(V7, folder)
    (folder / "model.safetensors.index.json").unlink()


def _spoil_shard_gone(folder: Path) -> None:
    save_sharded(V7, folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def _spoil_shard_cut(folder: Path) -> None:
    save_sharded(V7, folder)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def _spoil_tensor_gone(folder: Path) -> None:
    save_st({"emb.weight": V7["emb.weight"]}, folder / "a.safetensors")
    _index(folder, {"emb.weight": "a.safetensors", "head.weight": "a.safetensors"})


def _spoil_json(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


SPOILS: dict[str, tuple[Callable[[Path], None], str]] = {
    "none": (_spoil_none, "holds no weights"),
    "several": (_spoil_several, r"several files of weights \(model.safetensors, pytorch_model.bin\)"),
    "two pths": (_spoil_two_pths, r"several files of weights \(a.pth, b.pth\)"),
    "artifact": (_spoil_artifact, "it is an exported artifact"),
    "no index": (_spoil_index_gone, "without their index; download model.safetensors.index.json"),
    "no shard": (_spoil_shard_gone, "'model-00002-of-00003.safetensors', which is missing"),
    "cut shard": (_spoil_shard_cut, "cut off inside tensor"),
    "no tensor": (_spoil_tensor_gone, "'head.weight' is in 'a.safetensors', but it is not"),
    "not JSON": (_spoil_json, "not a JSON index"),
    "parent": (
        lambda f: _index(f, {"emb.weight": "../a.safetensors"}),
        "'../a.safetensors', which is not a file of its",
    ),
    "absolute": (lambda f: _index(f, {"emb.weight": "/etc/passwd"}), "not a file of its folder"),
    "drive": (lambda f: _index(f, {"emb.weight": "C:a.safetensors"}), "not a file of its folder"),
    "dots": (lambda f: _index(f, {"emb.weight": ".."}), "not a file of its folder"),
    "long": (lambda f: _index(f, {"emb.weight": "a" * 9000}), "which is missing"),
    "number": (lambda f: _index(f, {"emb.weight": 3}), "not a file of its folder"),
    "empty map": (lambda f: _index(f, {}), "no 'weight_map'"),
    "list": (lambda f: _index(f, [1]), "no 'weight_map'"),
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_folder_that_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    spoil, words = SPOILS[name]
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path)


def test_stacks_and_transposed_tensors_of_another_shape(tmp_path: Path) -> None:
    stored = fla_7(V7, stacked=True)
    stored["model.layers.0.attn.x_x"] = stored["model.layers.0.attn.x_x"][:5]
    with pytest.raises(CheckpointError, match=r"'model.layers.0.attn.x_x' has shape \[5, 64\], expected 6 rows"):
        open_checkpoint(save_st(stored, tmp_path / "a.safetensors"))
    stored = fla_7(V7)
    stored["model.layers.1.attn.a_lora.lora.0.weight"] = torch.zeros(8)
    with pytest.raises(CheckpointError, match=r"shape \[8\], expected two dimensions"):
        open_checkpoint(save_st(stored, tmp_path / "b.safetensors"))
    stored = fla_6(MODELS["6"])
    for part, words in (("x_proj.0.linear", r"\[5 ranks, width\]"), ("x_proj.2", r"\[width, 5 ranks\]")):
        spoiled = {**stored, f"model.layers.0.attn.{part}.weight": torch.zeros(7, 7)}
        path = save_st(spoiled, tmp_path / "c.safetensors")
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(path)


def test_two_names_for_one_tensor(tmp_path: Path) -> None:
    stored = {**fla_7(V7), "blocks.0.att.key.weight": V7["blocks.0.att.key.weight"]}
    with pytest.raises(CheckpointError, match=r"are both 'blocks.0.att.key.weight'"):
        open_checkpoint(save_st(stored, tmp_path / "model.safetensors"))


def test_adapters_and_states_are_no_models(tmp_path: Path) -> None:
    lora = {"blocks.0.att.key.lora_A": torch.zeros(2, 64), "blocks.0.att.key.lora_B": torch.zeros(64, 2)}
    with pytest.raises(CheckpointError, match=r"is an adapter, not a model: .* with --lora"):
        open_checkpoint(save_bin(lora, tmp_path / "lora.pth"))
    state = {"blocks.0.att.time_state": torch.zeros(4, 16, 16)}
    with pytest.raises(CheckpointError, match=r"is a tuned state, not a model: .* with --state"):
        open_checkpoint(save_bin(state, tmp_path / "state.pth"))
