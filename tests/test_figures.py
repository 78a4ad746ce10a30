"""Tables of README and docs are those of benchmarks/results: written by a script, never by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


figures = module("figures")


@pytest.mark.parametrize("path", figures.pages(figures.results()), ids=lambda path: path.name)
def test_tables_are_those_of_the_results(path: Path) -> None:
    expected = figures.pages(figures.results())[path]
    assert path.read_text(encoding="utf-8") == expected, "run: python benchmarks/all.py --tables-only"


def test_a_result_changes_the_tables() -> None:
    found = json.loads(json.dumps(figures.results()))
    found["step_cpu"]["figures"]["tokens_per_second"] = 123.4
    assert "123.4 tokens/s" in figures.readme_table(found)
    assert "| tokens per second | 123.4 |" in figures.figures_page(found)


def test_absent_results_are_left_out() -> None:
    found = {name: data for name, data in figures.results().items() if name == "batch_cpu"}
    assert figures.readme_table(found).count("\n") == 2
    assert "step_cpu" not in figures.figures_page(found)
    assert "Not measured" in figures.quantization_table(found)


def test_of_a_gpu_only_engines_whose_parity_is_green_are_shown() -> None:
    engine, other = {"parity": "green", "step_s": 0.001}, {"parity": "green", "step_s": 0.004}
    data = {"gpu": "G", "copy_gb_s": 3.0, "0.1B": {"limit_s": 0.0005, "fused kernels": engine, "ONNX Runtime": other}}
    (line,) = figures.step_gpu(data)
    assert line == (
        "decode, RWKV-7 0.1B fp16, `--backend cuda`, G",
        "1000 tokens/s, 50 % of the memory's limit, 4.0 x ONNX Runtime's CUDA graph (time on the GPU alone)",
    )
    data["0.1B"]["fused kernels"] = engine | {"parity": "wrong by 3"}
    assert not list(figures.step_gpu(data))


def test_schemes_of_quantization_have_a_table() -> None:
    row = {"tokens_per_second": 50.0, "ratio": 2.0, "weight_bytes": 10**8, "relative_error": 0.0123}
    found = {"quant_cpu": {"title": "T", "date": "D", "figures": {"fp32": row, "W8": row}}}
    assert "| W8 | 50.0 | 2.00 x | 100 MB | 0.012 |" in figures.quantization_table(found)
    assert "| decode, W8 | 50.0 tokens/s, 2.00 x fp32 |" in figures.readme_table(found)


def test_quality_of_schemes_has_a_table() -> None:
    row = {"perplexity": 3.5, "percent": 0.125, "weight_bytes": 10**7}
    found = {"quant_quality": {"title": "T", "date": "D", "figures": {"m": {"fp32": row, "W8": row}}}}
    assert "| m | W8 | 3.500 | +0.12 % | 10.00 MB |" in figures.quality_table(found)
    assert "| perplexity of m on held-out text, W8 | +0.12 % |" in figures.readme_table(found)
    assert "Not measured" in figures.quality_table({})


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(SystemExit, match="no markers <!-- figures -->"):
        figures.between("# README", "figures", "table")


def test_tables_need_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "onnx", "onnxruntime", "numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    module("figures")
