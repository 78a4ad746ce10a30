"""The byte tokenizer: a token is one byte of UTF-8."""

from __future__ import annotations

from rwkv_edge.tokenizers.base import Tokenizer, check_token, utf8_from_text


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of the text in UTF-8; no id ends a text."""

    def __init__(self) -> None:
        self.kind = "bytes"
        self.vocab_size = 256
        self.eos_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        """Bytes of ``text`` in UTF-8, see `Tokenizer.encode`."""
        return list(utf8_from_text(text))

    def token_bytes(self, token: int) -> bytes:
        """The one byte that ``token`` is, see `Tokenizer.token_bytes`."""
        check_token(token, self.vocab_size)
        return bytes([token])
