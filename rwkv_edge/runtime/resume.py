"""Generation that begins from a snapshot or from a cached prompt, and that leaves a snapshot."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rwkv_edge.errors import InputError, StateError
from rwkv_edge.runtime.cache import PromptCache
from rwkv_edge.runtime.loop import Generation, generate_text
from rwkv_edge.runtime.open import OpenModel
from rwkv_edge.runtime.sampling import Sampler
from rwkv_edge.runtime.snapshot import History, check_target, load_snapshot, save_snapshot
from rwkv_edge.tokenizers.stream import TextStream


class Continuation:
    """A generation together with what came before it; made by `continued_text`.

    Attributes:
        pieces: the generation; iterate over it.
        reused: tokens of the prompt that came from the cache.
        prompt_seconds: time to read the prompt, as long as it was not read with the first piece.
    """

    def __init__(
        self, model: OpenModel, pieces: Generation[Any], before: History, prompt: Sequence[int], text: TextStream
    ) -> None:
        self.pieces = pieces
        self.reused = 0
        self.prompt_seconds = 0.0
        self._model, self._before, self._prompt, self._text = model, before, tuple(prompt), text

    @property
    def history(self) -> History:
        """What the state has read, once a piece was generated."""
        drawn, pending = self.pieces.tokens, self.pieces.pending
        return self._before.after((*self._prompt, *drawn[: len(drawn) - len(pending)]), pending)

    def save(self, path: Path) -> None:
        """Write a snapshot from which `continued_text` goes on exactly.

        Raises:
            StateError: it cannot be written.
        """
        save_snapshot(path, self._model.session, self.pieces.state, [self.history])

    def unfinished(self) -> str:
        """U+FFFD for half a character at the end, for who does not go on from here; else ''."""
        return self._text.flush()


def continued_text(
    model: OpenModel,
    prompt: str,
    *,
    sampler: Sampler,
    max_tokens: int,
    stops: Sequence[str] = (),
    stop_tokens: Collection[int] | None = None,
    start: Path | None = None,
    end: Path | None = None,
    cache: PromptCache | None = None,
) -> Continuation:
    """`generate_text` from a snapshot, or with a cache of prompts.

    Args:
        model: session and tokenizer.
        prompt: read first; where there is a snapshot it may be empty, and the text goes on where it ended.
        sampler: begins anew: its penalties know nothing of the tokens before the snapshot.
        max_tokens: as for `generate_text`, like the next two.
        stops: texts.
        stop_tokens: ids.
        start: the snapshot to begin with.
        end: where a snapshot will be written: checked now, before anything runs.
        cache: of prompts, where there is no snapshot.

    Raises:
        InputError: both a snapshot and a cache, or nothing to begin with, and what `generate_text` raises.
        StateError: the snapshot cannot be used.
    """
    if start is not None and cache is not None:
        raise InputError("a cache knows prompts from their beginning, so it cannot be used together with a snapshot")
    if end is not None:
        check_target(end)
    before, state = (History(), None) if start is None else _start(start, model)
    tokens = _prompt_tokens(model, prompt, before, start)
    text = TextStream(model.tokenizer)
    for token in (*before.last, *before.pending) if not prompt else ():
        text.push(token)  # leaves the half of a character with which the text before ended
    began = time.perf_counter()
    found = cache.prefill(model.session, tokens) if cache else None
    seconds = time.perf_counter() - began
    pieces = generate_text(
        model.session, model.tokenizer, tokens, sampler=sampler, state=found.state if found else state,
        max_tokens=max_tokens, stops=stops, stop_tokens=stop_tokens, logits=found.logits if found else None, text=text,
    )  # fmt: skip
    continuation = Continuation(model, pieces, before, tokens, text)
    if found:
        continuation.reused, continuation.prompt_seconds = found.reused, seconds
    return continuation


def _start(path: Path, model: OpenModel) -> tuple[History, Any]:
    snapshot = load_snapshot(path, model.session)
    if len(snapshot.streams) != 1:
        raise StateError(f"{path} holds {len(snapshot.streams)} streams, but a text continues one")
    return snapshot.streams[0], model.session.import_state(snapshot.arrays)


def _prompt_tokens(model: OpenModel, prompt: str, before: History, start: Path | None) -> list[int]:
    if start is None:
        return model.prompt_tokens(prompt)
    tokens = [*before.pending, *model.tokenizer.encode(prompt)]
    if not tokens:
        raise InputError(f"{start} ends at a stop token, so nothing follows from it alone; give a prompt")
    return tokens
