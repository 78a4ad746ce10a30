"""Whether a text was calibrated on: fingerprints of its substrings of 50 bytes.

The length is that of OpenAI's contamination check (GPT-4 technical report, appendix C), about 13 tokens of the World
vocabulary. Bytes, not tokens, so that the answer does not depend on a tokenizer.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

LENGTH = 50
KEPT = 8192  # hashes: 64 KiB
BLOCK = 1 << 20  # bytes hashed at a time

_FACTOR = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64's finalizer (Steele et al. 2014)


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """A sample of the hashes of all substrings of `LENGTH` bytes: those divisible by 2^``shift``.

    Attributes:
        shift: chosen so that about `KEPT` are left.
        hashes: sorted uint64, each once.
    """

    shift: int
    hashes: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "length": LENGTH,
            "shift": self.shift,
            "hashes": base64.b64encode(self.hashes.astype("<u8").tobytes()).decode("ascii"),
        }

    @classmethod
    def from_json(cls, data: Any) -> Fingerprint:
        """What `to_json` wrote.

        Raises:
            ValueError: it is no fingerprint of this form.
        """
        try:
            shift, hashes = int(data["shift"]), base64.b64decode(data["hashes"], validate=True)
            if data["length"] != LENGTH or not 0 <= shift < 64:
                raise ValueError(f"fingerprint of length {data['length']!r}, shift {shift}")
            return cls(shift, np.frombuffer(hashes, "<u8").astype(np.uint64))
        except (KeyError, TypeError) as error:
            raise ValueError(f"a fingerprint lacks {error}") from error

    def share_of(self, text: bytes) -> float:
        """Share of the substrings of ``text`` that the fingerprinted texts have too, from 0 to 1, by the sample.

        A text shorter than `LENGTH` has none: 0.
        """
        found = seen = 0
        for hashes in _hashes(text):
            sampled = hashes[_divisible(hashes, self.shift)]
            seen += len(sampled)
            found += int(np.isin(sampled, self.hashes).sum())
        return found / seen if seen else 0.0


def fingerprint_of(texts: Iterable[bytes]) -> Fingerprint:
    """Of several texts together, in fixed memory."""
    shift, kept = 0, np.empty(0, np.uint64)
    for text in texts:
        for hashes in _hashes(text):
            kept = np.union1d(kept, hashes[_divisible(hashes, shift)])
            while len(kept) > KEPT:
                shift += 1
                kept = kept[_divisible(kept, shift)]
    return Fingerprint(shift, kept)


def _divisible(hashes: np.ndarray, shift: int) -> np.ndarray:
    found: np.ndarray = (hashes & np.uint64((1 << shift) - 1)) == 0
    return found


def _hashes(text: bytes) -> Iterator[np.ndarray]:
    """Hashes of all substrings, block by block: polynomials of their bytes, modulo 2^64, mixed."""
    array = np.frombuffer(text, np.uint8)
    for start in range(0, len(array) - LENGTH + 1, BLOCK):
        part = array[start : start + BLOCK + LENGTH - 1].astype(np.uint64) + np.uint64(1)
        powers = [part]  # powers[i]: of 2^i bytes
        while 1 << len(powers) <= LENGTH:
            powers.append(_joined(powers[-1], powers[-1], 1 << (len(powers) - 1)))
        whole, length = powers[-1], 1 << (len(powers) - 1)
        for i in reversed(range(len(powers) - 1)):
            if LENGTH - length >= 1 << i:
                whole, length = _joined(whole, powers[i], length, 1 << i), length + (1 << i)
        yield _mixed(whole[: len(part) - LENGTH + 1])


def _joined(first: np.ndarray, second: np.ndarray, offset: int, length: int | None = None) -> np.ndarray:
    """Hashes of a substring followed, ``offset`` bytes on, by another of ``length`` bytes."""
    factor = np.uint64(pow(_FACTOR, length or offset, 1 << 64))
    count = min(len(first), len(second) - offset)
    joined: np.ndarray = first[:count] * factor + second[offset : offset + count]
    return joined


def _mixed(hashes: np.ndarray) -> np.ndarray:
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(_MIX[0])
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(_MIX[1])
    mixed: np.ndarray = hashes ^ (hashes >> np.uint64(31))
    return mixed
