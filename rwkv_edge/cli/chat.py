"""``rwkv-edge chat``."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rwkv_edge.cli.common import (
    COUNT,
    PATH,
    note,
    printable,
    quiet_option,
    say_quantized,
    session_options,
    tokenizer_option,
)
from rwkv_edge.cli.sampling import sampler_from_options, sampling_options
from rwkv_edge.errors import InputError, RwkvEdgeError
from rwkv_edge.runtime.chat_templates import AUTO, TEMPLATES

if TYPE_CHECKING:
    from rwkv_edge.runtime.chat import Chat, Ending

# Sampling that the model card of rwkv7-g1 shows.
_DEFAULTS = {"temperature": 1.0, "top_p": 0.5, "top_k": 100}

_HELP = """\
/retry         another answer to the same text
/reset         forget all turns
/save FILE     keep the conversation: the state and what was said
/load FILE     go on with one that was kept
/history       print what was said
/help          this list
/quit          leave, as Ctrl-D does
//…            a text that begins with a slash
…\\             a text that goes on in the next line
\"""…\"""        a text of several lines
Ctrl-C stops an answer; what was said up to there counts."""

_BLOCK = '"""'  # around a text of several lines
_PROMPT, _MORE = "\n> ", ". "


@click.command("chat", context_settings={"default_map": _DEFAULTS})
@click.argument("artifact", type=PATH)
@click.option(
    "--template", type=click.Choice([AUTO, *TEMPLATES]), default=AUTO, show_default="by the checkpoint's name",
    help="How turns are written.",
)  # fmt: skip
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option(
    "-n", "--max-tokens", default=1024, show_default=True, type=click.IntRange(1), metavar=COUNT,
    help="Tokens of an answer at most.",
)  # fmt: skip
@click.option("--show-thinking", is_flag=True, help="Print thoughts too.")
@click.option("--load", type=PATH, metavar="FILE", help="Go on with a conversation that /save kept.")
@tokenizer_option
@sampling_options
@session_options
@quiet_option
def command(
    artifact: Path,
    template: str,
    system: str | None,
    max_tokens: int,
    show_thinking: bool,
    load: Path | None,
    tokenizer: str | None,
    backend: str,
    providers: Sequence[str],
    threads: int,
    **sampling: object,
) -> None:
    """Talk with ARTIFACT in the terminal. /help lists what can be typed beside text.

    Ctrl-C stops an answer, Ctrl-D leaves. A line that ends in a backslash goes on in the next one, and three double
    quotes stand around a text of several lines. Where standard input is no terminal, each line is a turn all the same.

    Example: rwkv-edge chat rwkv7-g1-0.1b-fp16 --template g1 --system "You answer in one sentence."
    """
    from rwkv_edge.artifact import Artifact
    from rwkv_edge.runtime.chat import Chat
    from rwkv_edge.runtime.chat_templates import template_for
    from rwkv_edge.runtime.open import open_model

    config = sampler_from_options(sampling).config
    model = open_model(artifact, tokenizer, backend=backend, providers=list(providers), threads=threads)
    say_quantized(artifact)
    name = str(Artifact.open(artifact).manifest.source.get("file", ""))
    chosen = template_for(name, model.tokenizer.kind) if template == AUTO else TEMPLATES[template]
    chat = Chat(model, chosen, system, config, max_tokens)
    if load:
        chat.load(load)
    note(f"{printable(str(artifact))}: template {chat.template.name}; /help lists commands")
    _Terminal(chat, show_thinking).run()


class _Terminal:
    """Reads lines until there are no more, and prints answers as they come."""

    def __init__(self, chat: Chat, show_thinking: bool) -> None:
        if sys.stdin is None:  # closed by the shell: <&-
            raise InputError("standard input is closed, but what is said should come from there")
        self._chat, self._show_thinking = chat, show_thinking
        self._interactive = sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "retry": lambda _: self._print(chat.retry(self._stopped)),
            "reset": self._reset,
            "save": self._save,
            "load": self._load,
            "history": self._history,
            "help": lambda _: click.echo(_HELP),
        }
        self._interrupted = False

    def run(self) -> None:
        """Until Ctrl-D, /quit or the end of the input."""
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are refused by the turn
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (line editing, and its own redraw when the window changes)
        while (line := self._line()) is not None and line.strip() not in ("/quit", "/exit"):
            try:
                self._do(line)
            except RwkvEdgeError as error:
                click.echo(printable(f"Error: {error}"), err=True)

    def _line(self) -> str | None:
        """The next line; None at the end."""
        while True:
            try:
                return self._read(_PROMPT)
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                note("\n(Ctrl-D leaves)")

    def _read(self, prompt: str) -> str | None:
        try:
            return input(prompt if self._interactive else "")
        except EOFError:
            if self._interactive:
                click.echo()
            return None

    def _do(self, line: str) -> None:
        text = line.strip()
        if text.startswith("/") and not text.startswith("//"):
            return self._command(text)
        try:
            said = self._whole(line.replace("//", "/", 1) if text.startswith("//") else line)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            return note("\n(forgotten)")
        return self._print(self._chat.ask(said, self._stopped)) if said.strip() else None

    def _command(self, text: str) -> None:
        name, _, rest = text[1:].partition(" ")
        if name not in self._commands:
            raise InputError(f"there is no command '/{name}'; /help lists them, and // begins a text with a slash")
        return self._commands[name](rest.strip())

    def _whole(self, first: str) -> str:
        """A text with the lines that it goes on in; the end of the input ends it too."""
        quoted = first.lstrip().startswith(_BLOCK)
        lines = [first.lstrip().removeprefix(_BLOCK)] if quoted else [first]
        while not lines[-1].rstrip().endswith(_BLOCK) if quoted else lines[-1].endswith("\\"):
            more = self._read(_MORE)
            if more is None:
                break
            lines.append(more)
        if quoted:
            return "\n".join(lines).rstrip().removesuffix(_BLOCK)
        return "\n".join(line.removesuffix("\\") for line in lines)

    def _print(self, pieces: Generator[str, None, Ending]) -> None:
        from rwkv_edge.runtime.chat_draft import Visible

        thinking = bool(self._chat.template.think) and not self._show_thinking
        visible = Visible(thinking)
        with self._watched():
            ending = None
            while ending is None:
                try:
                    click.echo(visible.push(next(pieces)), nl=False)
                except StopIteration as end:
                    ending = end.value
                except BaseException:
                    click.echo()
                    raise
        click.echo()
        if ending in ("interrupted", "length"):
            note("(stopped)" if ending == "interrupted" else "(cut at --max-tokens)")

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Ctrl-C is noted, so that it stops the answer between two tokens, never within one."""
        self._interrupted = False

        def note(*_: object) -> None:
            self._interrupted = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _stopped(self) -> bool:
        return self._interrupted

    def _reset(self, _: str) -> None:
        self._chat.reset()
        note("(everything forgotten)")

    def _save(self, name: str) -> None:
        self._chat.save(_file(name, "/save"))
        note(f"(saved {self._length()} to {printable(name)})")

    def _load(self, name: str) -> None:
        self._chat.load(_file(name, "/load"))
        note(f"(loaded {self._length()}, template {self._chat.template.name})")

    def _length(self) -> str:
        turns = len(self._chat.turns)
        return f"{turns} turn{'' if turns == 1 else 's'}, {self._chat.history.tokens} tokens"

    def _history(self, _: str) -> None:
        from rwkv_edge.runtime.chat_draft import Visible

        for turn in self._chat.turns:
            thinking = bool(self._chat.template.think) and not self._show_thinking
            said = (f"> {turn.user}", Visible(thinking).push(turn.answer))
            click.echo("\n".join(printable(line) for text in said for line in text.split("\n")))


def _file(name: str, asked: str) -> Path:
    if not name:
        raise InputError(f"{asked} needs the name of a file")
    return Path(name).expanduser()
