"""``rwkv-edge doctor``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from rwkv_edge.cli.common import json_option, print_json, printable, quiet_option, size

if TYPE_CHECKING:
    from rwkv_edge.evaluation.doctor import Ability, Diagnosis


@click.command("doctor")
@json_option
@quiet_option
def command(as_json: bool) -> None:
    """Tell what can be built and run here, what is missing, and the line that installs it.

    The exit code is 0 whatever is missing.

    Example: rwkv-edge doctor
    """
    from rwkv_edge.evaluation.doctor import diagnose

    found = diagnose()
    if as_json:
        print_json(found.to_json())
    else:
        click.echo("\n".join(map(printable, _lines(found))))


def _lines(found: Diagnosis) -> list[str]:
    system = found.system
    lines = [
        f"rwkv-edge {system['rwkv_edge']}, Python {system['python']}, {system['system']}, {system['cores']} cores",
        *_machine_lines(found),
        "packages",
    ]
    for package in found.packages.values():
        detail = {"missing": "not installed", "broken": f"broken: {package.problem}"}.get(package.state, "")
        if package.name == "onnxruntime" and found.providers:
            detail = ", ".join(found.providers)
        lines.append(f"  {package.name:<18} {package.version or '':<10} {detail}".rstrip())
    lines += ["runs models", *_ability_lines(found.runs)]
    lines += ["builds engines", *_ability_lines(found.builds)]
    if found.lacking:
        lines.append("missing")
    width = max((len(entry["install"]) for entry in found.lacking), default=0)
    for entry in found.lacking:
        lines.append(f"  {entry['install']:<{width}}   # {entry['purpose']}: {', '.join(entry['missing'])}")
    return lines + [f"warning: {sentence}" for sentence in found.warnings]


def _machine_lines(found: Diagnosis) -> list[str]:
    lines = []
    if found.board is not None:
        jetpack = (
            f"JetPack {found.board.jetpack}" if found.board.jetpack else "the package nvidia-jetpack not installed"
        )
        lines.append(
            f"  board   {found.board.model or 'Jetson'}, Jetson Linux {found.board.l4t or 'unknown'}, {jetpack}"
        )
    for gpu in found.gpus.found:
        facts = gpu.to_json()
        capability = facts["compute_capability"]
        words = f"compute capability {capability} ({facts['target']})" if capability else "compute capability unknown"
        lines.append(f"  GPU     {gpu.name}, {words}" + (f", {size(gpu.memory)}" if gpu.memory else ""))
    if not found.gpus.found:
        lines.append(f"  GPU     none: {found.gpus.problem}")
    if found.gpus.cuda:
        lines.append(f"  driver  runs CUDA up to {found.gpus.cuda[0]}.{found.gpus.cuda[1]}")
    return lines


def _ability_lines(abilities: Iterable[Ability]) -> list[str]:
    return [f"  {'yes' if a.works else 'no ':<3} {a.name:<18} {a.detail}" for a in abilities]
