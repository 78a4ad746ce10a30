"""Checkpoints by name, from a hub on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import Hub, served
from safetensors.torch import save_file
from tiny import STEP_ONLY, sentence, weights, write_checkpoint

from rwkv_edge.errors import InputError, MissingDependencyError
from rwkv_edge.hub import HubPath, checkpoint_name, hub_path, is_hub_path, local_checkpoint

pytest.importorskip("huggingface_hub", reason="the package huggingface_hub is not installed")

# The package reads its environment at import: one process a place, for all commands in it.
RUN = """
import contextlib, io, json, sys, time
from rwkv_edge.cli import run
time.sleep = lambda _: None  # between the package's retries
found = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


def ran(hub: Hub, folder: Path, *commands: str, offline: bool = False) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of commands; the cache is in ``folder``."""
    environment = {**os.environ, **hub.environment(folder / "home"), **({"HF_HUB_OFFLINE": "1"} if offline else {})}
    command = [sys.executable, "-W", "error", "-c", RUN, json.dumps([line.split() for line in commands])]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bars, no warnings of the package
    return [(code, out, err) for code, out, err in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    pth = write_checkpoint(folder / "model.pth").read_bytes()
    save_file(weights(), folder / "model.safetensors")
    shards = dict(list(weights().items())[:10]), dict(list(weights().items())[10:])
    names = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    for name, part in zip(names, shards, strict=True):
        save_file(part, folder / name)
    index = {"weight_map": {key: name for name, part in zip(names, shards, strict=True) for key in part}}
    hub = Hub()
    one = (folder / "model.safetensors").read_bytes()
    hub.repositories = {
        "owner/many": {"README.md": b"text", "small/tiny-0.1.pth": pth, "other.pth": pth},
        "owner/single-0.1B": {"README.md": b"text", "weights.pth": pth},
        "owner/folder": {"model.safetensors": one, "config.json": b"{}", "pytorch_model.bin": b"not wanted"},
        "owner/shards": {
            **{name: (folder / name).read_bytes() for name in names},
            "model.safetensors.index.json": json.dumps(index).encode(),
        },
        "owner/text": {"README.md": b"text", "tokenizer.json": b"{}"},
        "owner/locked": {"model.pth": pth},
        "owner/broken": {"model.pth": pth},
        "owner/cut": {"model.pth": pth},
    }
    hub.gated, hub.broken = {"owner/locked"}, {"owner/broken"}
    with served(hub):
        yield hub


def test_export_info_and_verify_by_name(hub: Hub, tmp_path: Path) -> None:
    name = "hf://owner/many/small/tiny-0.1.pth"
    step = " ".join(STEP_ONLY)
    export, info, verify = ran(
        hub, tmp_path, f"export {name} {step}", f"info {name} --no-probe", f"verify tiny-0.1-fp32 {name} --tokens 4"
    )
    assert export[:2] == (0, export[1])
    assert export[1].startswith("tiny-0.1-fp32: RWKV-7")
    assert info[0] == 0
    assert "checkpoint, RWKV-7" in info[1]
    assert verify[0] == 0, verify
    asked = len([line for line in hub.requests if line == "GET owner/many/resolve/main/small/tiny-0.1.pth"])
    assert asked <= 1  # the rest came from the cache


def test_repositories_as_folders(hub: Hub, tmp_path: Path) -> None:
    step = " ".join(STEP_ONLY)
    names = {"folder": "folder", "shards": "shards", "single-0.1B": "single-0.1B"}
    for done in ran(hub, tmp_path, *(f"export hf://owner/{name} {step}" for name in names)):
        assert done[0] == 0, done
    for name in names:
        assert (tmp_path / f"{name}-fp32" / "manifest.json").is_file()
    assert not any("pytorch_model.bin" in line for line in hub.requests if line.startswith("GET"))
    assert not any("README" in line for line in hub.requests)
    digests = {json.loads((tmp_path / f"{n}-fp32" / "manifest.json").read_bytes())["model_hash"] for n in names}
    assert len(digests) == 1  # they hold the same model


def test_without_a_connection_the_cache_serves(hub: Hub, tmp_path: Path) -> None:
    lines = [f"info hf://{name} --no-probe" for name in ("owner/many/other.pth", "owner/folder", "owner/shards")]
    for done in ran(hub, tmp_path, *lines):
        assert done[0] == 0, done
    before = len(hub.requests)
    for done in ran(hub, tmp_path, *lines, offline=True):
        assert done[0] == 0, done
    assert len(hub.requests) == before
    nobody = Hub()
    nobody.endpoint = "http://127.0.0.1:9"  # the discard port: refused at once
    for done in ran(nobody, tmp_path, *lines):
        assert done[0] == 0, done


REFUSED = {
    "hf://owner/missing/model.pth": r"hf://owner/missing/model.pth is not at http.*: there is no repository 'owner/mi",
    "hf://owner/missing": r"there is no repository 'owner/missing', or it is private",
    "hf://owner/many/none.pth": r"is not there: the repository holds 2 files of weights \(small/tiny-0.1.pth, oth",
    "hf://owner/many@v9/other.pth": r"the repository has no branch, tag or commit 'v9'",
    "hf://owner/many": r"holds 2 files of weights \(small/tiny-0.1.pth, other.pth\); name one: hf://owner/many/FILE",
    "hf://owner/text": r"hf://owner/text holds no weights",
    "hf://owner/locked/model.pth": r"asks who wants it: accept its terms at http.*/owner/locked, then run 'hf auth",
    "hf://owner/many/README.md": r"README.md should end in .pth",
    "hf://owner": r"a checkpoint on the hub is hf://OWNER/NAME\[@REVISION\]\[/FILE\], not 'hf://owner'",
    "hf://owner/a--b/x.pth": r"hf://owner/a--b/x.pth is no name on the hub",
}


def test_what_is_refused(hub: Hub, tmp_path: Path) -> None:
    done = ran(hub, tmp_path, *(f"info {name} --no-probe" for name in REFUSED))
    for (name, pattern), (code, out, err) in zip(REFUSED.items(), done, strict=True):
        assert out == "", name
        assert re.search(pattern, sentence(code, err)), err


def test_a_connection_that_is_missing(tmp_path: Path) -> None:
    nobody = Hub()
    nobody.endpoint = "http://127.0.0.1:9"
    names = ("hf://owner/many/other.pth", "hf://owner/folder")
    for code, _, err in ran(nobody, tmp_path, *(f"info {name} --no-probe" for name in names)):
        assert "is not in the cache, and http://127.0.0.1:9 cannot be reached (" in sentence(code, err)
    for code, _, err in ran(nobody, tmp_path, *(f"info {name} --no-probe" for name in names), offline=True):
        assert "and HF_HUB_OFFLINE forbids to fetch it" in sentence(code, err)


def test_a_download_that_is_cut_is_not_taken_for_the_file(hub: Hub, tmp_path: Path) -> None:
    hub.cut.add("model.pth")
    try:
        ((code, _, err),) = ran(hub, tmp_path, "info hf://owner/cut/model.pth --no-probe")
    finally:
        hub.cut.clear()
    assert "hf://owner/cut/model.pth could not be fetched: " in sentence(code, err)
    ((code, _, err),) = ran(hub, tmp_path, "info hf://owner/cut/model.pth --no-probe")
    assert code == 0, err


def test_names() -> None:
    assert hub_path("hf:/o/n/a/b.pth") == hub_path("hf://o/n/a/b.pth") == HubPath("o/n", "main", "a/b.pth")
    assert hub_path("hf://o/n@refs%2Fpr%2F1") == HubPath("o/n", "refs/pr/1", None)
    assert str(hub_path("hf://o/n@v1/b.pth")) == "hf://o/n@v1/b.pth"
    assert is_hub_path(Path("hf://o/n"))
    assert not is_hub_path("hf/o/n")
    assert checkpoint_name(Path("hf://o/n-0.1B")) == "n-0.1B"
    assert checkpoint_name(Path("hf://o/n/x/rwkv7-0.1.pth")) == "rwkv7-0.1"
    assert local_checkpoint("model.pth") == Path("model.pth")
    with pytest.raises(InputError):
        hub_path("hf://")


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"fetching hf://o/n/x.pth needs .*'rwkv-edge\[hub\]'"):
        local_checkpoint("hf://o/n/x.pth")
