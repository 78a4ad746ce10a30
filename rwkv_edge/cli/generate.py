"""``rwkv-edge generate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rwkv_edge.cli.common import (
    PATH,
    ByteSize,
    counted,
    note,
    printable,
    quiet_option,
    read_text,
    say_quantized,
    session_options,
    tokenizer_option,
)
from rwkv_edge.cli.sampling import sampler_from_options, sampling_options
from rwkv_edge.errors import InputError, RwkvEdgeError

if TYPE_CHECKING:
    from rwkv_edge.runtime.cache import PromptCache
    from rwkv_edge.runtime.resume import Continuation


@click.command("generate")
@click.argument("artifact", type=PATH)
@click.argument("prompt", required=False)
@click.option(
    "-n", "--max-tokens", default=256, show_default=True, type=click.IntRange(1), metavar="N",
    help="Most tokens to generate.",
)  # fmt: skip
@click.option("--stop", "stops", multiple=True, help="Text to stop before; repeatable.")
@click.option(
    "--stop-token", "stop_tokens", multiple=True, type=int, metavar="ID",
    help="Token to stop at; repeatable.  [default: the tokenizer's end of text]",
)  # fmt: skip
@click.option("--no-echo", is_flag=True, help="Print the continuation without the prompt.")
@tokenizer_option
@click.option("--state-in", type=PATH, metavar="FILE", help="Snapshot to go on from; PROMPT may then be left out.")
@click.option("--state-out", type=PATH, metavar="FILE", help="Snapshot to write when the text has ended.")
@click.option(
    "--cache", "cache_folder", type=PATH, metavar="DIR",
    help="Keep the states of prompts there, so that a prompt is read once.",
)  # fmt: skip
@click.option("--cache-size", type=ByteSize(), default="1GB", show_default=True, help="Bytes that the cache may take.")
@sampling_options
@session_options
@quiet_option
def command(
    artifact: Path,
    prompt: str | None,
    max_tokens: int,
    stops: Sequence[str],
    stop_tokens: Sequence[int],
    no_echo: bool,
    tokenizer: str | None,
    state_in: Path | None,
    state_out: Path | None,
    cache_folder: Path | None,
    cache_size: int,
    backend: str,
    providers: Sequence[str],
    threads: int,
    **sampling: object,
) -> None:
    """Continue PROMPT (or, with -, the text on standard input) and print as it goes.

    The speed is printed on standard error at the end. Ctrl-C ends it with exit code 130. With --state-out and
    --state-in, two runs give the text of one, at temperature 0 without penalties: draws and counts begin anew.

    Example: rwkv-edge generate RWKV-x070-World-0.1B-fp16 "The sea is" -n 100 --temperature 0.8
    """
    from rwkv_edge.runtime.open import open_model
    from rwkv_edge.runtime.resume import continued_text

    sampler = sampler_from_options(sampling)
    text = read_text(Path("-")) if prompt == "-" else _utf8(prompt or "")
    model = open_model(artifact, tokenizer, backend=backend, providers=list(providers), threads=threads)
    say_quantized(artifact)
    continuation = continued_text(
        model, text, sampler=sampler, max_tokens=max_tokens, stops=list(stops), stop_tokens=set(stop_tokens) or None,
        start=state_in, end=state_out, cache=_cache(cache_folder, cache_size),
    )  # fmt: skip
    if not no_echo:
        click.echo(text, nl=False)
    _print(continuation, flush=state_out is None)
    if state_out:
        continuation.save(state_out)


def _cache(folder: Path | None, size: int) -> PromptCache | None:
    from rwkv_edge.runtime.cache import PromptCache

    if folder is None:
        return None
    return PromptCache(folder, size, lambda line: click.echo(f"Warning: {printable(line)}", err=True))


def _print(continuation: Continuation, flush: bool) -> None:
    """The text as it comes, then the speed, after Ctrl-C too; an error speaks for itself."""
    failed = False
    try:
        for piece in continuation.pieces:
            click.echo(piece, nl=False)
        if flush:
            click.echo(continuation.unfinished(), nl=False)
    except RwkvEdgeError:
        failed = True
        raise
    finally:
        click.echo()
        if not failed:
            note(_summary(continuation))


def _summary(continuation: Continuation) -> str:
    pieces, reused = continuation.pieces, continuation.reused
    return (
        f"{counted(len(pieces.tokens), 'token')}, {pieces.tokens_per_second:.1f} tokens/s, "
        f"prompt of {counted(pieces.prompt_tokens, 'token')}"
        + (f", {reused} of them from the cache," if reused else "")
        + f" in {continuation.prompt_seconds + pieces.prefill_seconds:.3f} s"
        + (f", stopped by {pieces.reason.replace('_', ' ')}" if pieces.reason else "")
    )


def _utf8(prompt: str) -> str:
    """The prompt, if the shell passed UTF-8 (other bytes arrive as surrogates)."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is not UTF-8 (character {error.start}); convert it to UTF-8") from error
    return prompt
