"""An answer while it is drawn: what of it may be shown, and the state to go back to where it was drawn too far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rwkv_edge.runtime.chat_templates import THINK_END
from rwkv_edge.tokenizers.base import Tokenizer
from rwkv_edge.tokenizers.stream import StopText, TextStream

if TYPE_CHECKING:
    from rwkv_edge.runtime.session import Session

S = TypeVar("S")


class Draft(Generic[S]):
    """Tokens become text that is shown; what may belong to a stop string or to an unfinished character is held back.

    The state runs ahead of what is shown, so it is copied before the first token of which something is held back. With
    that copy, `settled` gives the state of just what was shown.

    Attributes:
        tokens: drawn so far, without a stop token.
        text: shown so far.
        stopped: a stop string was met.
    """

    def __init__(self, session: Session[Any], tokenizer: Tokenizer, stops: Sequence[str], state: S) -> None:
        """``state`` has read what comes before the answer, and is advanced by who draws."""
        self.tokens: list[int] = []
        self.text = ""
        self._session, self._tokenizer, self._state = session, tokenizer, state
        self._stream, self._stops = TextStream(tokenizer), StopText(stops)
        self._pending: list[int] = []  # the last token, which the state has not read
        self._safe: S | None = None  # the state before the first token of which something is held back
        self._since: tuple[int, int] = (0, 0)  # tokens and characters shown when it was copied

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stops.met

    def push(self, token: int) -> str:
        """A token that was drawn, while the state has read those before it; what may be shown because of it."""
        clean = self._safe is None
        piece, met = self._stops.push(self._stream.push(token))
        behind = met or bool(self._stops.held) or self._stream.unfinished
        if clean and behind:
            self._safe = self._session.copy_state(self._state)
            self._since = (len(self.tokens), len(self.text))
        elif not behind:
            self._safe = None
        self.tokens.append(token)
        self._pending = [token]
        self.text += piece
        return piece

    def finish_step(self) -> None:
        """The state has read all tokens: another one was drawn, which is no part of the answer."""
        self._pending = []

    def end(self, show_held: bool) -> str:
        """No more tokens: what was held back and is text after all, where it is to be shown."""
        held = self._stops.flush() if show_held else ""
        held = held if held.strip() else ""  # line breaks before an end belong to the end
        self.text += held
        return held

    def settled(self, turn_end: str) -> tuple[S, list[int]]:
        """The state that has read the text and ``turn_end``, and the tokens of both."""
        if self._safe is None:
            state, read = self._state, self.tokens[: len(self.tokens) - len(self._pending)]
            rest = [*self._pending, *self._tokenizer.encode(turn_end)]
        else:
            count, shown = self._since
            state, read = self._safe, self.tokens[:count]
            rest = self._tokenizer.encode(self.text[shown:] + turn_end)
        if rest:
            self._session.prefill([rest], state)
        return state, [*read, *rest]


class Visible:
    """Leaves out thoughts, which end with ``</think>``, and white space before the answer."""

    def __init__(self, thinking: bool) -> None:
        self._thinking, self._begun = thinking, False
        self._hidden = ""  # the last of the thoughts, where their end may have begun

    def push(self, piece: str) -> str:
        """What of a piece of the answer is to be seen."""
        if self._thinking:
            hidden = self._hidden + piece
            at = hidden.find(THINK_END)
            if at < 0:
                self._hidden = hidden[-len(THINK_END) + 1 :]
                return ""
            self._thinking, piece = False, hidden[at + len(THINK_END) :]
        if not self._begun:
            piece = piece.lstrip()
            self._begun = bool(piece)
        return piece
