"""``rwkv-edge generate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from rwkv_edge.cli.common import PATH, read_text, session_options
from rwkv_edge.cli.sampling import sampler_from_options, sampling_options
from rwkv_edge.errors import InputError


@click.command("generate")
@click.argument("artifact", type=PATH)
@click.argument("prompt", required=False)
@click.option("-n", "--max-tokens", default=256, show_default=True, type=click.IntRange(1), help="Tokens to generate.")
@click.option("--stop", "stops", multiple=True, help="Text to stop before, repeatable.")
@click.option("--stop-token", "stop_tokens", multiple=True, type=int, help="Token id to stop at, repeatable.")
@click.option("--no-echo", is_flag=True, help="Print the continuation without the prompt.")
@click.option("--tokenizer", metavar="NAME|FILE", help="Instead of the artifact's: world, bytes, or a tokenizer.json.")
@sampling_options
@session_options
def command(
    artifact: Path,
    prompt: str | None,
    max_tokens: int,
    stops: Sequence[str],
    stop_tokens: Sequence[int],
    no_echo: bool,
    tokenizer: str | None,
    providers: Sequence[str],
    threads: int,
    **sampling: object,
) -> None:
    """Continue PROMPT (or, with -, the text on standard input) and print as it goes.

    The speed is printed on standard error at the end. Ctrl-C ends it with exit code 130.

    Example: rwkv-edge generate RWKV-x070-World-0.1B-fp16 "The sea is" -n 100 --temperature 0.8
    """
    from rwkv_edge.runtime.loop import generate_text
    from rwkv_edge.runtime.open import open_model

    sampler = sampler_from_options(sampling)
    text = read_text(Path("-")) if prompt == "-" else _utf8(prompt or "")
    model = open_model(artifact, tokenizer, providers=list(providers), threads=threads)
    start = model.prompt_tokens(text)
    pieces = generate_text(
        model.session, model.tokenizer, start, sampler=sampler, max_tokens=max_tokens, stops=list(stops),
        stop_tokens=set(stop_tokens) or None,
    )  # fmt: skip
    if not no_echo:
        click.echo(text, nl=False)
    try:
        for piece in pieces:
            click.echo(piece, nl=False)
    finally:
        click.echo()
        click.echo(
            f"{len(pieces.tokens)} tokens, {pieces.tokens_per_second:.1f} tokens/s, "
            f"prompt of {pieces.prompt_tokens} tokens in {pieces.prefill_seconds:.3f} s"
            + (f", stopped by {pieces.reason.replace('_', ' ')}" if pieces.reason else ""),
            err=True,
        )


def _utf8(prompt: str) -> str:
    """The prompt, if the shell passed UTF-8 (other bytes arrive as surrogates)."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is not UTF-8 (character {error.start}); convert it to UTF-8") from error
    return prompt
