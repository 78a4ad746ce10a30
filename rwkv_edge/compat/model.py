"""`RWKV` of the `rwkv` package: a model by the name of its checkpoint and a strategy.

Source of the interface: `rwkv.model` 0.8.32.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from rwkv_edge.artifact import MANIFEST, Artifact
from rwkv_edge.compat.store import stored_artifact
from rwkv_edge.compat.strategy import Strategy, backend_for, strategy_from_text
from rwkv_edge.compat.tensors import State, named_arrays, wrap_for
from rwkv_edge.errors import ArtifactError, CheckpointError, InputError
from rwkv_edge.hub import is_hub_path, local_checkpoint
from rwkv_edge.runtime.session import Session, open_session


class RWKV:
    """A model that is exported on first use.

    Attributes:
        args: ``n_layer``, ``n_embd``, ``n_att``, ``n_ffn``, ``head_size``, ``vocab_size``, ``MODEL_NAME`` and
            ``strategy_string``.
        session: what runs it; see `rwkv_edge.runtime.session.Session`.
    """

    def __init__(
        self,
        model: str | Path,
        strategy: str,
        verbose: bool = True,
        convert_and_save_and_exit: str | None = None,
        *,
        tensors: str | None = None,
        threads: int = 0,
    ) -> None:
        """Open a model.

        Args:
            model: a checkpoint, with or without '.pth', or hf://OWNER/NAME[/FILE] on the hub; or a folder, of Hugging
                Face or of an exported artifact, which a device without torch needs.
            strategy: 'cpu fp32', 'cuda fp16', 'cuda:1 bf16', 'cuda fp16i8' (int8 weights)…; for an artifact, the
                precision that it has. On CUDA, ONNX Runtime's provider runs it; where there is none, our own kernels
                run it on the first GPU.
            verbose: say on standard error when a checkpoint is exported.
            convert_and_save_and_exit: not taken.
            tensors: 'torch' or 'numpy', of what `forward` returns; torch where it is installed, by default.
            threads: compute threads; 0 leaves the choice to the backend.

        Raises:
            InputError: a strategy that cannot be meant.
            CheckpointError: the file is not there, or is no model that can be exported.
            SessionError: the device is not there, or nothing that runs the model on it.
            MissingDependencyError: what exports or runs the model is not installed.
        """
        if convert_and_save_and_exit is not None:
            raise InputError("convert_and_save_and_exit is not needed: models are exported to a cache on first use")
        self._wrap = wrap_for(tensors)
        plan = strategy_from_text(strategy)
        backend = backend_for(plan)
        path = _found(str(model).strip())
        self.session = _opened(path, plan, backend, threads, verbose)
        spec = self.session.spec
        self.args = SimpleNamespace(
            MODEL_NAME=str(path), strategy_string=strategy, n_layer=spec.n_layer, n_embd=spec.n_embd,
            n_att=spec.n_att, n_ffn=spec.n_ffn, head_size=spec.head_size, vocab_size=spec.vocab_size,
        )  # fmt: skip
        self.n_layer, self.n_embd, self.n_head = spec.n_layer, spec.n_embd, spec.n_head
        self.head_size, self.vocab_size = spec.head_size, spec.vocab_size

    def forward(self, tokens: int | Sequence[int], state: Any = None, full_output: bool = False) -> tuple[Any, State]:
        """Feed tokens.

        Args:
            tokens: one, or several.
            state: from an earlier call, or a list of tensors of that form; None to begin. It is not changed.
            full_output: return the logits after every token, where there are several.

        Returns:
            Logits [V] float32 after the last token, or [T, V], and the state after it.

        Raises:
            InputError: no tokens, or one outside the vocabulary.
            StateError: a state of another model, or one that holds NaN.
        """
        ids = _ids(tokens)
        native = self._native(state)
        if len(ids) == 1:
            logits = self.session.step(ids, native)[0]
        elif full_output:
            logits = self.session.score([ids], native)[0]
        else:
            logits = self.session.prefill([ids], native)[0]
        return self._wrap(logits, "float32"), self._state(native)

    def generate_zero_state(self) -> State:
        """The state before the first token."""
        return self._state(self.session.initial_state(1))

    def _state(self, native: Any) -> State:
        return State(self.session, native, self._wrap)

    def _native(self, state: Any) -> Any:
        """A session's state with these values, which may be advanced."""
        if state is None:
            return self.session.initial_state(1)
        native = state.native_for(self.session) if isinstance(state, State) else None
        if native is not None:
            return self.session.copy_state(native)
        return self.session.import_state(named_arrays(state, self.session.spec))

    def __getattr__(self, name: str) -> Any:
        reason = ""
        if name in ("w", "z"):
            reason = ": the weights are in the artifact; who needs them as tensors can read the checkpoint"
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'{reason}")


def _found(name: str) -> Path:
    """The checkpoint that is meant: '.pth' may be left out."""
    if is_hub_path(name):
        return local_checkpoint(name)
    for path in (Path(name + ".pth"), Path(name)):
        try:
            if path.exists():
                return path
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    raise CheckpointError(f"there is neither {name} nor {name}.pth; the model is the path of a checkpoint")


def _opened(path: Path, plan: Strategy, backend: str, threads: int, verbose: bool) -> Session[Any]:
    def tell(line: str) -> None:
        if verbose and sys.stderr is not None:
            sys.stderr.write(f"rwkv-edge: {line}\n")

    def opened(folder: Path) -> Session[Any]:
        providers = plan.providers if backend == "onnxruntime" else None
        return open_session(folder, backend, providers, threads)

    if (path / MANIFEST).is_file():
        precision = Artifact.open(path).manifest.spec.precision
        if precision != plan.precision:
            raise InputError(f"{path} was exported in {precision}; say so in the strategy: '{plan.device} {precision}'")
        return opened(path)
    folder = stored_artifact(path, plan, tell)
    try:
        return opened(folder)
    except ArtifactError as error:
        tell(str(error))
        return opened(stored_artifact(path, plan, tell, again=True))


def _ids(tokens: int | Sequence[int]) -> list[int]:
    try:
        ids = np.asarray(tokens).reshape(-1)
    except (TypeError, ValueError) as error:
        raise InputError(f"tokens are an integer or a list of integers, not {type(tokens).__name__}") from error
    if not ids.size or ids.dtype.kind not in "iu":
        raise InputError(f"tokens are an integer or a list of integers, not {tokens!r}"[:200])
    return [int(token) for token in ids]
