"""The whole of `rwkv-edge eval`: open the artifacts, choose the protocol, score, and say how it was done."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_edge.artifact import Artifact
from rwkv_edge.errors import InputError, VerificationError
from rwkv_edge.evaluation.eval_lambada import LambadaScore, lambada_lines, passages_from_jsonl, score_lambada
from rwkv_edge.evaluation.eval_text import (
    Comparison,
    TextScore,
    compare_on_text,
    comparison_lines,
    score_lines,
    score_text,
)
from rwkv_edge.evaluation.eval_windows import batching, windows_of_text
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.open import OpenModel, open_model
from rwkv_edge.runtime.session import Session, checked_batch, open_session

DEFAULT_WINDOW = 1024

Start = Callable[[str, int], Callable[[int], None]]
"""Told of a phase's name and length; returns what is told of progress in it."""

Overlap = Callable[[Artifact, bytes], Sequence[str]]
"""From an artifact and a text in UTF-8 to sentences about what of it the artifact was calibrated on."""


@dataclass(frozen=True)
class EvalOptions:
    """What an evaluation may choose.

    Attributes:
        text: to predict.
        text_name: its file.
        lambada: JSON lines of LAMBADA.
        lambada_name: their file.
        compare: the reference artifact to compare with on ``text``, and to score on ``lambada`` too.
        window: tokens that are fed from the initial state at most; 0 carries the state through the whole text.
        warm_up: tokens of each window before the first that is scored.
        batch: windows at once; None for the choice.
        max_tokens: of the text, from its beginning; None for all.
        samples: passages of LAMBADA, from the first on; None for all.
        begin: feed the end-of-text token before each passage of LAMBADA.
        tokenizer: instead of the artifact's.
        providers: execution providers of ONNX Runtime.
        threads: compute threads.
        backend: that runs the artifacts.
    """

    text: str | None = None
    text_name: str = "text"
    lambada: str | None = None
    lambada_name: str = "lambada"
    compare: Path | None = None
    window: int = DEFAULT_WINDOW
    warm_up: int = 0
    batch: int | None = None
    max_tokens: int | None = None
    samples: int | None = None
    begin: bool = False
    tokenizer: str | None = None
    providers: Sequence[str] = ()
    threads: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.text is None and self.lambada is None:
            raise InputError("there is nothing to evaluate on; give --text FILE, --lambada FILE or both")
        if self.window == 0 and (self.batch or 1) > 1:
            raise InputError(
                "a state that is carried through the text is one stream; leave --batch out, or give a window"
            )


@dataclass(frozen=True)
class Subject:
    """An artifact as it was evaluated; ``quantization`` is its scheme, None for a float one."""

    name: str
    model_hash: str
    version: str
    precision: str
    quantization: str | None
    weight_bytes: int
    backend: str


@dataclass(frozen=True)
class Protocol:
    """How a text was fed; two figures can only be compared where all but ``batch`` and ``logits`` are the same.

    Attributes:
        window: tokens fed from the initial state at most; 0 for all of the text.
        stride: tokens from a window's first scored one to that of the next.
        warm_up: tokens of a window before its first scored one, the one that predicts it not counted.
        windows: how many.
        state: 'reset' to the initial state at every window, or 'carried' through the text.
        initial_state: 'zero', or 'tuned' where the artifact has one.
        batch: windows at once.
        logits: where they come from.
    """

    window: int
    stride: int
    warm_up: int
    windows: int
    state: str
    initial_state: str
    batch: int
    logits: str

    def to_text(self) -> str:
        """One sentence."""
        state = f"beginning with the {self.initial_state} state"
        how = (
            f"one window, {state}, which is carried to the end"
            if self.state == "carried"
            else f"{self.windows} windows of {self.window} tokens, each {state}, stride {self.stride}, "
            + (f"{self.warm_up} tokens of warm-up not scored" if self.warm_up else "no warm-up")
        )
        return f"{how}; every token but the text's first is scored once; {self.logits}, batch {self.batch}"


@dataclass(frozen=True)
class EvalReport:
    """What was found, and how.

    Attributes:
        artifact: what was evaluated.
        reference: what it was compared with.
        text: file, sha256, tokens and bytes of what was predicted.
        protocol: how the text was fed.
        score: of the text.
        comparison: with the reference.
        lambada: file, sha256 and convention, with the scores of the artifact and of the reference.
        warnings: what makes a figure doubtful.
        seconds: of the scoring, both artifacts together.
    """

    artifact: Subject
    reference: Subject | None = None
    text: dict[str, Any] | None = None
    protocol: Protocol | None = None
    score: TextScore | None = None
    comparison: Comparison | None = None
    lambada: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"kind": "evaluation", **asdict(self)}

    def to_text(self) -> str:
        """Some lines for a terminal."""
        lines = [_subject_line(self.artifact)]
        if self.reference:
            lines.append(f"reference {_subject_line(self.reference)}")
        if self.text and self.score and self.protocol:
            lines.append(f"{self.text['file']}: {self.score.tokens} tokens of {self.score.nbytes} bytes predicted")
            lines += [f"  protocol       {self.protocol.to_text()}", *score_lines(self.score)]
        if self.comparison:
            lines += comparison_lines(self.comparison)
        if self.lambada:
            lines.append(f"{self.lambada['file']}: LAMBADA, {self.lambada['convention']}")
            lines += lambada_lines(LambadaScore(**self.lambada["artifact"]))
            if self.lambada["reference"]:
                lines += ["  of the reference", *lambada_lines(LambadaScore(**self.lambada["reference"]))]
        return "\n".join([*lines, *(f"Warning: {warning}" for warning in self.warnings)])


def _subject_line(subject: Subject) -> str:
    scheme = f" {subject.quantization}" if subject.quantization else ""
    return f"{subject.name}: RWKV-{subject.version}, {subject.precision}{scheme}, {subject.backend}"


class _Evaluation:
    """The open artifacts of one evaluation, and what both parts of it need."""

    def __init__(self, artifact: Path, options: EvalOptions) -> None:
        self.options = options
        self._artifact = Artifact.open(artifact)
        other = Artifact.open(options.compare) if options.compare else None
        if other is not None:
            check_same_tokens(self._artifact, other, options.tokenizer)
        self.model: OpenModel = open_model(
            artifact, options.tokenizer, backend=options.backend, providers=options.providers, threads=options.threads
        )
        self.sessions: list[Session[Any]] = [self.model.session]
        try:
            if options.batch is not None:
                checked_batch(options.batch, self.model.session.spec)
            if options.compare:
                self.sessions.append(open_session(options.compare, options.backend, options.providers, options.threads))
        except BaseException:
            self.close()
            raise
        opened = self._opened = [self._artifact, *([other] if other else [])]
        for session in self.sessions:
            if isinstance(session, OrtSession):
                session.keep_chunks()
        self.subjects = [_subject(a, s) for a, s in zip(opened, self.sessions, strict=True)]
        self.chunks = sorted({n for a, s in zip(opened, self.sessions, strict=True) for n in scoring_chunks(a, s)})
        spec = self.model.session.spec
        self.choice = batching(spec.vocab_size, self.chunks, options.batch or spec.batch)

    def close(self) -> None:
        """Close what is open."""
        for session in self.sessions:
            session.close()

    def on_text(self, start: Start, overlap: Overlap | None) -> dict[str, Any]:
        """Fields of the report."""
        options = self.options
        assert options.text is not None
        encoded = self.model.tokenizer.encode(options.text)[: options.max_tokens]
        tokens = np.array(encoded, np.int64)
        _check_vocabulary(tokens, self.model.session.spec.vocab_size)
        windows = windows_of_text(len(tokens), options.window, options.warm_up)
        nbytes = sum(len(self.model.tokenizer.token_bytes(token)) for token in encoded[1:])
        if not nbytes:
            raise InputError(f"the tokens of {options.text_name} stand for no bytes; give a text")
        choice = self.choice if options.window else batching(self.model.session.spec.vocab_size, self.chunks, 1)
        arguments = (tokens, nbytes, windows, choice, self.chunks, start("text", len(tokens) - 1))
        found: dict[str, Any] = {}
        if len(self.sessions) == 1:
            found["score"] = score_text(self.sessions[0], *arguments)
        else:
            found["score"], found["comparison"] = compare_on_text(self.sessions[0], self.sessions[1], *arguments)
        found["text"] = _file_facts(options.text_name, options.text) | {
            "tokens": len(tokens),
            "predicted_bytes": nbytes,
        }
        found["protocol"] = self._protocol(len(windows), choice.rows)
        text = options.text.encode("utf-8")
        found["warnings"] = tuple(line for one in self._opened for line in overlap(one, text)) if overlap else ()
        return found

    def _protocol(self, windows: int, rows: int) -> Protocol:
        options, manifest = self.options, self._artifact.manifest
        logits = f"logits by graphs of {max(self.chunks)} tokens" if self.chunks else "logits by single steps"
        return Protocol(
            window=options.window,
            stride=options.window - options.warm_up,
            warm_up=options.warm_up,
            windows=windows,
            state="reset" if options.window else "carried",
            initial_state="zero" if manifest.initial_state is None else "tuned",
            batch=rows,
            logits=logits,
        )

    def on_lambada(self, start: Start) -> dict[str, Any]:
        """Fields of the report."""
        options, tokenizer = self.options, self.model.tokenizer
        assert options.lambada is not None
        begin = None
        if options.begin:
            if not tokenizer.eos_ids:
                raise InputError(f"the tokenizer '{tokenizer.kind}' has no end-of-text token to begin with")
            begin = min(tokenizer.eos_ids)
        passages = passages_from_jsonl(options.lambada, tokenizer, options.lambada_name, options.samples, begin)
        _check_vocabulary(np.array([max(p.tokens) for p in passages]), self.model.session.spec.vocab_size)
        scores = []
        for number, session in enumerate(self.sessions):
            told = start("LAMBADA of the reference" if number else "LAMBADA", len(passages))
            scores.append(score_lambada(session, passages, self.choice, self.chunks, told))
        first = "after an end-of-text token" if options.begin else "from the initial state"
        return {
            "lambada": {
                **_file_facts(options.lambada_name, options.lambada),
                "convention": f"OpenAI variant, {len(passages)} passages, whole last word, {first}",
                "artifact": asdict(scores[0]),
                "reference": asdict(scores[1]) if len(scores) > 1 else None,
            }
        }


def evaluate(
    artifact: Path,
    options: EvalOptions,
    start: Start | None = None,
    overlap: Overlap | None = None,
) -> EvalReport:
    """Evaluate an artifact on a text, on LAMBADA, or on both; and against another artifact.

    Args:
        artifact: the folder.
        options: on what, and how.
        start: told of the phases.
        overlap: what it says becomes warnings.

    Raises:
        RwkvEdgeError: an artifact or a text cannot be used, or the logits are not finite.
    """
    start = start or (lambda name, length: lambda done: None)
    began = time.perf_counter()
    evaluation = _Evaluation(artifact, options)
    try:
        found: dict[str, Any] = {}
        if options.text is not None:
            found |= evaluation.on_text(start, overlap)
        if options.lambada is not None:
            found |= evaluation.on_lambada(start)
        subjects = evaluation.subjects
        return EvalReport(
            subjects[0],
            subjects[1] if len(subjects) > 1 else None,
            seconds=round(time.perf_counter() - began, 3),
            **found,
        )
    finally:
        evaluation.close()


def check_same_tokens(artifact: Artifact, reference: Artifact, tokenizer: str | None = None) -> None:
    """Whether both predict the same tokens, so that their distributions can be compared.

    Raises:
        VerificationError: their vocabularies or tokenizers differ.
    """
    ours, theirs = artifact.manifest, reference.manifest
    if ours.spec.vocab_size != theirs.spec.vocab_size:
        raise VerificationError(
            f"{artifact.path} has a vocabulary of {ours.spec.vocab_size} tokens and {reference.path} one of "
            f"{theirs.spec.vocab_size}, so their predictions cannot be compared; compare artifacts of one tokenizer"
        )
    if tokenizer is None and ours.tokenizer and theirs.tokenizer and _tokens_of(artifact) != _tokens_of(reference):
        raise VerificationError(
            f"{artifact.path} and {reference.path} have different tokenizers ({ours.tokenizer['kind']}, "
            f"{theirs.tokenizer['kind']}), so their predictions cannot be compared; compare artifacts of one tokenizer"
        )


def _tokens_of(artifact: Artifact) -> tuple[str, str | None]:
    """What decides the meaning of token ids: the kind of tokenizer and the hash of its file."""
    entry = artifact.manifest.tokenizer or {}
    file = entry["file"]
    return str(entry["kind"]), None if file is None else artifact.manifest.files[file].sha256


def scoring_chunks(artifact: Artifact, session: Session[Any]) -> set[int]:
    """Lengths of the graphs by which a session's `score` gives the logits of many tokens at once."""
    if not session.numerics.startswith("onnxruntime"):
        return set()
    return {graph.tokens for graph in artifact.manifest.graphs if graph.kind == "score"}


def _subject(artifact: Artifact, session: Session[Any]) -> Subject:
    manifest = artifact.manifest
    weights = manifest.files.get("weights.bin")
    return Subject(
        name=artifact.path.resolve().name,
        model_hash=manifest.model_hash,
        version=manifest.spec.version,
        precision=manifest.spec.precision,
        quantization=str(manifest.quantization["scheme"]) if manifest.quantization else None,
        weight_bytes=weights.nbytes if weights else 0,
        backend=session.numerics,
    )


def _file_facts(name: str, text: str) -> dict[str, Any]:
    return {"file": name, "sha256": hashlib.sha256(text.encode("utf-8")).hexdigest()}


def _check_vocabulary(tokens: np.ndarray, vocab_size: int) -> None:
    if tokens.size and int(tokens.max()) >= vocab_size:
        raise InputError(
            f"token {int(tokens.max())} is outside the model's vocabulary of {vocab_size}; is it the right tokenizer?"
        )
