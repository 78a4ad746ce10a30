"""An exported graph against eager torch on the checkpoint, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from rwkv_edge.errors import InputError, VerificationError
from rwkv_edge.evaluation.bench_parity import QUANTIZED_KL
from rwkv_edge.models.torch_ops import TorchModel
from rwkv_edge.runtime.session import Session
from rwkv_edge.spec import ModelSpec

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-2}
"""Largest |difference| of logits and of each state tensor, relative to the largest |reference|, by precision."""

LEAST_NORMAL = 2.0**-14
"""The smallest normal float16: state tensors below it have no relative precision to speak of, nor any effect."""

SAMPLE_TEXT = (
    "The harbour lay still before dawn. A single lamp burned at the end of the pier, where an old man mended his nets "
    'and counted: one, two, three, 42, 1.618. "Who goes there?" he called. Nobody answered; only the water did, '
    "patiently, as it had done for a thousand years. Über den Wolken... 你好, мир! def f(x): return x ** 2\n\n"
)
"""What `verify` feeds where no text is given: prose, digits, punctuation, several scripts, code."""


@dataclass(frozen=True)
class ParityReport:
    """How far an artifact is from its checkpoint.

    Attributes:
        tokens: tokens compared, per stream.
        streams: batch of the comparison; every stream sees other tokens.
        max_abs: largest |difference| of logits.
        relative: ``max_abs`` over the largest |logit| of the reference.
        kl_mean: mean over tokens of KL(reference ‖ artifact) in nats.
        kl_max: the largest of them.
        top1: share of tokens whose most likely next token is the same.
        worst_state: name of the state tensor with the largest relative difference after the last token.
        worst_state_relative: that difference.
        measure: what ``tolerance`` bounds: 'relative', which is ``relative`` and ``worst_state_relative``; or 'kl',
            which is ``kl_mean``: a quantized artifact differs by rounding, and is judged by what it predicts.
        tolerance: the bound.
        passed: whether it is kept, and logits and states are finite.
    """

    tokens: int
    streams: int
    max_abs: float
    relative: float
    kl_mean: float
    kl_max: float
    top1: float
    worst_state: str
    worst_state_relative: float
    measure: str
    tolerance: float
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def to_text(self) -> str:
        """A few lines for a terminal."""
        return (
            f"{'passed' if self.passed else 'FAILED'}: {self.tokens} tokens x {self.streams} streams, {self._bound()}\n"
            f"  logits       max |difference| {self.max_abs:.3g}, relative {self.relative:.3g}\n"
            f"  KL           mean {self.kl_mean:.3g}, max {self.kl_max:.3g} nats per token\n"
            f"  top-1        {100 * self.top1:.2f} % of tokens agree\n"
            f"  worst state  {self.worst_state}: relative {self.worst_state_relative:.3g}"
        )

    def _bound(self) -> str:
        if self.measure == "kl":
            return f"quantized, so judged by its mean KL divergence: at most {self.tolerance:g} nats per token"
        return f"tolerance {self.tolerance:g} (relative)"


def compare_with_reference(
    session: Session[Any],
    reference: TorchModel,
    tokens: np.ndarray,
    tolerance: float | None = None,
    quantized: bool = False,
) -> ParityReport:
    """Feed the same tokens to both, one at a time, each from its initial state.

    Args:
        session: the artifact.
        reference: the checkpoint, in float32 or float64.
        tokens: [B, T] int64.
        tolerance: relative bound; by the session's precision where it is None.
        quantized: whether the weights are; without a ``tolerance`` it is judged by KL divergence.

    Raises:
        VerificationError: artifact and checkpoint have different dimensions.
    """
    check_same_model(session.spec, reference.spec)
    batch, length = tokens.shape
    state = session.initial_state(batch)
    expected_state = reference.state_from_arrays(session.export_state(state))  # a tuned state is the artifact's
    found = np.empty((length, batch, session.spec.vocab_size), np.float32)
    expected = np.empty_like(found)
    for t in range(length):
        found[t] = session.step(tokens[:, t], state)
        logits, expected_state = reference.forward(tokens[:, t : t + 1], expected_state)
        expected[t] = logits.float().numpy()
    least = LEAST_NORMAL if session.spec.precision == "fp16" else 1e-30
    worst = _worst_tensor(session.export_state(state), expected_state, least)
    measure = "kl" if quantized and tolerance is None else "relative"
    if tolerance is None:
        tolerance = QUANTIZED_KL if quantized else TOLERANCE[session.spec.precision]
    return _report(found, expected, worst, measure, tolerance)


def _report(
    found: np.ndarray, expected: np.ndarray, worst: tuple[str, float], measure: str, tolerance: float
) -> ParityReport:
    """Judge logits [T, B, V] and the worst state tensor."""
    max_abs = float(np.abs(found - expected).max())
    relative = max_abs / max(float(np.abs(expected).max()), 1e-30)
    kl = _kl_divergence(expected, found)
    differences = (float(kl.mean()),) if measure == "kl" else (relative, worst[1])
    finite = np.isfinite(relative) and np.isfinite(worst[1])
    return ParityReport(
        tokens=len(found),
        streams=found.shape[1],
        max_abs=max_abs,
        relative=relative,
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        top1=float((found.argmax(-1) == expected.argmax(-1)).mean()),
        worst_state=worst[0],
        worst_state_relative=worst[1],
        measure=measure,
        tolerance=tolerance,
        passed=bool(finite and max(differences) <= tolerance),
    )


def check_same_model(found: ModelSpec, expected: ModelSpec) -> None:
    """Whether an artifact can come from a checkpoint at all.

    Raises:
        VerificationError: a dimension differs; names it.
    """
    for name in ("version", "n_layer", "n_embd", "n_att", "n_ffn", "n_head", "head_size", "vocab_size"):
        if getattr(found, name) != getattr(expected, name):
            raise VerificationError(
                f"the artifact was not exported from this checkpoint: its {name} is {getattr(found, name)}, "
                f"the checkpoint's {getattr(expected, name)}"
            )


def tokens_for_streams(ids: list[int], batch: int, length: int, vocab_size: int) -> np.ndarray:
    """[B, T] int64: ``ids`` repeated to ``length``, each stream beginning one token later.

    Raises:
        InputError: no tokens, or one outside the vocabulary.
    """
    if not ids:
        raise InputError("the text has no tokens to compare")
    if max(ids) >= vocab_size:
        raise InputError(
            f"token {max(ids)} is outside the model's vocabulary of {vocab_size}; is it the right tokenizer?"
        )
    endless = np.resize(np.asarray(ids, np.int64), length + batch)
    return np.stack([endless[b : b + length] for b in range(batch)])


def _worst_tensor(
    found: Mapping[str, np.ndarray], expected: Mapping[str, torch.Tensor], least: float
) -> tuple[str, float]:
    """The state tensor with the largest |difference| relative to its largest |value|, which counts as at least
    ``least``.

    NaN counts as infinite.
    """
    differences = {}
    for name, tensor in expected.items():
        reference = tensor.double().numpy()
        difference = np.abs(found[name] - reference).max() / max(np.abs(reference).max(), least)
        differences[name] = float(difference) if np.isfinite(difference) else float("inf")
    worst = max(differences, key=differences.__getitem__)
    return worst, differences[worst]


def _kl_divergence(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(softmax(expected) ‖ softmax(found)) over the last axis, in nats."""
    p, q = _log_softmax(expected), _log_softmax(found)
    divergence: np.ndarray = (np.exp(p) * (p - q)).sum(-1)
    return divergence


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
