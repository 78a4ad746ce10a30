"""A session together with its tokenizer: what a program needs to turn text into text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_edge.artifact import Artifact
from rwkv_edge.errors import TokenizerError
from rwkv_edge.runtime.session import Session, open_session
from rwkv_edge.tokenizers import Tokenizer, load_tokenizer, tokenizer_for_vocabulary


@dataclass(frozen=True)
class OpenModel:
    """A session and the tokenizer of the same artifact."""

    session: Session[Any]
    tokenizer: Tokenizer

    def prompt_tokens(self, text: str) -> list[int]:
        """The tokens of a prompt; an empty one begins a new text.

        Raises:
            TokenizerError: the text cannot be encoded.
        """
        return self.tokenizer.encode(text) or [self._beginning()]

    def _beginning(self) -> int:
        """What stands before a new text: the end of the one before it, or for bytes a line break."""
        return min(self.tokenizer.eos_ids) if self.tokenizer.eos_ids else self.tokenizer.encode("\n")[0]


def open_model(
    path: str | Path,
    tokenizer: str | None = None,
    *,
    backend: str = "auto",
    providers: Sequence[str] | None = None,
    threads: int = 0,
) -> OpenModel:
    """Open an artifact folder for text.

    Args:
        path: the folder.
        tokenizer: 'world', 'bytes' or a file, instead of the artifact's own.
        backend: see `open_session`, as for the others.
        providers: execution providers.
        threads: compute threads.

    Raises:
        ArtifactError: the artifact is incomplete or damaged.
        TokenizerError: it holds no tokenizer, or the given one does not fit.
        SessionError: the backend cannot open it.
    """
    artifact = Artifact.open(path)
    spec, entry = artifact.manifest.spec, artifact.manifest.tokenizer
    if tokenizer is not None:
        found = tokenizer_for_vocabulary(spec.vocab_size, tokenizer)
    elif entry is None:
        raise TokenizerError(f"{path} was exported without a tokenizer; give one with --tokenizer NAME|FILE")
    else:
        if entry["file"] is not None:
            artifact.check_content(entry["file"])  # first: a damaged vocabulary may read as another one
        found = load_tokenizer(artifact.path, entry)
    return OpenModel(open_session(path, backend, providers, threads), found)
