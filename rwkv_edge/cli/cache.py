"""``rwkv-edge cache``."""

from __future__ import annotations

from pathlib import Path

import click

from rwkv_edge.cli.common import PATH, counted, json_option, note, print_json, quiet_option, size


@click.group("cache")
def command() -> None:
    """Look into the folder of `generate --cache`, or empty it.

    Example: rwkv-edge cache info prompts
    """


@command.command("info")
@click.argument("folder", metavar="DIR", type=PATH)
@json_option
@quiet_option
def info(folder: Path, as_json: bool) -> None:
    """Tell how many states DIR holds and how much they take.

    Example: rwkv-edge cache info prompts
    """
    from rwkv_edge.runtime.cache import cache_entries

    entries = cache_entries(folder)
    nbytes = sum(entry.nbytes for entry in entries)
    if as_json:
        print_json({"path": str(folder), "entries": len(entries), "bytes": nbytes})
    else:
        click.echo(f"{folder}: {counted(len(entries), 'state')}, {size(nbytes)}")


@command.command("clear")
@click.argument("folder", metavar="DIR", type=PATH)
@json_option
@quiet_option
def clear(folder: Path, as_json: bool) -> None:
    """Remove all states in DIR, and nothing else that may be there.

    Example: rwkv-edge cache clear prompts
    """
    from rwkv_edge.runtime.cache import clear_cache

    nbytes = clear_cache(folder)
    if as_json:
        print_json({"path": str(folder), "bytes": nbytes})
    else:
        note(f"{folder}: {size(nbytes)} removed", err=False)
