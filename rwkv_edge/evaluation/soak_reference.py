"""A float64 reference in a process of its own: its memory and its torch stay out of what is measured.

The processes exchange pickles over the child's standard input and output. The child ends with its parent, even when
that is killed: its input ends then.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from rwkv_edge.errors import MissingDependencyError, RwkvEdgeError, VerificationError
from rwkv_edge.spec import ModelSpec

SEQUENCE = 256  # tokens that torch gets at once; measured, longer sequences are no faster

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class ReferenceSource:
    """Where the reference's weights come from: a checkpoint, and the adapter that was merged at export."""

    checkpoint: Path
    lora: Path | None = None
    lora_alpha: float | None = None


class Reference:
    """Eager torch in float64, fed the tokens that the artifact was fed."""

    def __init__(self, source: ReferenceSource, spec: ModelSpec, state: Mapping[str, np.ndarray], threads: int) -> None:
        """Start the process.

        Args:
            source: its weights.
            spec: of the artifact, which must be of the same model.
            state: to begin with, as `Session.export_state` gives it, or float64.
            threads: of torch; 0 for its own choice.

        Raises:
            VerificationError: the checkpoint cannot be read, or is another model.
            MissingDependencyError: torch is not installed.
        """
        if importlib.util.find_spec("torch") is None:
            raise MissingDependencyError("torch", "export", "a float64 reference")
        command = [sys.executable, "-m", "rwkv_edge.evaluation.soak_reference"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            self._ask((source, spec, dict(state), threads))
        except BaseException:
            self.close()
            raise

    def feed(self, tokens: np.ndarray) -> tuple[np.ndarray, Arrays]:
        """Feed tokens [T]; returns the logits [V] after the last and the state [1, …], in float64.

        Raises:
            VerificationError: the process failed.
        """
        logits, state = self._ask(np.asarray(tokens, np.int64))
        return logits, state

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()

    def _ask(self, question: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        try:
            _send(self._process.stdin, question)
            failure, answer = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise VerificationError("the process of the float64 reference ended; is there enough memory?") from error
        if failure:
            raise VerificationError(failure)
        return answer


def _send(pipe: IO[bytes], value: Any) -> None:
    pickle.dump(value, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def _serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    """Open the model, then answer until the questions end."""
    import torch

    from rwkv_edge.checkpoints.adapters import open_merged
    from rwkv_edge.evaluation.parity import check_same_model
    from rwkv_edge.models.torch_ops import TorchModel
    from rwkv_edge.models.versions import model_from_checkpoint

    source, spec, arrays, threads = pickle.load(questions)
    if threads:
        torch.set_num_threads(threads)
    try:
        model = TorchModel(
            model_from_checkpoint(open_merged(source.checkpoint, source.lora, source.lora_alpha)), torch.float64
        )
        check_same_model(spec, model.spec)
    except RwkvEdgeError as error:
        _send(answers, (str(error), None))
        return
    state = model.state_from_arrays(arrays)
    _send(answers, (None, None))
    while True:
        tokens = pickle.load(questions)
        for start in range(0, len(tokens), SEQUENCE):
            logits, state = model.forward(tokens[None, start : start + SEQUENCE], state)
        _send(answers, (None, (logits[0].numpy(), {name: tensor.numpy() for name, tensor in state.items()})))


def main() -> None:
    """The child: what is printed goes to standard error, since standard output carries the answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(EOFError, BrokenPipeError):
        _serve(sys.stdin.buffer, answers)
    with contextlib.suppress(BrokenPipeError):
        answers.close()


if __name__ == "__main__":
    main()
