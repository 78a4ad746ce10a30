"""The page of `rwkv-edge report`: right figures, nothing from outside, one sentence for what is damaged."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from tiny import refusal, write_artifact

from rwkv_edge.cli import run
from rwkv_edge.evaluation.report_data import collect

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want. " * 3
)
SHORT = ("--tokens", "3", "--prompt", "4", "--runs", "1", "--threads", "1")


class Page(HTMLParser):
    """Tags that are left open, addresses, and texts of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag != "meta":
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has after measuring a float artifact and a quantized one."""
    pytest.importorskip("onnx_graphsurgeon", reason="onnx-graphsurgeon is not installed")
    work = tmp_path_factory.mktemp("report")
    folder = work / "measured"
    folder.mkdir()
    one = write_artifact(work / "fp32")
    shutil.copytree(one, folder / "fp32")
    words = np.random.default_rng(0).integers(ord("a"), ord("z"), 6000, dtype=np.uint8)
    (work / "words").write_bytes(words.tobytes())
    (work / "text").write_text(TEXT)
    made = str(folder / "w8a8 <b>")
    calibration = str(folder / "calibration.json")
    for command in (
        ["calibrate", str(one), "--text", str(work / "words"), "-o", calibration, "--length", "64"],
        ["quantize", str(one), "--calibration", calibration, "--scheme", "w8a8", "-o", made],
        ["bench", made, *SHORT, "--compare", str(one), "--json", str(folder / "bench.json")],
    ):
        assert run(command) == 0
    (folder / "eval.json").write_text(
        output("eval", made, "--text", str(work / "text"), "--compare", str(one), "--json")
    )
    groups = [
        {
            "group": f"blocks.{i}.{part}",
            "form": form,
            "linears": 4,
            "nbytes": 9,
            "float_nbytes": 36,
            "nats": x,
            "error": abs(x) / 4,
        }
        for i in range(2)
        for part in ("att", "ffn")
        for form, x in (("w4", 0.01), ("w8", -0.001))
    ]
    facts = {"model_hash": "0" * 64, "block": 32, "tokens": 200, "float_nats": 5.5, "groups": groups}
    (folder / "sensitivity.json").write_text(json.dumps(facts))
    (folder / "notes.json").write_text('{"anything": 1}')
    return folder


def output(*arguments: str) -> str:
    """Standard output of a command."""
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()) as printed:
        assert run(list(arguments)) == 0
    return printed.getvalue()


def page_of(folder: Path, capsys: pytest.CaptureFixture[str], target: Path) -> str:
    capsys.readouterr()
    assert run(["report", str(folder), "-o", str(target)]) == 0
    return target.read_text(encoding="utf-8")


def test_the_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page_of(folder, capsys, tmp_path / "page.html")
    printed = capsys.readouterr()
    assert "2 artifacts, made of 6 files" in printed.out
    assert printed.err == "Warning: notes.json is left out, since it is nothing that rwkv-edge wrote\n"
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert "b" not in page.tags  # the artifact's name is text
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert not re.search(r"@import|url\((?!#)", text)
    evaluation = json.loads((folder / "eval.json").read_text())
    assert f"{evaluation['score']['perplexity']:.4f}" in page.cells
    change, error = (evaluation["comparison"][f"perplexity_change{end}"] for end in ("", "_error"))
    assert f"{change:+.3f} ± {error:.2g} %" in page.cells
    bench = json.loads((folder / "bench.json").read_text())
    for contender in bench["contenders"]:
        assert f"{contender['decode_tokens_per_second']:,.0f}" in page.cells
    assert any("blocks.0.att.output" in cell for cell in page.cells)


def test_the_pictures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page_of(folder, capsys, tmp_path / "page.html")
    pictures = re.findall(r"(?s)<svg.*?</svg>", text)
    assert len(pictures) == 4
    ids: list[str] = []
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        ids += [value for e in root.iter() if (value := e.get("id"))]
        assert "currentColor" in picture
        assert "#010203" not in picture
        assert "#000000" not in picture  # which the dark would swallow
    assert len(ids) == len(set(ids))
    sizes, speed, sensitivity, ranges = pictures
    assert all(name in sizes and name in speed for name in ("fp32", "w8a8 &lt;b&gt;"))
    assert "blocks.1.ffn" in sensitivity
    assert "blocks.1.ffn.value" in ranges


def test_a_browser(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is refused by the page's own policy, and nothing is complained about."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    page_of(folder, capsys, tmp_path / "page.html")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--dump-dom", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("<svg") == 4, done.stderr
    assert "CONSOLE" not in done.stderr
    # the same, with something that the policy forbids: the check can fail
    spoiled = (tmp_path / "page.html").read_text().replace("</body>", '<img src="http://127.0.0.1:9/x.png"></body>')
    (tmp_path / "page.html").write_text(spoiled)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" in done.stderr


def test_parts_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the artifacts, without the statistics beside the calibration, and of an evaluation alone."""
    for names, rows, pictures in (
        (["eval.json"], 1, 1),
        (["bench.json"], 2, 1),
        (["calibration.json"], 0, 0),
        (["sensitivity.json", "eval.json", "bench.json"], 2, 3),
    ):
        part = tmp_path / "+".join(names)
        part.mkdir()
        for name in names:
            shutil.copy(folder / name, part)
        text = page_of(part, capsys, tmp_path / "page.html")
        assert Page(text).open == []
        assert text.count("<svg") == pictures
        assert len(collect(part).rows) == rows


def test_refusals(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds nothing to report" in refusal(capsys, "report", empty)
    assert "is not a folder" in refusal(capsys, "report", tmp_path / "none")
    assert "there is no folder" in refusal(capsys, "report", folder, "-o", tmp_path / "no" / "page.html")
    evaluation: dict[str, Any] = json.loads((folder / "eval.json").read_text())
    bench: dict[str, Any] = json.loads((folder / "bench.json").read_text())
    sensitivity: dict[str, Any] = json.loads((folder / "sensitivity.json").read_text())
    bench["contenders"][0]["parity"]["passed"] = False
    for content, sentence in (
        ("{", "bad.json is damaged"),
        (json.dumps({"kind": "evaluation"}), "bad.json is not as rwkv-edge wrote it"),
        (json.dumps({**evaluation, "artifact": [1]}), "is not as rwkv-edge wrote it"),
        (json.dumps({**evaluation, "artifact": {**evaluation["artifact"], "weight_bytes": "x"}}), "is not as"),
        (json.dumps(bench), "a speed without parity"),
        (json.dumps({**sensitivity, "groups": [{**sensitivity["groups"][0], "error": -1}]}), "is not as"),
        (json.dumps({**sensitivity, "groups": [{**sensitivity["groups"][0], "nats": np.nan}]}), "is not as"),
    ):
        (empty / "bad.json").write_text(content)
        assert sentence in refusal(capsys, "report", empty)
    assert [path.name for path in empty.iterdir()] == ["bad.json"]
    strange = {**evaluation, "score": {**evaluation["score"], "perplexity": "<script>"}}
    strange["comparison"] = {"perplexity_change": 1, "perplexity_change_error": -1, "kl_mean": [], "top1": np.inf}
    (empty / "bad.json").write_text(json.dumps(strange))
    assert "<script>" not in page_of(empty, capsys, tmp_path / "page.html")
