"""Tokenizers of Hugging Face ``tokenizer.json`` files, such as the 20B vocabulary of RWKV-4 Pile models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkv_edge.errors import MissingDependencyError, TokenizerError
from rwkv_edge.tokenizers.base import Tokenizer, check_token, utf8_from_text

END_OF_TEXT = "<|endoftext|>"
"""Text of the special token that ends a text in the 20B vocabulary (id 0 there)."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer in the ``tokenizer.json`` at ``path``, run by the package `tokenizers` (extra 'hf').

    `encode` adds no special tokens around the text (a text is often the continuation of a state), but the text of a
    special token inside it becomes that token, as in the `rwkv` package. How a token becomes bytes is read from the
    file's decoder: byte-level (GPT-2's byte alphabet) or SentencePiece style (``▁`` is a space, ``<0xNN>`` a byte).
    The space that SentencePiece puts before a text is kept when decoding: after a prompt it is real.

    Raises:
        MissingDependencyError: `tokenizers` is not installed.
        TokenizerError: the file is missing or broken, or its decoder is of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        text, data = _read_json(self.path)
        self._tokenizer = _tokenizer_from_text(text, self.path)
        self._added = {
            int(t["id"]): b"" if t["special"] else t["content"].encode() for t in data.get("added_tokens") or ()
        }
        self._to_bytes = _byte_decoder(data, self.path)
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        end = self._tokenizer.token_to_id(END_OF_TEXT)
        self.kind = "huggingface"
        self.vocab_size: int = max(ids, default=-1) + 1
        self.eos_ids = frozenset() if end is None else frozenset({end})

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` without added special tokens, see `Tokenizer.encode`."""
        utf8_from_text(text)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def token_bytes(self, token: int) -> bytes:
        """Bytes of ``token``; b'' for special tokens and unused ids, see `Tokenizer.token_bytes`."""
        check_token(token, self.vocab_size)
        if token in self._added:
            return self._added[token]
        piece = self._tokenizer.id_to_token(token)
        return b"" if piece is None else self._to_bytes(piece)


def _read_json(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(
            f"the tokenizer file {path} cannot be read ({error}); give the model's tokenizer.json"
        ) from error
    if not isinstance(data, dict) or "model" not in data:
        raise TokenizerError(
            f"{path} is not a Hugging Face tokenizer.json (it has no 'model'); give that file of the model"
        )
    return text, data


def _tokenizer_from_text(text: str, path: Path) -> Any:
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise MissingDependencyError("tokenizers", "hf", f"the tokenizer file {path}") from error
    try:
        backend = Backend.from_str(text)
    except Exception as error:  # the package raises nothing more special
        raise TokenizerError(f"{path} is not a valid tokenizer.json ({error}); give that file of the model") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _byte_decoder(data: dict[str, Any], path: Path) -> Callable[[str], bytes]:
    """The function from the text of a token in the file to the bytes that it stands for."""
    decoders = _flat_decoders(data.get("decoder"))
    kinds = [str(decoder.get("type")) for decoder in decoders]
    if "ByteLevel" in kinds:
        return _bytes_from_byte_level
    spaces = [mark for decoder in decoders if (mark := _space_mark(decoder))]
    byte_fallback = "ByteFallback" in kinds
    if not spaces and not byte_fallback:
        raise TokenizerError(
            f"the decoder of {path} must be byte-level or SentencePiece style, not {'+'.join(kinds) or 'absent'}; "
            "no RWKV model is known to use it"
        )

    def bytes_from_piece(piece: str) -> bytes:
        if byte_fallback and (match := _BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        for mark in spaces:
            piece = piece.replace(mark, " ")
        return piece.encode("utf-8")

    return bytes_from_piece


def _flat_decoders(decoder: Any) -> list[dict[str, Any]]:
    """The decoders in the order in which they run."""
    if not isinstance(decoder, dict):
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [leaf for inner in decoder.get("decoders") or () for leaf in _flat_decoders(inner)]


def _space_mark(decoder: dict[str, Any]) -> str:
    """The text that ``decoder`` turns into a space, or ''."""
    if decoder.get("type") == "Metaspace":
        return str(decoder.get("replacement", "▁"))
    if decoder.get("type") == "Replace" and decoder.get("content") == " ":
        return str(decoder["pattern"].get("String", ""))
    return ""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted.

    Source: `bytes_to_unicode` in openai/gpt-2's encoder.py: printable Latin-1 is itself, the other 68 bytes are the
    characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _bytes_from_byte_level(piece: str) -> bytes:
    """Bytes of a byte-level token; one with a character outside the alphabet is its own text, as in `tokenizers`."""
    try:
        return bytes([_BYTE_OF[character] for character in piece])
    except KeyError:
        return piece.encode("utf-8")
