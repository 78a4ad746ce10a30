"""Files that are no checkpoint, or a damaged one: one sentence each, from `info` and from `export` alike."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tiny import STEP_ONLY, refusal, weights, write_checkpoint

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.cli import run
from rwkv_edge.evaluation.synthetic import save_pth


def refused(capsys: pytest.CaptureFixture[str], path: Path, *words: str) -> None:
    """`info` and `export` refuse the file in the same words, and nothing is written beside it."""
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    found = refusal(capsys, "info", path, "--no-probe")
    assert found == refusal(capsys, "export", path, "-o", path.parent / "artifact")
    for word in (str(path), *words):
        assert word in found
    if path.parent.is_dir():
        assert sorted(path.parent.iterdir()) == before


def zip_of(path: Path, *replaced: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The checkpoint of `weights` with other content in some of its records."""
    plain = io.BytesIO()
    torch.save(weights(), plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, dict(replaced).get(name.partition("/")[2], source.read(name)))
    return path


FOREIGN = {
    "empty": (b"", "is empty; copy or download it again"),
    "HTML": (b"<!DOCTYPE html><html>Not found</html>", "should be a PyTorch file, but is an HTML or XML page"),
    "HTML after a byte order mark": (b"\xef\xbb\xbf \n<html>", "an HTML or XML page"),
    "text": (b"Entry not found", "is text that begins with 'Entry not found': the download failed"),
    "JSON": (b'{"error": "Unauthorized"}', "JSON text, not weights"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a Git LFS pointer"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(64), "a GGUF file of llama.cpp"),
    "GGML": (b"fmgg" + bytes(64), "a GGML file of rwkv.cpp"),
    "one byte": (b"P", "should be a PyTorch file"),
    "zeros": (bytes(10_000), "begins with 00 00 00 00 00 00 00 00"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle of an old torch.save"),
    "safetensors": (save(weights()), "but is a safetensors file: rename it"),
    "zip of something else": (b"PK\x03\x04" + bytes(1000), "is cut off or damaged (File is not a zip file)"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_content_than_the_suffix_says(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, words = FOREIGN[name]
    (tmp_path / "model.pth").write_bytes(data)
    refused(capsys, tmp_path / "model.pth", words)


@pytest.mark.parametrize("suffix", [".gguf", ".txt", "", ".pth.part"])
def test_a_wrong_suffix_says_what_the_file_is(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"model{suffix}"
    write_checkpoint(path)
    refused(capsys, path, "should end in .pth", f"ends in '{path.suffix}'", "its content is a PyTorch file: rename it")


def test_paths_that_are_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, tmp_path / "missing.pth", "cannot be read: No such file or directory")
    refused(capsys, tmp_path / "missing" / "model.pth", "No such file or directory")
    (tmp_path / "folder.pth").mkdir()
    for command in ("info", "export", "generate"):
        found = refusal(capsys, command, tmp_path / ("x" * 300))
        assert "File name too long" in found or "does not exist" in found  # by the version of Python
    found = refusal(capsys, "export", tmp_path / "folder.pth")
    assert "folder.pth should hold model.safetensors or pytorch_model.bin, but holds no weights" in found
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe.pth")
        refused(capsys, tmp_path / "pipe.pth", "is a pipe or a device")  # opening it would wait forever


def test_a_name_that_torch_cannot_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if os.name != "posix":
        pytest.skip("names are Unicode there")
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.pth"))
    try:
        write_checkpoint(tmp_path / "m.pth").rename(path)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert r"m\udcff.pth has a name that is not UTF-8, which torch cannot open; rename it" in refusal(
        capsys, "info", path
    )


# .pth


class RunsCode:
    """What a pickle may do to who loads it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"echo ran > {self.marker}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_does_not_run(legacy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker, path = tmp_path / "marker", tmp_path / "model.pth"
    content = {**weights(), "blocks.0.att.r_k": RunsCode(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    refused(capsys, path, "a pickle of an old torch.save" if legacy else "holds Python objects beside tensors (")
    assert not marker.exists()
    os.system(f"echo ran > {marker}")
    assert marker.exists(), "the marker proves nothing"


def test_a_training_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pth"
    torch.save({"state_dict": weights(), "epoch": 3}, path)
    refused(capsys, path, "should map tensor names to tensors, but 'state_dict' is a dict")
    torch.save({**weights(), "epoch": 3}, path)
    refused(capsys, path, "but 'epoch' is a int")
    torch.save([torch.ones(2)], path)
    refused(capsys, path, "should hold a dictionary of named tensors, but holds a list")
    torch.save({}, path)
    refused(capsys, path, "should hold a dictionary of named tensors")
    torch.save(torch.nn.Linear(2, 2), path)
    refused(capsys, path, "Python objects beside tensors (torch.nn.modules.linear.Linear)")


TENSORS = {
    "int64": (torch.zeros(64, dtype=torch.int64), "is torch.int64, expected dense fp32, fp16 or bf16"),
    "bool": (torch.zeros(64, dtype=torch.bool), "is torch.bool"),
    "complex": (torch.zeros(64, dtype=torch.complex64), "is torch.complex64"),
    "sparse": (torch.eye(4).to_sparse(), "expected dense"),
    "without values": (torch.ones(64, device="meta"), "has no values of its own"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_no_weight(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensor, words = TENSORS[name]
    path = write_checkpoint(tmp_path / "model.pth", ln_out__weight=tensor)
    refused(capsys, path, "tensor 'ln_out.weight'", words)


def test_parameters_export_like_tensors(tmp_path: Path) -> None:
    """`torch.save(dict(model.named_parameters()))` keeps the flag that asks for gradients."""
    plain = write_checkpoint(tmp_path / "plain.pth")
    trained = save_pth({name: torch.nn.Parameter(t) for name, t in weights().items()}, tmp_path / "trained.pth")
    for path in (plain, trained):
        assert run(["export", str(path), "-o", str(path.with_suffix("")), *STEP_ONLY]) == 0
        assert run(["verify", str(path.with_suffix("")), str(path), "--tokens", "4"]) == 0
    assert not open_checkpoint(tmp_path / "trained.pth").load("emb.weight").requires_grad
    assert (tmp_path / "trained/weights.bin").read_bytes() == (tmp_path / "plain/weights.bin").read_bytes()


def test_zip_files_that_torch_must_not_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = zip_of(tmp_path / "model.pth", compression=zipfile.ZIP_DEFLATED)
    refused(capsys, path, "is compressed; re-save the file with torch.save")
    data = write_checkpoint(path).read_bytes()
    for length in (len(data) - 1, len(data) // 2, 100):
        path.write_bytes(data[:length])
        refused(capsys, path, "is cut off or damaged", "copy or download it again")
    hole = data.index(b"PK\x03\x04", 20_000)
    path.write_bytes(data[:hole] + data[hole + 4096 :])
    refused(capsys, path, "copy or download it again")
    refused(capsys, zip_of(path, ("data.pkl", b"\x80\x02}q\x00(X")), "is damaged")
    refused(capsys, zip_of(path, ("data.pkl", b"garbage")), "is damaged (its pickle is broken)")
    refused(capsys, zip_of(path, ("byteorder", b"middle")), "is damaged")
    short = pickle.dumps({}, 2)
    refused(capsys, zip_of(path, ("data.pkl", short)), "should hold a dictionary of named tensors")


# .safetensors


def header(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file of `weights` with another header."""
    data = save(weights())
    length = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + data[8 + length :]


HEADERS = {
    "offsets beyond": (lambda h: h["ln_out.bias"].update(data_offsets=[10**9, 10**9 + 256]), "cut off inside tensor"),
    "offsets reversed": (lambda h: h["ln_out.bias"].update(data_offsets=[256, 0]), "takes 256 bytes, but -256"),
    "negative offsets": (lambda h: h["ln_out.bias"].update(data_offsets=[-256, 0]), "not a size"),
    "fractions": (lambda h: h["ln_out.bias"].update(data_offsets=[0.0, 256.0]), "not a size"),
    "one offset": (lambda h: h["ln_out.bias"].update(data_offsets=[0]), "damaged safetensors header"),
    "negative shape": (lambda h: h["ln_out.bias"].update(shape=[-8, -8]), "not a size"),
    "huge shape": (lambda h: h["ln_out.bias"].update(shape=[2**62, 2**62]), "are reserved"),
    "shape is text": (lambda h: h["ln_out.bias"].update(shape="64"), "not a size"),
    "integers": (lambda h: h["ln_out.bias"].update(dtype="I64"), "is I64, expected one of F64, F32, F16, BF16"),
    "dtype is a list": (lambda h: h["ln_out.bias"].update(dtype=["F32"]), "damaged safetensors header"),
    "no dtype": (lambda h: h["ln_out.bias"].pop("dtype"), "damaged safetensors header"),
    "entry is null": (lambda h: h.update({"ln_out.bias": None}), "damaged safetensors header"),
    "metadata is text": (lambda h: h.update(__metadata__="x"), "damaged safetensors header"),
    "nothing": (lambda h: h.clear(), "holds no tensor"),
    "a name that steers the terminal": (lambda h: h.update({"\x1b[2J\n": {}}), "damaged safetensors header"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_header(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = HEADERS[name]
    (tmp_path / "model.safetensors").write_bytes(header(change))
    refused(capsys, tmp_path / "model.safetensors", words)


def test_headers_that_are_no_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.safetensors"
    data = save(weights())
    for raw in (b'{"a":' * 20_000, b"{" * 20_000, b"{\xff}", b'{"a": ' + b"9" * 5000 + b"}", b"{}" + bytes(100)):
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(1000))
        refused(capsys, path)
    path.write_bytes(struct.pack("<Q", 10**7) + data[8:])
    refused(capsys, path, "is cut off: its header should take 10000000 bytes")
    path.write_bytes(struct.pack("<Q", 2**63) + data[8:])
    refused(capsys, path, "should be a safetensors file")
    for length in (4, 8, 9, 500):
        path.write_bytes(data[:length])
        refused(capsys, path)
    path.write_bytes(data[:-1])
    refused(capsys, path, "is cut off inside tensor '")
    path.write_bytes(write_checkpoint(tmp_path / "model.pth").read_bytes())
    refused(capsys, path, "should be a safetensors file, but is a PyTorch file: rename it")


# What the tensors are


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("blocks.0.ffn.enn.weight",), "is RWKV-8, which cannot be exported: release candidates"),
        (("blocks.0.qkv.k_cache", "blocks.0.att.r_k"), "is RWKV-7b, which cannot be exported: its attention keeps"),
        (("model.layers.0.self_attn.q_proj.weight",), "is not an RWKV checkpoint: expected names such as"),
        (("\x1b]0;title\x07", "emb.weight"), "is not an RWKV checkpoint"),
    ],
)
def test_models_that_cannot_be_exported(
    names: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, save_pth({name: torch.zeros(2, 2) for name in names}, tmp_path / "model.pth"), words)


@pytest.mark.parametrize("name", [name for name in weights() if not name.startswith("blocks.0.") or ".ln0." in name])
def test_every_tensor_is_needed_in_its_shape(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = weights()
    tensor = changed.pop(name)
    path = save_pth(changed, tmp_path / "model.pth")
    refused(capsys, path, name)
    longer, none = [*tensor.shape[:-1], tensor.shape[-1] + 3], [*tensor.shape[:-1], 0]
    for shape in (longer, none, []):
        found = refusal(capsys, "info", save_pth({**changed, name: torch.zeros(shape)}, path))
        assert f"{path}: tensor '" in found
        assert re.search(r"' has shape \[[\d, ]*\], expected ", found), found
        assert f"'{name}' has shape {shape}" in found or shape == longer  # there the others may seem to be wrong


def test_a_block_in_between_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    far = {name.replace("blocks.1.", "blocks.7."): tensor for name, tensor in weights().items()}
    refused(capsys, save_pth(far, tmp_path / "model.pth"), "has no tensors of block 1; is it complete?")


def test_reading_does_not_change_the_file(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.pth")
    before = path.read_bytes()
    checkpoint = open_checkpoint(path)
    for name in checkpoint.tensors:
        checkpoint.load(name)
        checkpoint.release(name)
    assert torch.equal(checkpoint.load("emb.weight"), weights()["emb.weight"])
    assert path.read_bytes() == before
