"""Text as it streams in: characters that are complete, and stop strings that may be about to begin."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from rwkv_edge.errors import InputError
from rwkv_edge.tokenizers.base import Tokenizer


class TextStream:
    """Incremental text of tokens; the bytes of an unfinished character are held back.

    The pieces joined are the tokens' bytes decoded at once with errors='replace', wherever the tokens split them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Text that ``token`` completes.

        Ids past the tokenizer's, which a padded embedding has (65530 to 65535 in World models), have no text.

        Raises:
            TokenizerError: the id is negative.
        """
        if token >= self._tokenizer.vocab_size:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    @property
    def unfinished(self) -> bool:
        """Whether bytes of an unfinished character are held back."""
        return bool(self._decoder.getstate()[0])

    def flush(self) -> str:
        """U+FFFD for a character that was never finished, else ''; the stream is empty afterwards."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class StopText:
    """Releases text up to the first of ``stops`` to be completed; text that may begin a stop string is held back.

    Of stop strings that the same character completes, the longest counts. Where the pieces are cut does not matter.

    Raises:
        InputError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or "" in stops:
            raise InputError(f"stop strings must be a list of non-empty texts, not {stops!r}")
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=1)
        self._held = ""
        self.met = False

    @property
    def held(self) -> str:
        """The text held back."""
        return self._held

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is free to go, and whether a stop string was met; from then on nothing is released."""
        if self.met:
            return "", True
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.met, self._held = True, ""
            return text[: min(found)[1]], True
        held = self._possible_beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """The text held back, where the whole text ended without a stop string."""
        text, self._held = self._held, ""
        return text

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
