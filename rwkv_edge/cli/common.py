"""What several commands share: options, progress bars, sizes in words."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from rwkv_edge.errors import FileError, InputError, MissingDependencyError

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path, readable=False)  # what cannot be read is refused in our own words
COUNT = "N"  # metavar of a number
QUIET = "rwkv_edge.quiet"
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


def quiet_option(function: F) -> F:
    """-q and --quiet, which `note` and the progress bars heed."""
    return click.option(
        "-q", "--quiet", is_flag=True, expose_value=False,
        callback=lambda context, _, value: context.meta.update({QUIET: value}),
        help="Print no progress and no notes; results, warnings and errors remain.",
    )(function)  # fmt: skip


def is_quiet() -> bool:
    """Whether the running command was called with --quiet."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(QUIET))


def note(text: str, err: bool = True) -> None:
    """A line that --quiet leaves out."""
    if not is_quiet():
        click.echo(text, err=err)


def hides_progress() -> bool:
    """Whether bars stay away: standard error is no terminal, or --quiet."""
    return is_quiet() or sys.stderr is None or not sys.stderr.isatty()


class Suggested(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.4
    """Any text: a shell completes to some names, or to files where none of them fits."""

    name = "text"

    def __init__(self, *names: str) -> None:
        self.names = names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that begin so."""
        fitting = [CompletionItem(name) for name in self.names if name.startswith(incomplete)]
        return fitting or [CompletionItem(incomplete, type="file")]


def tokenizer_option(function: F) -> F:
    """--tokenizer of what runs an artifact."""
    return click.option(
        "--tokenizer", type=Suggested("world", "bytes"), metavar="NAME|FILE",
        help="Instead of the artifact's: world, bytes, or a tokenizer.json.",
    )(function)  # fmt: skip


SESSION_BACKENDS = ("auto", "onnxruntime", "cuda", "tensorrt", "tensorrt-rtx")
"""`rwkv_edge.runtime.session.BACKENDS`, known without importing numpy."""


def session_options(function: F) -> F:
    """--backend, --provider and --threads."""
    function = click.option(
        "--threads", default=0, show_default="automatic", metavar=COUNT, help="Compute threads of ONNX Runtime."
    )(function)
    function = click.option(
        "--provider", "providers", multiple=True, metavar="NAME",
        type=Suggested("cpu", "cuda", "tensorrt", "nv-tensorrt-rtx"),
        help="Execution provider of ONNX Runtime: cpu, cuda, tensorrt, nv-tensorrt-rtx or its own name, with options "
        "where needed (cuda:device_id=1); repeatable in order of preference.  [default: cpu]",
    )(function)  # fmt: skip
    return click.option(
        "--backend", type=click.Choice(SESSION_BACKENDS), default="auto", show_default=True,
        help="What runs the artifact. auto: engines of `rwkv-edge build` that fit this machine, else our own kernels "
        "(cuda) where there is an NVIDIA GPU, else ONNX Runtime.",
    )(function)  # fmt: skip


def adapter_options(function: F) -> F:
    """--lora and --lora-alpha."""
    function = click.option(
        "--lora-alpha", type=float, metavar="A", help="Alpha that the LoRA was trained with; its file does not say.",
    )(function)  # fmt: skip
    return click.option(
        "--lora", type=PATH, metavar="FILE|FOLDER",
        help="Adapter to merge into CHECKPOINT: LoRA, DiSHA, Bone or MiSS, recognised by its tensors.",
    )(function)  # fmt: skip


class Batch(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.4
    """A number of streams, or 'dynamic'."""

    name = "N|dynamic"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """'dynamic' or an integer of at least 1."""
        if value == "dynamic":
            return "dynamic"
        try:
            batch = int(value)
        except ValueError:
            batch = 0
        if not 1 <= batch <= 65536:
            self.fail(f"'{value}' is neither a number of streams from 1 on nor 'dynamic'", param, ctx)
        return batch


class ByteSize(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.4
    """A number of bytes, or of kB, MB, GB."""

    name = "BYTES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """'500MB' or 500000000."""
        found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) *([kMGT]?)B?", str(value), re.ASCII)
        if not found:
            self.fail(f"'{value}' is no size; give bytes, or a number with kB, MB or GB", param, ctx)
        return int(float(found[1]) * 1000 ** " kMGT".index(found[2] or " "))


@contextlib.contextmanager
def needs(extra: str, purpose: str) -> Iterator[None]:
    """Around imports of what an extra installs: a package that is absent becomes one sentence.

    Raises:
        MissingDependencyError: names the package and the extra.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "rwkv_edge"):
            raise
        raise MissingDependencyError(package, extra, purpose) from error


def print_json(data: Any) -> None:
    """Indented, as UTF-8 text."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def say_quantized(artifact: Path) -> None:
    """One line on stderr about an artifact that is not what was trained; nothing about another."""
    from rwkv_edge.artifact import Artifact

    facts = Artifact.open(artifact).manifest.quantization
    if facts:
        text = f"{artifact}: quantized, {facts['scheme']}, head {facts.get('head')}, embedding {facts.get('embedding')}"
        note(printable(text))


def printable(text: str) -> str:
    """One line in which control characters are escaped: names in a file must not steer the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def counted(count: int, thing: str) -> str:
    """A number of things in words: 1 token, 2 tokens."""
    return f"{count} {thing}" + ("" if count == 1 else "s")


def program() -> str:
    """What calls this program from the shell: its name where PATH has it, else as it was called."""
    if shutil.which("rwkv-edge"):
        return "rwkv-edge"
    called = Path(sys.argv[0])
    return str(called) if called.stem == "rwkv-edge" else f"{Path(sys.executable).name} -m rwkv_edge"


def size(nbytes: float) -> str:
    """Bytes in words: 1.8 GB."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"


@contextlib.contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A progress bar of bytes on stderr, drawn on a terminal only; yields what `export_checkpoint` takes."""
    with contextlib.ExitStack() as stack:

        def start(total: int) -> Callable[[int], None]:
            steps = max(1, total // 200)
            hidden = hides_progress()
            bar = stack.enter_context(
                click.progressbar(
                    length=total,
                    label=f"{label} ({size(total)})",
                    file=sys.stderr,
                    update_min_steps=steps,
                    show_pos=False,
                    hidden=hidden,
                )
            )

            def update(nbytes: int) -> None:
                bar.update(nbytes)

            return update

        yield start


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, or of stdin for '-'.

    Raises:
        FileError: it cannot be read or is not UTF-8.
        InputError: what comes from stdin is not, or it is closed.
    """
    name = "standard input" if str(path) == "-" else str(path)
    try:
        raw = _stdin() if str(path) == "-" else path.read_bytes()
        return raw.decode("utf-8")
    except OSError as error:
        raise FileError(f"{name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        where = f"byte {raw[error.start]:#04x} at offset {error.start}"
        refusal = InputError if str(path) == "-" else FileError  # what is piped in stands for an argument
        raise refusal(f"{name} is not UTF-8: {where}; convert it first") from error


def _stdin() -> bytes:
    if sys.stdin is None:  # closed by the shell: <&-
        raise InputError("standard input is closed, but the text should come from there")
    return sys.stdin.buffer.read()
