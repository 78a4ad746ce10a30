"""The step loop: tokens, and text, one after another from a session, a sampler and a state."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from rwkv_edge.errors import InputError
from rwkv_edge.runtime.candidates import candidate_step
from rwkv_edge.runtime.sampling import Sampler
from rwkv_edge.runtime.session import checked_tokens
from rwkv_edge.spec import ModelSpec
from rwkv_edge.tokenizers.base import Tokenizer
from rwkv_edge.tokenizers.stream import StopText, TextStream

if TYPE_CHECKING:
    from rwkv_edge.runtime.session import Session, State

S = TypeVar("S", bound="State")

Reason = Literal["length", "stop_token", "stop_text"]
"""Why a generation ended: ``max_tokens`` reached, a stop token drawn, a stop string completed."""


@dataclass(frozen=True, eq=False)
class Step:
    """One turn of the loop: the token drawn, and ``fetch`` for what it was drawn from."""

    token: int
    fetch: Callable[[], NDArray[np.float32]]

    @property
    def logits(self) -> NDArray[np.float32]:
        """The logits [V], float32; where the device keeps them, ask before the next step.

        Raises:
            SessionError: the device has overwritten them.
        """
        return self.fetch()


def generate_step(
    session: Session[S],
    sampler: Sampler,
    state: S,
    tokens: Sequence[int],
    logits: NDArray[np.float32] | None = None,
    *,
    stop_tokens: Collection[int] = (),
    max_tokens: int | None = None,
) -> Iterator[Step]:
    """Feed ``tokens`` to ``state`` by prefill, then draw one token after another, forever; stop by not asking for more.

    ``state`` has batch 1 and advances in place. While a step is with the caller, the state has consumed the prompt and
    every token drawn before, but not the token of that step. A state saved there is resumed exactly by passing that
    token as ``tokens``. Nothing runs before the first step is asked for. Where the state has consumed ``tokens``
    already, ``logits`` are those [V] after the last of them, and nothing is fed.

    A device that samples itself (`CudaSession`) runs some steps ahead of what is asked for. That shows nowhere: whoever
    uses the state or the sampler in between, or stops, finds them as described. ``stop_tokens`` and ``max_tokens`` say
    where the caller will stop, so that no step is run in vain; they end nothing.

    Raises:
        InputError: at the call: no tokens, or one that is not in the model's vocabulary.
        SessionError: from a step: the backend failed, or the logits hold NaN.
    """
    plan = _Plan(frozenset(stop_tokens), max_tokens)
    return _steps(session, sampler, state, _checked_prompt(tokens, session.spec), logits, plan)


@dataclass(frozen=True)
class _Plan:
    """Where the caller will stop."""

    stop_tokens: frozenset[int]
    max_tokens: int | None


def _steps(
    session: Session[S],
    sampler: Sampler,
    state: S,
    prompt: NDArray[np.int64],
    read: NDArray[np.float32] | None,
    plan: _Plan,
) -> Iterator[Step]:
    logits = session.prefill(prompt, state) if read is None else read[None]
    token = sampler.sample(logits[0])
    yield Step(token, partial(_first, logits))
    ahead = _drawn_ahead(session, sampler, state, token, plan)
    if ahead is not None:
        yield from (Step(drawn, fetch) for drawn, fetch in ahead)
    few = candidate_step(session, sampler.config)
    while True:
        fed = np.array([token], np.int64)
        if few is not None:
            (found,) = few(fed, state)
            token = sampler.sample_from(found)
            yield Step(token, found.full)
        else:
            logits = session.step(fed, state)
            token = sampler.sample(logits[0])
            yield Step(token, partial(_first, logits))


DrawAhead = Callable[
    [int, Any, Sampler, Collection[int], "int | None"], "Iterator[tuple[int, Callable[[], NDArray[np.float32]]]] | None"
]


def _drawn_ahead(
    session: Session[S], sampler: Sampler, state: S, token: int, plan: _Plan
) -> Iterator[tuple[int, Callable[[], NDArray[np.float32]]]] | None:
    """Tokens behind ``token`` and their logits, where the session draws them itself; else None.

    Such a session has ``draw_ahead``. It does what `Sampler` does, not what a class derived from it might.
    """
    draw: DrawAhead | None = getattr(session, "draw_ahead", None)
    if draw is None or type(sampler) is not Sampler:
        return None
    left = None if plan.max_tokens is None else plan.max_tokens - 1
    return draw(token, state, sampler, plan.stop_tokens, left)


def _first(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    row: NDArray[np.float32] = logits[0]
    return row


def _checked_prompt(tokens: Sequence[int], spec: ModelSpec) -> NDArray[np.int64]:
    """The prompt as [1, T]; raises `InputError` before anything runs."""
    if not len(tokens):
        raise InputError("a prompt needs at least one token, but it is empty; start a World model with token 0")
    return checked_tokens([tokens], 2, 1, spec)


class Generation(Iterator[str], Generic[S]):
    """Text pieces as a model generates them, and what there is to know about them; made by `generate_text`.

    A piece is text that is complete: unfinished characters and possible beginnings of stop strings are held back, and
    stop strings are not part of the text. Iterate to the end, or `close` (or leave a ``with``) to stop early; what was
    held back is dropped then. The session and the state stay open; they are the caller's.

    Attributes:
        state: the state that the generation advances. It has consumed the prompt and ``tokens`` but for ``pending``.
        prompt_tokens: number of tokens of the prompt.
        tokens: ids drawn so far, without a stop token.
        reason: why it ended; None while it runs, after `close` and after an error.
        prefill_seconds: time to the first token: prefill and one draw.
        decode_seconds: time of the steps after it, without what the caller did in between.
        decode_steps: number of those steps.
    """

    def __init__(
        self,
        steps: Iterator[Step],
        state: S,
        text: TextStream,
        stops: StopText,
        *,
        stop_tokens: Collection[int],
        prompt_tokens: int,
        max_tokens: int,
        flush: bool,
    ) -> None:
        self.state = state
        self.prompt_tokens = prompt_tokens
        self.tokens: list[int] = []
        self.reason: Reason | None = None
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.decode_steps = 0
        self._steps: Iterator[Step] | None = steps
        self._text = text
        self._stops = stops
        self._stop_tokens = frozenset(stop_tokens)
        self._max_tokens = max_tokens
        self._flush = flush

    @property
    def pending(self) -> tuple[int, ...]:
        """The last of ``tokens``, which ``state`` has not consumed; put it before the next prompt to go on exactly.

        Empty before the first token, and after a stop token.
        """
        return () if self.reason == "stop_token" else tuple(self.tokens[-1:])

    @property
    def tokens_per_second(self) -> float:
        """Steps a second after the first token; 0 before there was one."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0

    def __next__(self) -> str:
        """The next piece of text, never empty."""
        while self._steps is not None:
            piece = self._advance(self._steps)
            if piece:
                return piece
        raise StopIteration

    def close(self) -> None:
        """Stop here; more than once does no harm."""
        self._steps = None

    def __enter__(self) -> Generation[S]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _advance(self, steps: Iterator[Step]) -> str:
        """Draw one token; the text that it sets free, and at the end all that is left."""
        token = self._timed_token(steps)
        if token in self._stop_tokens:
            return self._ended("stop_token", "")
        self.tokens.append(token)
        piece, met = self._stops.push(self._text.push(token))
        if met:
            return self._ended("stop_text", piece)
        if len(self.tokens) == self._max_tokens:
            return self._ended("length", piece)
        return piece

    def _timed_token(self, steps: Iterator[Step]) -> int:
        start = time.perf_counter()
        token = next(steps).token
        seconds = time.perf_counter() - start
        if self.tokens:
            self.decode_seconds += seconds
            self.decode_steps += 1
        else:
            self.prefill_seconds = seconds
        return token

    def _ended(self, reason: Reason, piece: str) -> str:
        self.reason = reason
        self.close()
        rest, _ = self._stops.push(self._text.flush() if self._flush else "")
        return piece + rest + self._stops.flush()


def generate_text(
    session: Session[S],
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    sampler: Sampler,
    state: S | None = None,
    max_tokens: int,
    stop_tokens: Collection[int] | None = None,
    stops: Sequence[str] = (),
    logits: NDArray[np.float32] | None = None,
    text: TextStream | None = None,
) -> Generation[S]:
    """Generate text after ``prompt``, a text or its tokens: an iterator of pieces that also holds tokens and timings.

    ``state`` (batch 1) is continued and advances in place; None starts from the session's initial state. Generation
    ends after ``max_tokens`` tokens, at a token of ``stop_tokens`` (by default the tokenizer's ``eos_ids``), or where
    one of the texts ``stops`` is complete. Nothing runs before the first piece is asked for.

    Where ``state`` has consumed the prompt already, ``logits`` are those [V] after its last token. A ``text`` that is
    given continues with the character that it holds half of, and keeps half of one at the end.

    Raises:
        InputError: an empty prompt, a token or a stop token that is given outside the vocabulary, ``max_tokens`` below
            1, an empty stop string.
        TokenizerError: the prompt cannot be encoded.
        SessionError: from the iteration: the backend failed, or the logits hold NaN.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, not {max_tokens}")
    tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    stop_text = StopText(stops)
    checked = _checked_prompt(tokens, session.spec)
    unknown = sorted(token for token in stop_tokens or () if not 0 <= token < session.spec.vocab_size)
    if unknown:
        raise InputError(
            f"stop tokens must be from 0 to {session.spec.vocab_size - 1}, the model's vocabulary, not {unknown[0]}"
        )
    state = session.initial_state(1) if state is None else state
    ends = frozenset(tokenizer.eos_ids if stop_tokens is None else stop_tokens)
    return Generation(
        _steps(session, sampler, state, checked, logits, _Plan(ends, max_tokens)),
        state,
        TextStream(tokenizer) if text is None else text,
        stop_text,
        stop_tokens=ends,
        prompt_tokens=len(tokens),
        max_tokens=max_tokens,
        flush=text is None,
    )
