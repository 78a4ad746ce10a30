"""Which tokenizer a model needs, and the tokenizer inside an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_edge.errors import ArtifactError, TokenizerError
from rwkv_edge.tokenizers.base import Tokenizer
from rwkv_edge.tokenizers.bytes import ByteTokenizer
from rwkv_edge.tokenizers.huggingface import HuggingFaceTokenizer
from rwkv_edge.tokenizers.world import WorldTokenizer

WORLD_SIZES = range(65530, 65537)
"""Vocabulary sizes of World models: ids up to 65529, usually padded to 65536."""

PILE_SIZES = range(50277, 50305)
"""Vocabulary sizes of models with the 20B (GPT-NeoX) vocabulary: 50277, sometimes padded to 50304."""


def tokenizer_for_vocabulary(vocab_size: int, choice: str | None = None) -> Tokenizer:
    """The tokenizer of a model with ``vocab_size`` rows of embedding.

    ``choice`` is 'world', 'bytes', a ``tokenizer.json`` or a World vocabulary (``.txt``); None picks by ``vocab_size``.

    Raises:
        TokenizerError: no tokenizer is known for the size, the file cannot be read, or it has more ids than the model.
        MissingDependencyError: the package that runs the tokenizer is not installed.
    """
    tokenizer = _by_size(vocab_size) if choice is None else _by_name(choice)
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"the tokenizer '{choice or tokenizer.kind}' has ids up to {tokenizer.vocab_size - 1}, but the model's "
            f"vocabulary has {vocab_size}; give the model's own with --tokenizer FILE"
        )
    return tokenizer


def _by_size(vocab_size: int) -> Tokenizer:
    if vocab_size == 256:
        return ByteTokenizer()
    if vocab_size in WORLD_SIZES:
        return WorldTokenizer()
    if vocab_size in PILE_SIZES:
        raise TokenizerError(
            f"a vocabulary of {vocab_size} is the 20B (GPT-NeoX) one, which is a file of its own; "
            "give its tokenizer.json with --tokenizer FILE"
        )
    raise TokenizerError(
        f"the tokenizer is known for vocabularies of 256 (bytes) and 65536 (World), not {vocab_size}; "
        "give the model's tokenizer.json with --tokenizer FILE"
    )


def _by_name(choice: str) -> Tokenizer:
    if choice == "world":
        return WorldTokenizer()
    if choice == "bytes":
        return ByteTokenizer()
    path = Path(choice)
    if not path.is_file():
        raise TokenizerError(
            f"a tokenizer is 'world', 'bytes' or a tokenizer.json file, but there is no file '{choice}'"
        )
    return WorldTokenizer(path) if path.suffix == ".txt" else HuggingFaceTokenizer(path)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Copy the file that ``tokenizer`` needs into the artifact ``folder`` and return its entry of the manifest.

    The entry is ``{"kind": …, "file": name in the folder or None}``, which `load_tokenizer` reads.

    Raises:
        ArtifactError: the file cannot be copied.
        TokenizerError: the tokenizer is of none of the kinds in this package.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return {"kind": tokenizer.kind, "file": None}
    if isinstance(tokenizer, WorldTokenizer):
        source, name = tokenizer.vocabulary, tokenizer.vocabulary.name
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        source, name = tokenizer.path, "tokenizer.json"
    else:
        raise TokenizerError(f"a tokenizer of kind '{tokenizer.kind}' cannot be saved; use world, bytes or huggingface")
    try:
        (folder / name).write_bytes(source.read_bytes())
    except OSError as error:
        raise ArtifactError(f"the tokenizer file {source} cannot be copied into {folder}: {error}") from error
    return {"kind": tokenizer.kind, "file": name}


def load_tokenizer(folder: Path, entry: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `save_tokenizer` put into the artifact ``folder`` with the manifest's ``entry``.

    Raises:
        TokenizerError: the entry is of another form, names a file outside the folder, or the file cannot be read.
        MissingDependencyError: the package that runs the tokenizer is not installed.
    """
    kind, file = (entry.get("kind"), entry.get("file")) if isinstance(entry, Mapping) else (None, None)
    if kind == "bytes":
        return ByteTokenizer()
    if kind not in ("world", "huggingface"):
        raise TokenizerError(
            f"the tokenizer in the manifest must be world, bytes or huggingface, not {entry!r}; export again"
        )
    if not isinstance(file, str) or file in ("", ".", "..") or any(character in file for character in "/\\:\0"):
        raise TokenizerError(
            f"the tokenizer's file in the manifest must be a name in the folder, not {file!r}; export again"
        )
    path = folder / file
    if not path.is_file():
        raise TokenizerError(f"the artifact {folder} lacks its tokenizer file '{file}'; export the model again")
    return WorldTokenizer(path) if kind == "world" else HuggingFaceTokenizer(path)
