"""Write docs/commands.md: the help of every command, as the command line prints it.

python tools/write_commands.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from rwkv_edge.cli import cli

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
WIDTH = 100  # as max_content_width of the command line

INTRODUCTION = """\
# Commands

Written by `python tools/write_commands.py` from the command line itself; a test keeps them equal.

## Manners

- **Exit codes:** 0 done; 1 the work failed, a file is missing or damaged, or a check did not pass; 2 an argument that
  cannot be meant; 130 Ctrl-C.
- **Results** go to standard output, progress, notes, warnings and errors to standard error. An error is one sentence.
- `--json` prints a report as JSON and nothing else on standard output, `--quiet` leaves out progress and notes.
- **Progress bars** are drawn on a terminal only. There are **no colours**, with `NO_COLOR` set or without.
- Files and folders appear when they are complete; after Ctrl-C, an error or a full disk there is nothing half-written.
- **Completion** of commands, options and their values, in bash, zsh and fish; the line goes into the shell's start-up
  file:

| shell | line | file |
| --- | --- | --- |
| bash 4.4 or later | `eval "$(_RWKV_EDGE_COMPLETE=bash_source rwkv-edge)"` | `~/.bashrc` |
| zsh | `eval "$(_RWKV_EDGE_COMPLETE=zsh_source rwkv-edge)"` | `~/.zshrc`, after `autoload -Uz compinit && compinit` |
| fish | `_RWKV_EDGE_COMPLETE=fish_source rwkv-edge \\| source` | `~/.config/fish/completions/rwkv-edge.fish` |
"""


def main() -> None:
    """Write the page."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.name)


def page() -> str:
    """The introduction, and a section a command."""
    return "\n".join(
        [INTRODUCTION, *(f"## {name}\n\n```text\n{text}\n```\n" for name, text in helps(cli, "rwkv-edge"))]
    )


def helps(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[tuple[str, str]]:
    """Names and help of a command and of those below it."""
    context = click.Context(
        command, info_name=name, parent=parent, terminal_width=WIDTH, help_option_names=["-h", "--help"]
    )
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            if found is not None:
                yield from helps(found, below, context)


if __name__ == "__main__":
    main()
