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


def test_of_a_gpu_forms_have_limits_of_their_own_and_albatross_a_line() -> None:
    speeds = {"batch_tokens_per_second": 30000.0, "prefill_tokens_per_second": 20000.0}
    fused = {"parity": "green", "step_s": 0.001, "limit_s": 0.0008, **speeds}
    albatross = {"parity": "green", "bare_s": 0.0015, **{name: speed / 2 for name, speed in speeds.items()}}
    size = {
        "limit_s": 0.0008, "fused kernels": fused, "Albatross v3a": albatross,
        "fused kernels W8": fused | {"step_s": 0.0005, "limit_s": 0.0004},
    }  # fmt: skip
    float_line, w8_line, other = figures.step_gpu({"gpu": "G", "copy_gb_s": 3.0, "1.5B": size})
    assert float_line[1] == "1000 tokens/s, 80 % of the memory's limit, 1.5 x Albatross v3a"
    assert w8_line == (
        "decode, RWKV-7 1.5B W8, `--backend cuda`, G",
        "2000 tokens/s, 80 % of the memory's limit, 3.0 x Albatross v3a",
    )
    assert other == (
        "64 streams, and a prompt of 512 tokens, 1.5B fp16",
        "30,000 tokens/s (2.00 x Albatross v3a); 20,000 tokens/s (2.00 x Albatross v3a)",
    )
    size["Albatross v3a"] = albatross | {"parity": "wrong by 3"}
    assert [line[1] for line in figures.step_gpu({"gpu": "G", "1.5B": size})] == [
        "1000 tokens/s, 80 % of the memory's limit", "2000 tokens/s, 80 % of the memory's limit"
    ]  # fmt: skip


def test_kernels_of_a_gpu_have_a_line_and_a_table() -> None:
    kinds = {"step_us": 9.0, "wkv": {"bytes": 10, "alone_share_of_copy": 0.5}, "argmax": {"bytes": 0}}
    data = {"gpu": "G", "0.1B fp16": kinds, "1.5B fp16": kinds, "1.5B W8": kinds}
    assert list(figures.kernels_gpu(data)) == [
        (
            "bandwidth of the fused kernels over that of copies, 1.5B fp16, G; rows of ffn.value behind zeros count, "
            "but are not read",
            "wkv 50 %",
        )
    ]
    machine = {"cpu": "C", "cores": 1, "python": "3"}
    found = {"kernels_gpu": {"title": "T", "date": "D", "machine": machine, "torch": "2", "figures": data}}
    assert "| 1.5B W8, wkv |  | 10 | 50 % |" in figures.figures_page(found)


def test_parity_on_a_gpu_is_shown_where_all_of_it_is_green() -> None:
    compared = {"relative_difference": 0.0004, "top1": 0.996, "parity": "green"}
    forms = {
        "fp32": compared | {"relative_difference": 1e-6}, "fp16": compared,
        "fp32 W8": compared, "fp16 W8": compared | {"relative_difference": 0.002}, "fp16 W4, blocks of 32": compared,
    }  # fmt: skip
    (line,) = figures.parity_gpu({"gpu": "G", "tokens": 256, "greedy_tokens": 1000, "demo": forms})
    assert line == (
        "demo on G against the CPU, 256 tokens: largest difference of logits, relative",
        "fp32 1e-06, fp16 0.0004, W8 0.002, W4 0.0004; the same largest logit for at least 99.6 %; the same greedy "
        "text of 1,000 tokens",
    )
    forms["fp16"] = compared | {"parity": "wrong by 3"}
    assert not list(figures.parity_gpu({"gpu": "G", "tokens": 256, "greedy_tokens": 1000, "demo": forms}))


def test_sampling_on_a_gpu_is_shown_where_all_tokens_are_right() -> None:
    kernels = {
        "greedy": {"differ": 0, "sharp_us": 3.31, "flat_us": 3.29},
        "top-p": {"differ": 0, "sharp_us": 9.0, "flat_us": 12.0},
    }
    assert list(figures.sampling_gpu({"gpu": "G", "kernels": kernels})) == [
        ("drawing a token of 65,536, as the host's sampler does, G", "greedy 3.3 µs; top-p 9.0 to 12.0 µs")
    ]
    kernels["top-p"]["differ"] = 1
    assert not list(figures.sampling_gpu({"gpu": "G", "kernels": kernels}))


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
