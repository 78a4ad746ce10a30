"""``rwkv-edge info``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rwkv_edge.cli.common import PATH, json_option, print_json, size


@click.command("info")
@click.argument("path", type=PATH)
@json_option
@click.option("--no-probe", is_flag=True, help="Do not measure this machine's memory bandwidth (half a second).")
def command(path: Path, as_json: bool, no_probe: bool) -> None:
    """Tell what PATH, a checkpoint or an artifact, is; reads no weights.

    The tokens per second are upper bounds at batch 1: memory bandwidth over the bytes that one step must move.

    Example: rwkv-edge info RWKV-x070-World-0.1B.pth
    """
    from rwkv_edge.evaluation.describe import describe
    from rwkv_edge.evaluation.roofline import read_bandwidth

    facts = describe(path)
    if not no_probe:
        facts = describe(path, read_bandwidth())
    if as_json:
        print_json(facts)
    else:
        click.echo("\n".join(_lines(facts)))


def _lines(facts: dict[str, Any]) -> list[str]:
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
    lines += _checkpoint_lines(facts) if facts["kind"] == "checkpoint" else _artifact_lines(facts)
    lines.append("  at most      tokens/s at batch 1, by memory bandwidth:")
    for precision, bounds in facts["tokens_per_second_bound"].items():
        lines.append(f"    {precision}       " + ", ".join(f"{place} {value:,.0f}" for place, value in bounds.items()))
    return lines


def _checkpoint_lines(facts: dict[str, Any]) -> list[str]:
    return [f"  file         {facts['layout']}, {facts['tensors']} tensors, {', '.join(facts['dtypes'])}"]


def _artifact_lines(facts: dict[str, Any]) -> list[str]:
    lines = [f"  precision    {facts['precision']}, batch {facts['batch']}, tokenizer {facts['tokenizer'] or 'none'}"]
    for graph in facts["graphs"]:
        lines.append(
            f"  graph        {graph['file']}: {graph['nodes']} nodes, wkv {graph['wkv']}, for {graph['target']}"
        )
    lines.append(f"  source       {facts['source'].get('file')} ({facts['source'].get('layout')})")
    return lines + [f"  warning      {warning}" for warning in facts["warnings"]]
