"""The command line: one file a command, loaded when it is called.

Exit codes: 0 done; 1 the work failed, a file is missing or damaged, or a check did not pass; 2 an argument that cannot
be meant; 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from typing import TextIO

import click

from rwkv_edge.cli.common import note, printable
from rwkv_edge.errors import RwkvEdgeError

MESSAGE_CHARACTERS = 1000

COMMANDS = {
    "export": "Write the artifact (ONNX graph, weights, tokenizer) of a checkpoint.",
    "calibrate": "Record the ranges of a model's activations over text.",
    "sensitivity": "Tell which parts of a model suffer most from fewer bits.",
    "quantize": "Write the INT8 or INT4 form of an artifact.",
    "build": "Build the TensorRT engines of an artifact.",
    "info": "Tell what a checkpoint or an artifact is, without loading weights.",
    "verify": "Compare an artifact with its checkpoint, token by token.",
    "eval": "Measure how well an artifact predicts a text, and how far it is from another.",
    "bench": "Measure the speed of an artifact, after a check that it runs right.",
    "tune": "Find the fastest choices of our CUDA kernels for an artifact and this GPU.",
    "report": "Write one HTML page about what eval, bench and the others found.",
    "generate": "Continue a text.",
    "chat": "Talk with a model in the terminal.",
    "state": "Look into snapshots of states.",
    "cache": "Look into a cache of prompts, or empty it.",
    "soak": "Run an artifact for a million tokens and watch it.",
    "triton": "Write a model repository of the Triton Inference Server.",
    "doctor": "Tell what can be built and run here, what is missing, and what installs it.",
    "demo": "Export, verify and run the small model that ships with the package.",
}
"""Name → first line of its help, so that listing them imports none."""


class LazyGroup(click.Group):
    """A group whose commands are modules of this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of a user's journey."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"rwkv_edge.cli.{cmd_name}").command
        command.short_help = COMMANDS[cmd_name]  # that shells show beside the name
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Add to the refusal of an unknown name the command that it resembles."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            close = get_close_matches(args[0], COMMANDS, 1)
            if not close or "Did you mean" in error.message:
                raise
            raise click.UsageError(f"{error.message} Did you mean '{close[0]}'?", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="rwkv-edge", prog_name="rwkv-edge")
def cli() -> None:
    """RWKV language models on edge devices: from a checkpoint to a verified artifact to text.

    Every command has --help with an example; exit codes: 0 done, 1 failed or a check did not pass, 2 an argument that
    cannot be meant, 130 Ctrl-C.

    Example: rwkv-edge demo
    """


def run(arguments: list[str] | None = None) -> int:
    """Run the command line with ``arguments`` (those of the process where None); returns the exit code.

    Every expected failure is one sentence.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal of another encoding, a path that is not UTF-8
    try:
        with warnings.catch_warnings(), _noted():
            warnings.showwarning = _warned
            code = cli.main(args=arguments, prog_name="rwkv-edge", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):  # click's name for Ctrl-C, and Ctrl-C around click
        return _failed("stopped", 130)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except RwkvEdgeError as error:
        return _failed(f"Error: {error}", error.exit_code)
    except MemoryError:
        return _failed("Error: not enough memory; try a smaller precision or model", 1)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return _failed(f"Error: {name}{error.strerror or error}", 1)
    except SystemExit:  # click's way out where the reader of a pipe has left
        return 1
    return code if isinstance(code, int) else 0  # click returns the code of `ctx.exit`


def _warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line, without the place in the source that Python would tell (the parameters of `warnings.showwarning`)."""
    click.echo(printable(f"Warning: {message}"), err=True)


class _Notes(logging.Handler):
    """What the library tells whoever waits."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line, unless --quiet."""
        note(printable(record.getMessage()))


@contextlib.contextmanager
def _noted() -> Iterator[None]:
    """The library's log as notes, for as long as a command runs."""
    logger, notes = logging.getLogger("rwkv_edge"), _Notes()
    level, propagates = logger.level, logger.propagate
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(notes)
        logger.setLevel(level)
        logger.propagate = propagates


def _failed(message: str, code: int) -> int:
    """Say why in one line."""
    if len(message) > MESSAGE_CHARACTERS:
        message = message[: MESSAGE_CHARACTERS - 1] + "…"
    click.echo(printable(message), err=True)
    return code
