"""``rwkv-edge info``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rwkv_edge.cli.common import PATH, json_option, print_json, printable, quiet_option, size


@click.command("info")
@click.argument("path", type=PATH)
@json_option
@click.option("--no-probe", is_flag=True, help="Do not measure this machine's memory bandwidth (half a second).")
@quiet_option
def command(path: Path, as_json: bool, no_probe: bool) -> None:
    """Tell what PATH is: a checkpoint (file or Hugging Face folder), an adapter, a tuned state, or an artifact.

    Only headers are read, no weights.

    The tokens per second are upper bounds at batch 1: memory bandwidth over the bytes that one step must move.

    Example: rwkv-edge info RWKV-x070-World-0.1B.pth
    """
    from rwkv_edge.evaluation.describe import describe
    from rwkv_edge.evaluation.roofline import read_bandwidth

    facts = describe(path)
    if "tokens_per_second_bound" in facts and not no_probe:
        facts = describe(path, read_bandwidth())
    if as_json:
        print_json(facts)
    else:
        click.echo("\n".join(map(printable, _lines(facts))))


def _lines(facts: dict[str, Any]) -> list[str]:
    if facts["kind"] == "adapter":
        return _adapter_lines(facts)
    return _tuned_state_lines(facts) if facts["kind"] == "tuned state" else _model_lines(facts)


def _adapter_lines(facts: dict[str, Any]) -> list[str]:
    alpha = ", alpha to be given with --lora-alpha" if facts["needs_alpha"] else ""
    lines = [
        f"{facts['path']}: adapter, {facts['method']}",
        f"  rank         {', '.join(map(str, facts['ranks']))}{alpha}",
        f"  layers       {_spans(facts['layers'])}",
        f"  targets      {', '.join(facts['targets'])}",
        f"  parameters   {facts['parameters'] / 1e6:.2f} M",
    ]
    if facts["whole_tensors"]:
        lines.append(f"  replaces     {facts['whole_tensors']} tensors of the base")
    return lines + _file_lines(facts)


def _tuned_state_lines(facts: dict[str, Any]) -> list[str]:
    shifts = ", with token shifts" if facts["token_shifts"] else ""
    return [
        f"{facts['path']}: tuned state{shifts}",
        f"  layers       {_spans(facts['layers'])}",
        f"  shape        {facts['shape']}",
        *_file_lines(facts),
    ]


def _spans(layers: list[int]) -> str:
    """'24: 0 to 23', or all of them where some are left out."""
    if layers and layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1:
        return f"{len(layers)}: {layers[0]} to {layers[-1]}"
    return f"{len(layers)}: {', '.join(map(str, layers))}"


def _model_lines(facts: dict[str, Any]) -> list[str]:
    width = facts["width"]
    ranks = ", ".join(f"{name.removeprefix('rank_')} {n}" for name, n in facts.items() if name.startswith("rank_"))
    lines = [
        f"{facts['path']}: {facts['kind']}, RWKV-{facts['version']}",
        f"  dimensions   {facts['layers']} layers x {width}, {facts['heads']} heads x {facts['head_size']}, "
        f"ffn {facts['ffn_width']}, vocabulary {facts['vocabulary']}" + (f", LoRA ranks {ranks}" if ranks else ""),
        f"  parameters   {facts['parameters'] / 1e6:.1f} M" if facts["parameters"] else "  parameters   unknown",
        f"  state        {size(facts['state_bytes'])} per stream, whatever the length",
    ]
    lines += [f"  weights      {size(n)} in {precision}" for precision, n in facts["weight_bytes"].items()]
    lines += _file_lines(facts) if facts["kind"] == "checkpoint" else _artifact_lines(facts)
    lines.append("  at most      tokens/s at batch 1, by memory bandwidth:")
    for precision, bounds in facts["tokens_per_second_bound"].items():
        lines.append(f"    {precision}       " + ", ".join(f"{place} {value:,.0f}" for place, value in bounds.items()))
    return lines


def _file_lines(facts: dict[str, Any]) -> list[str]:
    state = ", with a tuned state" if facts.get("tuned_state_layers") else ""
    return [f"  file         {facts['layout']}, {facts['tensors']} tensors, {', '.join(facts['dtypes'])}{state}"]


def _quantization_lines(facts: dict[str, Any]) -> list[str]:
    formats = list(facts["formats"].values())
    counts = ", ".join(f"{formats.count(form)} {form}" for form in sorted(set(formats)))
    texts = ", ".join(str(text.get("name")) for text in facts.get("texts", []))
    form = "for ONNX Runtime on a CPU" if facts.get("target") == "cpu" else "standard Q/DQ"
    return [
        f"  quantized    {facts['scheme']}, {form}: linears {counts}; embedding {facts.get('embedding')}",
        f"  calibration  {f'on {texts}' if texts else 'none'}",
    ]


def _artifact_lines(facts: dict[str, Any]) -> list[str]:
    lines = [f"  precision    {facts['precision']}, batch {facts['batch']}, tokenizer {facts['tokenizer'] or 'none'}"]
    if facts["quantization"]:
        lines += _quantization_lines(facts["quantization"])
    for graph in facts["graphs"]:
        lines.append(
            f"  graph        {graph['file']}: {graph['nodes']} nodes, wkv {graph['wkv']}, "
            f"for {'all backends' if graph['target'] == 'any' else graph['target']}"
        )
    for engine in facts["engines"]:
        lines.append(
            f"  engine       {engine['file']}: {engine['backend']} {engine['version']} for "
            f"{', '.join(engine['targets'])}, wkv {engine['wkv']}, {size(engine['bytes'])}"
        )
    lines.append(f"  source       {facts['source'].get('file')} ({facts['source'].get('layout')})")
    return lines + [f"  warning      {warning}" for warning in facts["warnings"]]
