"""``rwkv-edge state``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rwkv_edge.cli.common import PATH, json_option, print_json, printable, quiet_option, size

if TYPE_CHECKING:
    from rwkv_edge.runtime.state_facts import TensorDifference

MOST_LINES = 20


@click.group("state")
def command() -> None:
    """Look into snapshots, as `generate --state-out` and `soak --state` write them.

    Example: rwkv-edge state info story.state
    """


@command.command("info")
@click.argument("file", type=PATH)
@json_option
@quiet_option
def info(file: Path, as_json: bool) -> None:
    """Tell what the snapshot FILE holds.

    That is whose state it is, of how many streams, and after which tokens.

    Example: rwkv-edge state info story.state
    """
    from rwkv_edge.runtime.state_facts import snapshot_facts

    facts = snapshot_facts(file)
    if as_json:
        print_json(facts)
    else:
        click.echo("\n".join(map(printable, _lines(facts))))


@command.command("diff")
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@json_option
@quiet_option
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Compare snapshots A and B tensor by tensor.

    The largest difference, relative to the tensor's largest value in A, comes first.

    Example: rwkv-edge state diff before.state after.state
    """
    from rwkv_edge.runtime.state_facts import snapshot_differences

    found = snapshot_differences(a, b)
    if as_json:
        print_json(found.to_json())
        return
    if not found.same_model:
        click.echo("the snapshots are of different models", err=True)
    click.echo(f"{len(found.differing)} of {len(found.tensors)} tensors differ")
    for tensor in found.differing[:MOST_LINES]:
        click.echo(printable(_difference(tensor)))
    if len(found.differing) > MOST_LINES:
        click.echo(f"  and {len(found.differing) - MOST_LINES} more, see --json")


def _difference(tensor: TensorDifference) -> str:
    return (
        f"  {tensor.name:<14} max |difference| {tensor.max_abs:.3g}, relative {tensor.relative:.3g}, "
        f"{tensor.differing} of {tensor.elements} elements"
    )


def _lines(facts: dict[str, Any]) -> list[str]:
    streams = "1 stream" if len(facts["streams"]) == 1 else f"{len(facts['streams'])} streams"
    tuned = f", tuned initial state sha256 {facts['initial_hash'][:12]}…" if facts["initial_hash"] else ""
    lines = [
        f"{facts['path']}: state of RWKV-{facts['version']} in {facts['precision']}, {streams}",
        f"  model        sha256 {facts['model_hash'][:12]}…{tuned}",
        f"  tensors      {facts['tensors']}, {size(facts['bytes'])}, largest |value| {facts['largest']:.4g} "
        f"({facts['largest_name']})",
    ]
    for number, stream in enumerate(facts["streams"]):
        pending = f", pending {list(stream['pending'])}" if stream["pending"] else ""
        lines.append(f"  stream {number:<6}{stream['tokens']} tokens, last {list(stream['last'][-8:])}{pending}")
    if facts["extra"]:
        lines.append(f"  beside it    {', '.join(facts['extra'])}")
    return lines
