"""`PIPELINE` of the `rwkv` package: text to text with a model that has `forward`.

Source of the interface and of the order of sampling: `rwkv.utils` 0.8.32. With the same seed of `numpy.random`, the
same tokens are drawn, but for the last bits of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_edge.compat.tensors import array_of
from rwkv_edge.errors import InputError, SessionError
from rwkv_edge.runtime.sampling import kept_tokens
from rwkv_edge.tokenizers import HuggingFaceTokenizer, Tokenizer, WorldTokenizer

WORLD = "rwkv_vocab_v20230424"
UNFINISHED = "\ufffd"  # what `PIPELINE.decode` gives for bytes that are no text (yet)
_SPARED = " \t0123456789"  # parts of it are not counted by the frequency penalty


class PIPELINE_ARGS:
    """How to sample, and where to stop."""

    def __init__(
        self,
        temperature: float = 1.0,
        top_p: float = 0.85,
        top_k: int = 0,
        alpha_frequency: float = 0.2,
        alpha_presence: float = 0.2,
        alpha_decay: float = 0.996,
        token_ban: Sequence[int] = (),
        token_stop: Sequence[int] = (),
        chunk_len: int = 256,
    ) -> None:
        """Keep the arguments.

        Args:
            temperature: 0 takes the most probable token.
            top_p: keep the most probable tokens that together reach this probability.
            top_k: keep so many; 0 keeps all.
            alpha_frequency: subtracted from a token's logit as often as it was drawn.
            alpha_presence: subtracted from the logits of tokens that were drawn.
            alpha_decay: factor on those counts after each token.
            token_ban: never drawn.
            token_stop: end the text, and do not belong to it.
            chunk_len: tokens of the prompt that are fed at once.
        """
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.alpha_frequency = alpha_frequency
        self.alpha_presence = alpha_presence
        self.alpha_decay = alpha_decay
        self.token_ban = list(token_ban)
        self.token_stop = list(token_stop)
        self.chunk_len = chunk_len


class PIPELINE:
    """A model and a tokenizer."""

    def __init__(self, model: Any, WORD_NAME: str) -> None:
        """Open the tokenizer.

        Args:
            model: an `RWKV`, or whatever has its `forward`.
            WORD_NAME: 'rwkv_vocab_v20230424', or the path of a tokenizer.json ('20B_tokenizer.json').

        Raises:
            TokenizerError: the file is not there or not a tokenizer.
            InputError: 'cl100k_base', which no RWKV model needs.
        """
        if WORD_NAME == "cl100k_base":
            raise InputError(f"the tokenizer 'cl100k_base' is not supported; use '{WORLD}' or a tokenizer.json")
        self.model = model
        self.tokenizer: Tokenizer = WorldTokenizer() if WORD_NAME == WORLD else HuggingFaceTokenizer(Path(WORD_NAME))

    def refine_context(self, context: str) -> str:
        """A line break, then the lines that are not empty, without white space around them."""
        lines = (line.strip().strip("\u3000") for line in context.strip().split("\n"))
        return "\n" + "\n".join(line for line in lines if line).strip()

    def encode(self, x: str) -> list[int]:
        """The tokens of a text."""
        return self.tokenizer.encode(x)

    def decode(self, x: Iterable[int]) -> str:
        """The text of tokens; World tokens that are no text as a whole, or hold token 0, give U+FFFD."""
        tokens = [int(token) for token in x]
        if self.tokenizer.kind != "world":
            return self.tokenizer.decode(tokens)
        pieces = [self.tokenizer.token_bytes(t) if t < self.tokenizer.vocab_size else b"" for t in tokens]
        try:
            return b"".join(pieces).decode() if all(pieces) else UNFINISHED
        except UnicodeDecodeError:
            return UNFINISHED

    def sample_logits(self, logits: Any, temperature: float = 1.0, top_p: float = 0.85, top_k: int = 0) -> int:
        """A token drawn with `numpy.random`; `numpy.random.seed` makes it repeatable.

        Raises:
            InputError: logits that are not one row [V].
            SessionError: they hold NaN or +inf, or all are -inf.
        """
        if temperature == 0:
            temperature, top_p = 1.0, 0
        scores = array_of(logits)
        if scores.ndim != 1 or not scores.size:
            raise InputError(f"logits must be one row [V], not of shape {list(scores.shape)}")
        if not np.isfinite(scores.max()):
            raise SessionError("logits must be finite or -inf, but hold NaN or +inf, or every token is banned")
        weights = np.exp(scores - scores.max())
        if top_p <= 0:
            ids = np.flatnonzero(weights == 1)
        else:
            kept = kept_tokens(weights, int(top_k), min(float(top_p), 1.0))
            ids = np.arange(len(weights)) if kept is None else kept
        chances = weights[ids].astype(np.float64)
        if temperature != 1.0:
            chances **= 1.0 / temperature
        below = chances.cumsum()
        return int(ids[np.searchsorted(below / below[-1], np.random.random_sample(), side="right")])

    def generate(
        self,
        ctx: str,
        token_count: int = 100,
        args: PIPELINE_ARGS | None = None,
        callback: Callable[[str], object] | None = None,
        state: Any = None,
    ) -> str:
        """Continue a text.

        Args:
            ctx: the text; with a state, what follows it.
            token_count: tokens to draw at most.
            args: how; the defaults of `PIPELINE_ARGS` where None.
            callback: called with every piece of text as it is complete.
            state: from `RWKV.forward`, not changed; None to begin.

        Returns:
            The text after ``ctx``, without a character that was left unfinished.

        Raises:
            InputError: an empty text, or a ``chunk_len`` below 1.
        """
        args = args or PIPELINE_ARGS()
        tokens = self.encode(ctx)
        if token_count > 0 and not tokens:
            raise InputError("ctx must not be empty; begin with '\\n', say")
        if args.chunk_len < 1:
            raise InputError(f"chunk_len must be at least 1, not {args.chunk_len}")
        counts: dict[int, float] = {}
        text, held = "", []
        for _ in range(token_count):
            for start in range(0, len(tokens), args.chunk_len):
                logits, state = self.model.forward(tokens[start : start + args.chunk_len], state)
            token = self._drawn(logits, counts, args)
            if token in args.token_stop:
                break
            self._count(token, counts, args.alpha_decay)
            tokens = [token]
            held.append(token)
            piece = self.decode(held)
            if UNFINISHED not in piece:
                if callback:
                    callback(piece)
                text, held = text + piece, []
        return text

    def _drawn(self, logits: Any, counts: dict[int, float], args: PIPELINE_ARGS) -> int:
        """The next token after bans and penalties."""
        scores = array_of(logits)
        try:
            scores[args.token_ban] = -np.inf
        except IndexError as error:
            raise InputError(f"token_ban names a token outside the vocabulary of {len(scores)}") from error
        for token, count in counts.items():
            scores[token] -= args.alpha_presence + count * args.alpha_frequency
        return self.sample_logits(scores, args.temperature, args.top_p, args.top_k)

    def _count(self, token: int, counts: dict[int, float], decay: float) -> None:
        for known in counts:
            counts[known] *= decay
        counts[token] = counts.get(token, 0.0) + (0 if self.decode([token]) in _SPARED else 1)
