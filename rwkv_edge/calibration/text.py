"""Windows of tokens from several places of several texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rwkv_edge.errors import InputError
from rwkv_edge.tokenizers import Tokenizer

PIECE = 1 << 20  # characters encoded at a time, so that a text need not fit into memory as a list of tokens
DEFAULT_SAMPLES = 64


@dataclass(frozen=True)
class Text:
    """A text to calibrate on, and what it is called."""

    name: str
    content: str

    def to_json(self, tokens: int) -> dict[str, Any]:
        """What a calibration tells about it."""
        data = self.content.encode("utf-8")
        return {
            "name": self.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "tokens": tokens,
        }  # fmt: skip


@dataclass(frozen=True)
class WindowOptions:
    """Which parts of the texts are fed.

    Attributes:
        samples: windows; None for 64, or fewer where the texts are too short for so many.
        length: tokens that are recorded in each.
        warmup: tokens before them, from an empty state, that only build the state up.
        seed: of the places.
    """

    samples: int | None = None
    length: int = 512
    warmup: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise InputError(f"there must be at least one sample, not {self.samples}")
        if self.length < 2 or self.warmup < 0:
            raise InputError(f"a sample must have at least 2 tokens after its warm-up, not {self.length}")


def tokens_of(text: Text, tokenizer: Tokenizer) -> np.ndarray:
    """All tokens, int32."""
    pieces = (text.content[at : at + PIECE] for at in range(0, len(text.content), PIECE))
    return np.concatenate([np.empty(0, np.int32), *(np.asarray(tokenizer.encode(p), np.int32) for p in pieces)])


def windows_of(streams: Sequence[np.ndarray], options: WindowOptions, multiple: int = 1) -> np.ndarray:
    """Windows [S, warmup + length] int32, spread evenly over the texts, each at a random place of its share.

    A window lies within one text; none overlaps another.

    Args:
        streams: tokens of each text.
        options: which.
        multiple: S must be a multiple of it, the number of streams that are fed at once.

    Raises:
        InputError: the texts are too short.
    """
    span = options.warmup + options.length
    room = [len(stream) // span for stream in streams]  # windows that fit into each
    fitting = sum(room) // multiple * multiple
    if fitting == 0:
        longest = max((len(stream) for stream in streams), default=0)
        raise InputError(
            f"the text is too short: its {longest} tokens hold no window of {options.warmup} + {options.length} tokens"
            + (f" for each of {multiple} streams" if multiple > 1 else "")
            + "; give a longer text or a smaller --length"
        )
    wanted = min(DEFAULT_SAMPLES, fitting) if options.samples is None else options.samples
    wanted = -(-wanted // multiple) * multiple
    if wanted > fitting:
        raise InputError(
            f"the texts hold {fitting} windows of {options.warmup} + {options.length} tokens, not {wanted}; "
            "give more text, fewer --samples or a smaller --length"
        )
    random = np.random.default_rng(options.seed)
    windows = []
    for stream, count in zip(streams, _shares(room, wanted), strict=True):
        slot = len(stream) // max(count, 1)
        starts = np.arange(count) * slot + random.integers(0, slot - span + 1, count)
        windows += [stream[start : start + span] for start in starts]
    order = random.permutation(len(windows))  # the texts take turns, so that a part of the windows has some of each
    return np.stack([windows[i] for i in order]).astype(np.int32)


def _shares(room: Sequence[int], wanted: int) -> list[int]:
    """How many windows each text gives: in proportion to its length, at most what fits."""
    total = sum(room)
    shares = [wanted * n // total for n in room]
    by_rest = sorted(range(len(room)), key=lambda i: (-(wanted * room[i] % total), i))
    for i in by_rest[: wanted - sum(shares)]:
        shares[i] += 1
    return shares
