"""LAMBADA: how often and how well a model says the last word of a passage.

The convention is that of lm-evaluation-harness' task ``lambada_openai`` (lm_eval/tasks/lambada/lambada_openai.yaml and
``TemplateLM._encode_pair`` in lm_eval/api/model.py), whose data is OpenAI's variant of the test set:

- The target is a space and what follows the last space of ``text``; the context is what is before that space.
- Context and target are encoded together and the context alone; the target's tokens are what the first has past the
  length of the second. (Trailing white space of the context goes over to the target first.)
- Accuracy: the share of passages in which every token of the target is the most likely one, each after the context and
  the target's tokens before it.
- Perplexity: exp of the mean over passages of −ln p of the whole target. It is per word, not per token.

Nothing is put before the context: the state is the initial one. The harness does the same for models without a
beginning-of-text token. BlinkDL's own evaluation feeds token 0 first; ``begin`` does that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rwkv_edge.errors import InputError
from rwkv_edge.evaluation.eval_windows import Batching, check_finite, parts_of_rows
from rwkv_edge.evaluation.perplexity import token_losses
from rwkv_edge.runtime.session import Session
from rwkv_edge.tokenizers import Tokenizer


@dataclass(frozen=True)
class Passage:
    """Tokens of a passage, of which those from ``first`` on are the target."""

    tokens: tuple[int, ...]
    first: int

    @property
    def unscored(self) -> int:
        """Tokens that are fed before the one whose logits predict the target's first."""
        return self.first - 1


@dataclass(frozen=True)
class LambadaScore:
    """Of a model on the passages of a file.

    Attributes:
        passages: how many.
        accuracy: share of passages whose target is said greedily.
        accuracy_error: its standard error; None for one passage.
        perplexity: of the target words.
        perplexity_error: its standard error.
    """

    passages: int
    accuracy: float
    accuracy_error: float | None
    perplexity: float
    perplexity_error: float | None


def passages_from_jsonl(
    text: str, tokenizer: Tokenizer, name: str, samples: int | None = None, begin: int | None = None
) -> list[Passage]:
    """The passages of JSON lines with a field ``text``, encoded as the module says.

    Args:
        text: of the file.
        tokenizer: the model's.
        name: of the file, for messages.
        samples: how many passages, from the first on; None for all.
        begin: a token to feed first, or None.

    Raises:
        InputError: a line is no such object, or its text has no context; or there are none.
    """
    found: list[Passage] = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may hold U+2028
        if samples is not None and len(found) == samples:
            break
        if line.strip():
            found.append(_passage(_text_of(line, name, number), tokenizer, f"line {number} of {name}", begin))
    if not found:
        raise InputError(f'{name} has no passages; LAMBADA is JSON lines of {{"text": "…"}}')
    return found


def _text_of(line: str, name: str, number: int) -> str:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"line {number} of {name} is not JSON ({error}); LAMBADA is JSON lines") from error
    text = data.get("text") if isinstance(data, dict) else None
    if not isinstance(text, str):
        raise InputError(f"line {number} of {name} has no field 'text' with a string; take LAMBADA's OpenAI variant")
    return text


def _passage(text: str, tokenizer: Tokenizer, place: str, begin: int | None) -> Passage:
    context, space, word = text.rpartition(" ")
    kept = context.rstrip()
    target = context[len(kept) :] + space + word
    whole = tokenizer.encode(kept + target)
    start = len(tokenizer.encode(kept))
    if not start and begin is None:
        raise InputError(f"{place} has no context before its last word; remove the line")
    if len(whole) <= start:
        raise InputError(f"{place} has no last word of its own tokens; remove the line")
    head = () if begin is None else (begin,)
    return Passage((*head, *whole), len(head) + start)


def score_lambada(
    session: Session[Any],
    passages: Sequence[Passage],
    choice: Batching,
    chunks: Sequence[int],
    progress: Callable[[int], None],
) -> LambadaScore:
    """Score the passages, in batches of similar lengths.

    Args:
        session: the model.
        passages: at least one.
        choice: rows of a batch, and tokens whose logits are held at once.
        chunks: lengths of the graphs that score.
        progress: told of the passages done.

    Raises:
        VerificationError: the session gives logits that are not finite.
    """
    order = sorted(range(len(passages)), key=lambda i: (passages[i].first, len(passages[i].tokens)))
    losses, hits = np.empty(len(passages)), np.empty(len(passages), np.bool_)
    for at in range(0, len(order), choice.rows):
        batch = order[at : at + choice.rows]
        losses[batch], hits[batch] = _batch([passages[i] for i in batch], session, choice, chunks)
        progress(len(batch))
    perplexity = math.exp(min(float(losses.mean()), 700.0))  # what a float holds: JSON has no infinity
    error = _error_of_mean(losses)
    return LambadaScore(
        passages=len(passages),
        accuracy=float(hits.mean()),
        accuracy_error=_error_of_mean(hits.astype(np.float64)),
        perplexity=perplexity,
        perplexity_error=None if error is None else perplexity * error,
    )


def _batch(
    batch: Sequence[Passage], session: Session[Any], choice: Batching, chunks: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """−ln p [R] of the targets, and whether each is the greedy choice [R].

    Shorter passages are padded at the end, where nothing is scored.
    """
    tokens = np.zeros((len(batch), max(len(p.tokens) for p in batch)), np.int64)
    for row, passage in enumerate(batch):
        tokens[row, : len(passage.tokens)] = passage.tokens
    losses, hits = np.zeros(len(batch)), np.ones(len(batch), np.bool_)
    unscored = min(p.unscored for p in batch)
    for at, (logits,) in parts_of_rows([session], tokens[:, :-1], unscored, choice, chunks):
        for row, passage in enumerate(batch):
            part = slice(max(at, passage.unscored), min(at + logits.shape[1], len(passage.tokens) - 1))
            if part.start < part.stop:
                found = logits[row, part.start - at : part.stop - at]
                check_finite([found], part.start)
                targets = tokens[row, part.start + 1 : part.stop + 1]
                losses[row] += token_losses(found, targets).sum()
                hits[row] &= bool((found.argmax(-1) == targets).all())
    return losses, hits


def _error_of_mean(values: np.ndarray) -> float | None:
    return None if len(values) < 2 else float(values.std(ddof=1) / math.sqrt(len(values)))


def lambada_lines(score: LambadaScore) -> list[str]:
    """For a terminal."""
    accuracy = "" if score.accuracy_error is None else f" ± {100 * score.accuracy_error:.2g}"
    perplexity = "" if score.perplexity_error is None else f" ± {score.perplexity_error:.2g}"
    return [
        f"  accuracy       {100 * score.accuracy:.2f}{accuracy} %",
        f"  perplexity     {score.perplexity:.4f}{perplexity} per word",
    ]
