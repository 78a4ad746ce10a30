"""A conversation: turns by a template, one state that has read exactly them, forks of it to try again."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from rwkv_edge.errors import InputError, StateError
from rwkv_edge.runtime.chat_draft import Draft
from rwkv_edge.runtime.chat_templates import TEMPLATES, ChatTemplate
from rwkv_edge.runtime.loop import generate_step
from rwkv_edge.runtime.open import OpenModel
from rwkv_edge.runtime.sampling import Sampler, SamplerConfig
from rwkv_edge.runtime.snapshot import History, load_snapshot, save_snapshot

S = TypeVar("S")
Ending = Literal["stop_token", "stop_text", "length", "interrupted"]
NOTE = "chat"  # key of the transcript among a snapshot's notes
DEFAULT_MAX_TOKENS = 1024


@dataclass(frozen=True)
class Turn:
    """What was said: the user's text, and the answer as the state has read it, thoughts and all."""

    user: str
    answer: str


@dataclass(frozen=True, eq=False)
class _Point(Generic[S]):
    """A state and what it has read."""

    state: S
    history: History


@dataclass(frozen=True, eq=False)
class _Asked:
    """A text that was read and waits for an answer, or for another one: the turn ``index``."""

    text: str
    index: int
    after: _Point[Any]
    logits: np.ndarray


class _Interrupted(Exception):
    """The text was being read when the user asked to stop; never leaves this module."""


class Chat:
    """A conversation with one model.

    Its state has read the system prompt and all turns, each with the template's end, and nothing else: text past a stop
    string is taken back. A turn that fails leaves everything as it was.

    Attributes:
        template: how turns are written.
        system: the system prompt, or None.
        turns: what was said.
        history: the tokens that the state has read.
    """

    def __init__(
        self,
        model: OpenModel,
        template: ChatTemplate,
        system: str | None = None,
        sampling: SamplerConfig | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampler: Callable[[SamplerConfig], Sampler] = Sampler,
    ) -> None:
        """Begin a conversation; a system prompt is read at once.

        Args:
            model: session and tokenizer.
            template: from `TEMPLATES`.
            system: the system prompt.
            sampling: of every answer; each begins without counts, and with the next seed where one is given.
            max_tokens: of an answer.
            sampler: makes the sampler of an answer.

        Raises:
            InputError: a system prompt for a template that has none, or ``max_tokens`` below 1.
        """
        if max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, not {max_tokens}")
        self.template, self.system = template, system
        self._model, self._session = model, model.session
        self._sampling, self._max_tokens, self._new_sampler = sampling or SamplerConfig(), max_tokens, sampler
        self._answers = 0
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        tokens = [] if self.system is None else self._encode(self.template.system_text(self.system))
        state = self._session.initial_state(1)
        if tokens:
            self._session.prefill([tokens], state)
        self._now: _Point[Any] = _Point(state, History().after(tokens))
        self._asked: _Asked | None = None  # to try the last turn again
        self.turns: list[Turn] = []

    @property
    def history(self) -> History:
        """The tokens that the state has read."""
        return self._now.history

    @property
    def state(self) -> Any:
        """The state after all turns; not to be advanced."""
        return self._now.state

    def ask(self, text: str, stop: Callable[[], bool] = lambda: False) -> Generator[str, None, Ending]:
        """The pieces of the answer as they come; the turn counts when the generator has ended or was closed.

        Args:
            text: what the user says.
            stop: asked after every token, and while the text is read: True ends the answer there.

        Returns:
            Pieces of the answer, with the thoughts; then, as the generator's value, why it ended.

        Raises:
            InputError: an empty text.
            TokenizerError: it cannot be encoded.
            SessionError: the backend failed; the turn does not count.
        """
        tokens = self._encode(self.template.user_text(text))
        if not text.strip():
            raise InputError("there is nothing to answer: the text is empty")
        state = self._session.copy_state(self._now.state)

        def watch(_: int, __: np.ndarray) -> None:
            if stop():
                raise _Interrupted

        try:
            logits = self._session.prefill([tokens], state, watch)[0]
        except _Interrupted:
            return "interrupted"
        self._asked = _Asked(text, len(self.turns), _Point(state, self.history.after(tokens)), logits)
        return (yield from self._answer(self._asked, stop))

    def retry(self, stop: Callable[[], bool] = lambda: False) -> Generator[str, None, Ending]:
        """Another answer to the last text, in place of the first one; as `ask`.

        Raises:
            InputError: nothing was asked since the beginning, the last reset or `load`.
        """
        if self._asked is None:
            raise InputError("there is no answer to try again; ask something first")
        return (yield from self._answer(self._asked, stop))

    def _answer(self, asked: _Asked, stop: Callable[[], bool]) -> Generator[str, None, Ending]:
        state = self._session.copy_state(asked.after.state)
        draft = Draft(self._session, self._model.tokenizer, self.template.stops, state)
        sampler = self._sampler()
        ending: Ending = "interrupted"  # where the generator is closed
        ends, most = self._model.tokenizer.eos_ids, self._max_tokens
        steps = generate_step(self._session, sampler, state, [0], asked.logits, stop_tokens=ends, max_tokens=most)
        try:
            for step in steps:
                if step.token in ends:
                    draft.finish_step()
                    ending = "stop_token"
                    break
                piece = draft.push(step.token)
                if piece:
                    yield piece
                if draft.stopped:
                    ending = "stop_text"
                    break
                if len(draft.tokens) == most:
                    ending = "length"
                    break
                if stop():
                    break
            rest = draft.end(show_held=ending in ("stop_token", "length"))
            if rest:
                yield rest
        except GeneratorExit:
            self._settle(asked, draft)
            raise
        self._settle(asked, draft)
        return ending

    def _settle(self, asked: _Asked, draft: Draft[Any]) -> None:
        """The turn counts: the state is that of the text so far and the end of a turn."""
        state, consumed = draft.settled(self.template.turn_end)
        self._now = _Point(state, asked.after.history.after(consumed))
        self.turns[asked.index :] = [Turn(asked.text, self.template.think + draft.text)]

    def _sampler(self) -> Sampler:
        seed = self._sampling.seed
        config = self._sampling if seed is None else replace(self._sampling, seed=seed + self._answers)
        self._answers += 1
        return self._new_sampler(config)

    def _encode(self, text: str) -> list[int]:
        return self._model.tokenizer.encode(text)

    def save(self, path: str | Path) -> None:
        """Write the state and what was said to a snapshot, from which `load` goes on exactly.

        Raises:
            StateError: it cannot be written.
        """
        note = {
            "template": self.template.name,
            "system": self.system,
            "turns": [[turn.user, turn.answer] for turn in self.turns],
        }
        save_snapshot(path, self._session, self._now.state, [self.history], notes={NOTE: note})

    def load(self, path: str | Path) -> None:
        """Go on from a snapshot that `save` wrote, with its template and system prompt.

        Raises:
            StateError: it is no snapshot of a chat with this model; the conversation is as it was.
        """
        snapshot = load_snapshot(path, self._session)
        template, system, turns = _checked_note(snapshot.notes.get(NOTE), path)
        if len(snapshot.streams) != 1:
            raise StateError(f"{path} holds {len(snapshot.streams)} streams, but a chat is one")
        self._now = _Point(self._session.import_state(snapshot.arrays), snapshot.streams[0])
        self.template, self.system, self.turns, self._asked = template, system, turns, None


def _checked_note(note: Any, path: str | Path) -> tuple[ChatTemplate, str | None, list[Turn]]:
    if note is None:
        raise StateError(f"{path} is a state without a conversation; load one that /save wrote")
    try:
        system, turns = note["system"], [Turn(*pair) for pair in note["turns"]]
        said = [text for turn in turns for text in (turn.user, turn.answer)]
        if not all(isinstance(text, str) for text in said) or not isinstance(system, str | None):
            raise TypeError("what was said is no text")
        return TEMPLATES[note["template"]], system, turns
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(
            f"{path} holds no conversation that can be read ({str(error)[:100]}); save it again"
        ) from error
