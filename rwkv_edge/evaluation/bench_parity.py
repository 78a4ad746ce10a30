"""Whether a model runs right, before anything is said about its speed.

With the checkpoint at hand, an artifact is compared with it (`rwkv_edge.evaluation.verify`). With or without, it is
held against itself: chunks against steps, a stream in a batch against the stream alone, a state that was taken out and
put back against the one that stayed, and every file against its hash.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rwkv_edge.artifact import Artifact
from rwkv_edge.evaluation.perplexity import log_probabilities
from rwkv_edge.runtime.session import Session, chunk_plan

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2}
"""Largest |difference| relative to the largest |value|, of logits and of each state tensor, by precision."""

QUANTIZED_TOLERANCE = 0.1  # a last bit that differs moves an activation by a whole step of its scale
QUANTIZED_KL = 0.2
"""Nats per token by which a quantized artifact may be from its checkpoint: its quality is for `rwkv-edge eval` to say,
but another model, or a broken one, is nats away."""

RELATIVE = "relative difference"
LEAST_NORMAL = 2.0**-14  # of float16: state tensors below it have no relative precision to speak of there
REPEATED = 24  # tokens that are all the same: the chunk form's weak spot, which random ones do not show
TAIL = 5  # tokens after the chunks
SEED = 11


@dataclass(frozen=True)
class Check:
    """One check: what it is, how far it was off (None where it is only yes or no), and whether that is near enough."""

    name: str
    difference: float | None
    passed: bool
    measure: str = RELATIVE


@dataclass(frozen=True)
class Parity:
    """What was checked before the speed.

    Attributes:
        method: 'self-consistency', 'checkpoint and self-consistency', or 'artifact': the `rwkv` package against one.
        tokens: compared, per stream.
        tolerance: of the differences, which are relative.
        checks: each of them.
    """

    method: str
    tokens: int
    tolerance: float
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether all did."""
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str:
        """The first check that failed, in words."""
        failed = next(check for check in self.checks if not check.passed)
        off = "" if failed.difference is None else f" ({failed.measure} {failed.difference:.2g})"
        return f"{failed.name}{off}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a difference that is not finite becomes null."""
        data = asdict(self) | {"passed": self.passed}
        for check in data["checks"]:
            if check["difference"] is not None and not np.isfinite(check["difference"]):
                check["difference"] = None
        return data

    def to_text(self) -> str:
        """One line."""
        known = [c.difference for c in self.checks if c.difference is not None and c.measure == RELATIVE]
        largest = f", largest relative difference {max(known):.2g} of {self.tolerance:g}" if known else ""
        return f"parity by {self.method}: {len(self.checks)} checks over {self.tokens} tokens{largest}"


def tolerance_of(artifact: Artifact) -> float:
    """By precision and quantization."""
    if artifact.manifest.quantization is not None:
        return QUANTIZED_TOLERANCE
    return TOLERANCE[artifact.manifest.spec.precision]


def self_consistency(artifact: Artifact, session: Session[Any], prompt: int, batch: int, tolerance: float) -> Parity:
    """Hold an open artifact against itself.

    Args:
        artifact: whose files are compared with their hashes.
        session: of the artifact.
        prompt: tokens of the prompts that will be timed: the chunks that they need are checked.
        batch: streams that will be timed.
        tolerance: of relative differences.

    Raises:
        ArtifactError: a file is not the one that was exported.
    """
    artifact.check_content()
    tokens = _tokens(session, prompt, batch)
    checks = [Check("the files are those of the manifest", None, True)]
    finite, *others = _steps_and_chunks(session, tokens, tolerance)
    checks += [finite, *others]
    if finite.passed:  # a state of NaN cannot be put back
        checks.append(_streams(session, tokens[:, : REPEATED + TAIL], tolerance))
        checks += _states(session, tokens[:, :TAIL], tolerance)
    return Parity("self-consistency", tokens.shape[1], tolerance, tuple(checks))


def _tokens(session: Session[Any], prompt: int, batch: int) -> np.ndarray:
    """[B, T]: other ones for every stream; as many as the distinct chunks of the prompt take, and some more."""
    chunks = {length for length in chunk_plan(prompt, session.chunks) if length > 1}
    tokens = np.random.default_rng(SEED).integers(0, session.spec.vocab_size, (batch, sum(chunks) + REPEATED + TAIL))
    tokens[:, TAIL : TAIL + REPEATED] = tokens[:, TAIL : TAIL + 1]
    return tokens


def _steps_and_chunks(session: Session[Any], tokens: np.ndarray, tolerance: float) -> list[Check]:
    """Token by token and in chunks, with the states that both leave."""
    batch = len(tokens)
    stepped, chunked = session.initial_state(batch), session.initial_state(batch)
    logits, finite = np.empty(0, np.float32), True
    for t in range(tokens.shape[1]):
        logits = session.step(tokens[:, t], stepped)
        finite = finite and bool(np.isfinite(logits).all())
    at, by_chunks = 0, logits
    for length in sorted({n for n in chunk_plan(tokens.shape[1], session.chunks) if n > 1}, reverse=True):
        by_chunks = session.prefill(tokens[:, at : at + length], chunked)
        at += length
    if at < tokens.shape[1]:
        by_chunks = session.prefill(tokens[:, at:], chunked)
    alone = session.step(tokens[:, -1], session.initial_state(batch))
    found = [
        Check("all logits are finite", None, finite),
        _near("chunks give the logits of steps", by_chunks, logits, tolerance),
        Check("the logits depend on the state", None, bool(np.abs(alone - logits).max() > 0)),
    ]
    left, expected = session.export_state(chunked), session.export_state(stepped)
    least = LEAST_NORMAL if session.spec.precision == "fp16" else 1e-30
    worst = max(expected, key=lambda name: _relative(left[name], expected[name], least))
    return [*found, _near("chunks leave the state of steps", left[worst], expected[worst], tolerance, least)]


def _streams(session: Session[Any], tokens: np.ndarray, tolerance: float) -> Check:
    """A stream does not notice its neighbours: alone, with others in their places, or, of one, once more."""
    batch = len(tokens)
    together = _after(session, tokens)
    if batch == 1:
        return _near("the same tokens give the same logits again", _after(session, tokens), together, tolerance)
    if session.spec.batch is None:
        alone = np.concatenate([_after(session, tokens[i : i + 1]) for i in (0, batch - 1)])
        return _near("a stream alone is as in the batch", alone, together[[0, -1]], tolerance)
    moved = _after(session, np.roll(tokens, 1, axis=0))
    return _near("a stream is the same in another place of the batch", np.roll(moved, -1, axis=0), together, tolerance)


def _states(session: Session[Any], tokens: np.ndarray, tolerance: float) -> list[Check]:
    """Copies and exports of a state go on as it does."""
    state = session.initial_state(len(tokens))
    session.prefill(tokens, state)
    copied, restored = session.copy_state(state), session.import_state(session.export_state(state))
    expected = session.step(tokens[:, 0], state)
    made: list[tuple[str, Callable[[], np.ndarray]]] = [
        ("a copy of a state goes on as the state", lambda: session.step(tokens[:, 0], copied)),
        ("a state taken out and put back goes on as before", lambda: session.step(tokens[:, 0], restored)),
    ]
    return [_near(name, call(), expected, tolerance) for name, call in made]


def _after(session: Session[Any], tokens: np.ndarray) -> np.ndarray:
    """Logits [B, V] after tokens [B, T], fed one at a time."""
    state = session.initial_state(len(tokens))
    logits = np.empty(0, np.float32)
    for t in range(tokens.shape[1]):
        logits = session.step(tokens[:, t], state)
    return logits


def _near(name: str, found: np.ndarray, expected: np.ndarray, tolerance: float, least: float = 1e-30) -> Check:
    difference = _relative(found, expected, least)
    return Check(name, difference, bool(difference <= tolerance))  # False for NaN


def _relative(found: np.ndarray, expected: np.ndarray, least: float) -> float:
    """Largest |difference| over the largest |expected|; infinite where there is NaN."""
    difference = float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), least))
    return difference if np.isfinite(difference) else float("inf")


def near_prediction(divergence: float, name: str) -> Check:
    """Whether a quantized artifact predicts what the float model does, given the mean KL divergence between them."""
    return Check(name, divergence, bool(divergence <= QUANTIZED_KL), "KL divergence in nats")


def package_parity(
    found: np.ndarray, expected: np.ndarray, artifact: Artifact, tolerance: float, tokens: int
) -> Parity:
    """The `rwkv` package against an artifact that is right, by the logits [1, V] of both after the same tokens."""
    if artifact.manifest.quantization is None:
        check = _near("the package gives the logits of the artifact", found, expected, tolerance)
    else:
        ours, theirs = log_probabilities(expected[0]), log_probabilities(found[0])
        divergence = float((np.exp(theirs) * (theirs - ours)).sum())
        check = near_prediction(divergence, "the package predicts what the artifact does")
    return Parity("artifact", tokens, tolerance, (check,))
