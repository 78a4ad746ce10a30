"""Tables from benchmarks/results/*.json: all of them in docs/figures.md, the main ones in README between two markers.

Nothing is measured here, and neither torch nor a backend is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FUSED, ALBATROSS, ORT = "fused kernels", "Albatross v3a", "ONNX Runtime"  # engines in step_gpu.json

Figures = Mapping[str, Any]
Line = tuple[str, str]
"""What was measured, and the figure in words."""


def step_cpu(f: Figures) -> Iterator[Line]:
    """Decode on the CPU."""
    yield (
        "decode, RWKV-7 12 x 768 fp32, weights mapped (the default)",
        f"{f['tokens_per_second']:.1f} tokens/s, {f['ratio']:.2f} x the `rwkv` package, "
        f"{percent(f['share_of_bandwidth'])} of the read bandwidth",
    )
    yield (
        "with `open_session(..., prepack=True)`: a copy of the weights in ONNX Runtime's own order",
        f"{f['packed_tokens_per_second']:.1f} tokens/s, {f['packed_ratio']:.2f} x, "
        f"{percent(f['packed_share_of_bandwidth'])}",
    )


def prefill_cpu(f: Figures) -> Iterator[Line]:
    """Prompts on the CPU."""
    yield (
        "a prompt of 512 tokens in chunks, same model",
        f"{f['tokens_per_second']['chunks']:.0f} tokens/s, {f['over_rwkv']:.1f} x `rwkv`'s sequence mode, "
        f"{f['over_steps']:.0f} x single steps; {f['resident_ratio']:.2f} x the memory of the step graph alone",
    )


def batch_cpu(f: Figures) -> Iterator[Line]:
    """Streams on the CPU."""
    streams = max(f["over_one_stream"], key=int)
    yield f"{streams} streams in one batch, over one stream", f"{f['over_one_stream'][streams]:.1f} x"


def quant_cpu(f: Figures) -> Iterator[Line]:
    """Schemes on the CPU."""
    for name, found in f.items():
        if name != "fp32":
            yield f"decode, {name}", f"{found['tokens_per_second']:.1f} tokens/s, {found['ratio']:.2f} x fp32"


def quant_quality(f: Figures) -> Iterator[Line]:
    """What the main schemes cost the first model."""
    model = next(iter(f))
    for name in ("W8A8", "W8", "W4, block 32, GPTQ"):
        if name in f[model]:
            yield f"perplexity of {model} on held-out text, {name}", f"{f[model][name]['percent']:+.2f} %"


def export(f: Figures) -> Iterator[Line]:
    """The largest export."""
    found = f["7, 24 x 1024, step graph"]
    yield (
        f"export of 24 x 1024 fp32 ({found['checkpoint_mb']:.0f} MiB), step graph",
        f"{found['seconds']:.1f} s, peak RSS {found['peak_mb']:.0f} MiB",
    )


def demo_model(f: Figures) -> Iterator[Line]:
    """Quality of the demo model."""
    values = " / ".join(f"{f[precision]['bits_per_byte']:.4f}" for precision in ("fp32", "fp16", "bf16"))
    yield "demo model, held-out bits per byte in fp32 / fp16 / bf16", values


def soak_demo(f: Figures) -> Iterator[Line]:
    """The long run."""
    yield (
        f"the demo model over {f['tokens']:,} tokens, {f['precision']}",
        f"at most {f['drift']:.2g} from float64, memory {f['rss_growth_mb']:+.1f} MB",
    )


def step_gpu(f: Figures) -> Iterator[Line]:
    """Decode and prefill on a GPU, of engines whose parity was green."""
    for size, found in f.items():
        for name, engine in _green(found) if isinstance(found, dict) else ():
            if not name.startswith(FUSED):
                continue
            limit = engine.get("limit_s", found["limit_s"])
            words = [f"{1 / engine['step_s']:.0f} tokens/s, {percent(limit / engine['step_s'])} of the memory's limit"]
            green = dict(_green(found))
            if ALBATROSS in green:
                words.append(f"{green[ALBATROSS]['bare_s'] / engine['step_s']:.1f} x {ALBATROSS}")
            if ORT in green:
                ratio = green[ORT]["step_s"] / engine["step_s"]
                words.append(f"{ratio:.1f} x ONNX Runtime's CUDA graph (time on the GPU alone)")
            form = name.removeprefix(FUSED).strip() or "fp16"
            yield f"decode, RWKV-7 {size} {form}, `--backend cuda`, {f['gpu']}", ", ".join(words)
        if isinstance(found, dict):
            yield from _against_albatross(size, dict(_green(found)))


def _green(found: Figures) -> Iterator[tuple[str, Figures]]:
    """The engines of a size whose parity was green."""
    for name, engine in found.items():
        if isinstance(engine, dict) and engine["parity"] == "green":
            yield name, engine


def _against_albatross(size: str, engines: Figures) -> Iterator[Line]:
    """Many streams and a prompt, where both ran."""
    if FUSED in engines and ALBATROSS in engines:
        parts = []
        for key in ("batch_tokens_per_second", "prefill_tokens_per_second"):
            ours, theirs = engines[FUSED][key], engines[ALBATROSS][key]
            parts.append(f"{ours:,.0f} tokens/s ({ours / theirs:.2f} x {ALBATROSS})")
        yield f"64 streams, and a prompt of 512 tokens, {size} fp16", "; ".join(parts)


def kernels_gpu(f: Figures) -> Iterator[Line]:
    """Which bandwidth the kernels reach in the largest model."""
    models = [name for name, kinds in f.items() if isinstance(kinds, dict) and name.endswith("fp16")]
    for model in models[-1:]:
        shares = {name: kind.get("alone_share_of_copy") for name, kind in f[model].items() if isinstance(kind, dict)}
        words = ", ".join(f"{name} {percent(share)}" for name, share in shares.items() if share is not None)
        what = f"bandwidth of the fused kernels over that of copies, {model}, {f['gpu']}"
        yield f"{what}; rows of ffn.value behind zeros count, but are not read", words


def parity_gpu(f: Figures) -> Iterator[Line]:
    """Logits and greedy text of trained models against the CPU, where every form was right."""
    for model, forms in f.items():
        if not isinstance(forms, dict) or any(found["parity"] != "green" for found in forms.values()):
            continue
        worst = {
            kind: max(found["relative_difference"] for form, found in forms.items() if kind in (form, form[5:7]))
            for kind in ("fp32", "fp16", "W8", "W4")
        }
        yield (
            f"{model} on {f['gpu']} against the CPU, {f['tokens']} tokens: largest difference of logits, relative",
            f"{', '.join(f'{kind} {value:.1g}' for kind, value in worst.items())}; the same largest logit for at least "
            f"{100 * min(found['top1'] for found in forms.values()):.1f} %; the same greedy text of "
            f"{f['greedy_tokens']:,} tokens",
        )


def sampling_gpu(f: Figures) -> Iterator[Line]:
    """What a draw costs, where all tokens were those of the host."""
    kernels = f["kernels"]
    if any(found["differ"] for found in kernels.values()):
        return
    words = []
    for name, found in kernels.items():
        low, high = sorted((found["sharp_us"], found["flat_us"]))
        words.append(f"{name} {low:.1f}" + (f" to {high:.1f}" if high > 1.1 * low else "") + " µs")
    yield f"drawing a token of 65,536, as the host's sampler does, {f['gpu']}", "; ".join(words)


def wide_gpu(f: Figures) -> Iterator[Line]:
    """Prompts and many streams on a GPU; a figure stands only where parity was green."""
    for model, found in f.items():
        if not isinstance(found, dict):
            continue
        parts = [f"a prompt of 512 tokens {found['prompt']['512']:,.0f} tokens/s"]
        parts += [f"{n} streams {found['streams'][n]:,.0f} tokens/s" for n in ("16", "64") if n in found["streams"]]
        yield f"RWKV-7 {model}, all rows at once through tensor cores, {f['gpu']}", "; ".join(parts)


def wkv_gpu(f: Figures) -> Iterator[Line]:
    """The kernels of the recurrences."""
    copied = percent(f["v7_step_b64"]["share_of_copy"])
    ratios = [f[f"v{version}_sequence"]["ratio"] for version in "4567"]
    yield (
        f"kernels of the recurrences, sequences of 512 tokens x 8, {f['gpu']}",
        f"{min(ratios):.1f} to {max(ratios):.1f} x the `rwkv` package's; {copied} of the "
        "copy bandwidth in RWKV-7 steps of 64 streams",
    )


LINES: Mapping[str, Callable[[Figures], Iterator[Line]]] = {
    "step_cpu": step_cpu,
    "prefill_cpu": prefill_cpu,
    "batch_cpu": batch_cpu,
    "quant_cpu": quant_cpu,
    "quant_quality": quant_quality,
    "soak_demo": soak_demo,
    "export": export,
    "demo_model": demo_model,
    "step_gpu": step_gpu,
    "step_gpu_w8": step_gpu,
    "kernels_gpu": kernels_gpu,
    "parity_gpu": parity_gpu,
    "sampling_gpu": sampling_gpu,
    "wide_gpu": wide_gpu,
    "wkv_gpu": wkv_gpu,
}
"""Result file → its lines in README; files that are absent are left out."""

COMMANDS: Mapping[str, str] = {
    "soak_demo": "rwkv-edge soak",
    "step_gpu_w8": "benchmarks/step_gpu.py --tune W8",
}
"""What wrote a result file, where it is not the script of its name."""


def results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The result files by stem: those of README first, in its order."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    order = [name for name in LINES if name in found]
    return {name: found[name] for name in order + [name for name in found if name not in LINES]}


def command(name: str) -> str:
    """What wrote a result file."""
    return COMMANDS.get(name, f"benchmarks/{name}.py")


def readme_table(found: Mapping[str, dict[str, Any]]) -> str:
    """The lines of `LINES` as one Markdown table."""
    rows = []
    for name, lines in LINES.items():
        if name not in found:
            continue
        by = f"`{command(name)}`"
        for what, figure in lines(found[name].get("figures", found[name])):
            rows.append((by, what, figure))
            by = "same"
    return table(("measured by", "what", "figure"), rows)


def quantization_table(found: Mapping[str, dict[str, Any]]) -> str:
    """Speed and size of every scheme on the CPU."""
    if "quant_cpu" not in found:
        return "Not measured yet: `benchmarks/quant_cpu.py` measures it."
    data = found["quant_cpu"]
    rows = [
        (
            name, f"{f['tokens_per_second']:.1f}", f"{f['ratio']:.2f} x", f"{f['weight_bytes'] / 1e6:.0f} MB",
            f"{f['relative_error']:.2g}",
        )
        for name, f in data["figures"].items()
    ]  # fmt: skip
    header = ("scheme", "tokens/s", "over fp32", "weights", "relative error of the logits")
    return f"{data['title']}; random weights, {data['date']}.\n\n{table(header, rows)}"


def quality_table(found: Mapping[str, dict[str, Any]]) -> str:
    """Perplexity and size of every model and scheme."""
    if "quant_quality" not in found:
        return "Not measured yet: `benchmarks/quant_quality.py` measures it."
    data = found["quant_quality"]
    rows = [
        (model, name, f"{f['perplexity']:.3f}", f"{f['percent']:+.2f} %", f"{f['weight_bytes'] / 1e6:.2f} MB")
        for model, schemes in data["figures"].items()
        for name, f in schemes.items()
    ]
    return f"{data['title']}; {data['date']}.\n\n" + table(("model", "scheme", "perplexity", "change", "weights"), rows)


def between(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between its markers <!-- name --> and <!-- /name -->."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(begin)
    _, marker, after = rest.partition(end)
    if not marker:
        raise SystemExit(f"there are no markers {begin} and {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def pages(found: Mapping[str, dict[str, Any]]) -> dict[Path, str]:
    """What the files that hold tables should be."""
    readme, guide = ROOT / "README.md", ROOT / "docs" / "quantization.md"
    tables = between(guide.read_text(encoding="utf-8"), "quant_quality", quality_table(found))
    return {
        ROOT / "docs" / "figures.md": figures_page(found),
        readme: between(readme.read_text(encoding="utf-8"), "figures", readme_table(found)),
        guide: between(tables, "quant_cpu", quantization_table(found)),
    }


def figures_page(found: Mapping[str, dict[str, Any]]) -> str:
    """docs/figures.md: one section a result file, with every figure in it."""
    parts = [
        "# Figures",
        "Written by `python benchmarks/all.py --tables-only` from `benchmarks/results/*.json`. Ratios are medians of "
        "measurements taken in turns; a speed stands only beside a parity that was green in the same run.",
    ]
    for name, data in found.items():
        parts.append(f"## {name}")
        parts.append(_soak_section(data) if "points" in data else _section(name, data))
    return "\n\n".join(parts) + "\n"


def _section(name: str, data: Mapping[str, Any]) -> str:
    machine = data["machine"]
    facts = f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, torch {data['torch']}"
    groups = dict(_groups(data["figures"]))
    parts = [f"{data['title']}. `{command(name)}`, {data['date']}; {facts}."]
    alone = groups.pop("", {})
    if alone:
        parts.append(table(("figure", "value"), [(_words(key), value_text(key, v)) for key, v in alone.items()]))
    if groups:
        keys = list(dict.fromkeys(key for group in groups.values() for key in group))
        rows = [
            (_words(path), *(value_text(f"{path}.{key}", group[key]) if key in group else "" for key in keys))
            for path, group in groups.items()
        ]
        parts.append(table(("", *map(_words, keys)), rows))
    return "\n\n".join(parts)


def _soak_section(data: Mapping[str, Any]) -> str:
    facts = {key: value for key, value in data.items() if not isinstance(value, list)}
    rows = [(_words(key), value_text(key, value)) for key, value in facts.items()]
    return f"`rwkv-edge soak`, {len(data['points'])} checkpoints.\n\n" + table(("figure", "value"), rows)


def _groups(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping's own values, with its path."""
    own = {key: value for key, value in node.items() if not isinstance(value, dict)}
    if own:
        yield path, own
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _groups(value, f"{path}, {key}" if path else key)


def _words(key: str) -> str:
    return key.replace("_", " ")


def value_text(path: str, value: Any) -> str:
    """A figure as text: shares in percent, ratios as factors, the rest with four digits."""
    if isinstance(value, float):
        key = path.rpartition(".")[2]
        if "share" in key:
            return percent(value)
        if key == "ratio" or key.endswith("_ratio") or "over_" in path:
            return f"{value:.2f} x"
        if key == "percent":
            return f"{value:+.2f} %"
        if key == "bits_per_byte":
            return f"{value:.4f}"
        return f"{value:.1f}" if 100 <= abs(value) < 1e7 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def percent(share: float) -> str:
    """0.755 → 76 %."""
    return f"{100 * share:.0f} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; '|' in a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_tables() -> None:
    """Write docs/figures.md, README's table and that of the quantization guide."""
    found = results()
    for path, text in pages(found).items():
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: written from {', '.join(found)}")
