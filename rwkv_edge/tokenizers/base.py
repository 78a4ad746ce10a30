"""What every tokenizer can do."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Protocol

from rwkv_edge.errors import TokenizerError


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        kind: 'world', 'bytes' or 'huggingface'.
        vocab_size: one more than the largest id that `encode` can return.
        eos_ids: ids that end a text, where generation stops unless told otherwise.
    """

    kind: str
    vocab_size: int
    eos_ids: frozenset[int]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; an empty list for an empty text.

        Raises:
            TokenizerError: the text holds a lone surrogate, which UTF-8 cannot express.
        """
        raise NotImplementedError

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that ``token`` stands for, possibly part of a character; b'' for special and unused ids.

        Raises:
            TokenizerError: the id is not in [0, vocab_size).
        """
        raise NotImplementedError

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the joined bytes of ``tokens``; each invalid UTF-8 sequence becomes U+FFFD.

        Raises:
            TokenizerError: an id is not in [0, vocab_size).
        """
        return b"".join(self.token_bytes(token) for token in tokens).decode("utf-8", errors="replace")


def utf8_from_text(text: str) -> bytes:
    """UTF-8 bytes of ``text``.

    Raises:
        TokenizerError: the text holds a lone surrogate.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text must be valid Unicode, but character {error.start} is the lone surrogate "
            f"U+{ord(text[error.start]):04X}; decode the input with errors='replace' first"
        ) from error


def check_token(token: int, vocab_size: int) -> None:
    """Raise `TokenizerError` unless ``token`` is in [0, vocab_size)."""
    if not 0 <= token < vocab_size:
        raise TokenizerError(
            f"token ids of this tokenizer are 0 to {vocab_size - 1}, not {token}; use the tokenizer of the model"
        )
