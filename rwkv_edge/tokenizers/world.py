"""The RWKV World tokenizer: greedy longest match over UTF-8 bytes.

Source: ``rwkv_vocab_v20230424.txt`` of BlinkDL/RWKV-LM, 65,529 tokens with ids 1 to 65529; id 0 ends a text. The Rust
package ``pyrwkv-tokenizer`` encodes and ships that file. Its ``decode`` panics on bytes that end inside a character and
its loader skips lines that it cannot read, so decoding and checking of the file are done here.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from rwkv_edge.errors import TokenizerError
from rwkv_edge.tokenizers.base import Tokenizer, check_token, utf8_from_text

VOCABULARY_FILE = "rwkv_vocab_v20230424.txt"
"""File name of the World vocabulary in `pyrwkv-tokenizer` and in artifacts."""

END_OF_TEXT = 0
"""Id that separates documents in the training data of World models; it has no line in the vocabulary."""

_LITERAL_ERRORS = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError)  # what ast.literal_eval may raise

_NOT_INSTALLED = "the World tokenizer needs the package 'pyrwkv-tokenizer': pip install pyrwkv-tokenizer"


class WorldTokenizer(Tokenizer):
    """World vocabulary; ``vocabulary`` is a file in its format, by default the one in `pyrwkv-tokenizer`.

    The file is read and checked at once (about 0.1 s); the encoder is built at the first `encode` (about 0.6 s).

    Raises:
        TokenizerError: the file is missing or a line of it cannot be read; no file is given and `pyrwkv-tokenizer`, a
            dependency of rwkv-edge, is not installed (with a file, only `encode` needs it).
    """

    def __init__(self, vocabulary: Path | None = None) -> None:
        self.vocabulary = _bundled_vocabulary() if vocabulary is None else Path(vocabulary)
        self._bytes = read_vocabulary(self.vocabulary)
        self._encoder: Any = None
        self.kind = "world"
        self.vocab_size = len(self._bytes)
        self.eos_ids = frozenset({END_OF_TEXT})

    def encode(self, text: str) -> list[int]:
        """Ids of the longest tokens that match from left to right, see `Tokenizer.encode`."""
        utf8_from_text(text)
        if self._encoder is None:
            self._encoder = self._new_encoder()
        return list(self._encoder.encode(text))

    def token_bytes(self, token: int) -> bytes:
        """Bytes of ``token``; b'' for 0 and for ids without a line, see `Tokenizer.token_bytes`."""
        check_token(token, self.vocab_size)
        return self._bytes[token]

    def _new_encoder(self) -> Any:
        try:
            package = importlib.import_module("pyrwkv_tokenizer")
        except ImportError as error:
            raise TokenizerError(_NOT_INSTALLED) from error
        try:
            encoder = package.WorldTokenizer(str(self.vocabulary))
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # how a Rust extension fails: no Exception, by design
                raise
            raise TokenizerError(
                f"pyrwkv-tokenizer cannot read the World vocabulary {self.vocabulary}; take the original file"
            ) from error
        if encoder.vocab_size() != sum(map(bool, self._bytes)) + 1:  # it counts id 0
            raise TokenizerError(
                f"pyrwkv-tokenizer skips lines of the vocabulary {self.vocabulary}; update the package"
            )
        return encoder


def read_vocabulary(path: Path) -> list[bytes]:
    """Bytes of every token by id, b'' for ids without a line.

    Each line is ``id literal length``: a Python str or bytes literal and its number of UTF-8 bytes.

    Raises:
        TokenizerError: the file or a line cannot be read, an id or a token comes twice, or one of the 256 bytes has no
            token (the encoder would drop the text from there on).
    """
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")  # not splitlines: tokens hold U+2028 and the like
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"the World vocabulary {path} cannot be read ({error}); export the model again") from error
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(lines, start=1):
        if line := line.rstrip("\r"):
            try:
                token, value = _token_from_line(line)
            except _LITERAL_ERRORS as error:
                raise TokenizerError(
                    f"line {number} of the vocabulary {path} is not 'id literal length': {error}"
                ) from error
            if token in tokens:
                raise TokenizerError(f"line {number} of the vocabulary {path} defines id {token} again")
            tokens[token] = value
    _check_complete(tokens, path)
    return [tokens.get(token, b"") for token in range(max(tokens) + 1)]


def _token_from_line(line: str) -> tuple[int, bytes]:
    """Id and bytes of one line; raises one of _LITERAL_ERRORS."""
    head, rest = line.split(" ", 1)
    literal, length = rest.rsplit(" ", 1)
    token = int(head)
    quote = literal[:1]
    if quote in ("'", '"') and literal.find(quote, 1) == len(literal) - 1 and "\\" not in literal:
        value = literal[1:-1].encode("utf-8")  # 98% of the lines, 20 times faster than literal_eval
    else:
        parsed = ast.literal_eval(literal)
        value = parsed.encode("utf-8") if isinstance(parsed, str) else parsed
    if not isinstance(value, bytes) or len(value) != int(length) or not value:
        raise ValueError(f"{literal} is not a string of {length} bytes")
    if not 0 < token <= 0xFFFF:  # ids are 16-bit in every World model and in the encoder
        raise ValueError(f"the id {token} is not from 1 to 65535")
    return token, value


def _check_complete(tokens: dict[int, bytes], path: Path) -> None:
    values = set(tokens.values())
    if len(values) != len(tokens):
        raise TokenizerError(
            f"the vocabulary {path} has {len(tokens) - len(values)} tokens twice; take the original file"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in values]
    if missing:
        raise TokenizerError(
            f"the vocabulary {path} needs a token for each of the 256 bytes, but {len(missing)} have none "
            f"(first 0x{missing[0]:02X}); take the original file"
        )


def _bundled_vocabulary() -> Path:
    """The vocabulary file inside the package `pyrwkv-tokenizer`, which is not imported for it."""
    package = importlib.util.find_spec("pyrwkv_tokenizer")
    if package is None or not package.submodule_search_locations:
        raise TokenizerError(_NOT_INSTALLED)
    return Path(package.submodule_search_locations[0]) / VOCABULARY_FILE
