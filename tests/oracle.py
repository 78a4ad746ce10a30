"""The `rwkv` package as the oracle: its model classes on a checkpoint, one token at a time or as a sequence.

The package decides at import, by environment variables, which versions it runs; so its module is loaded once per
choice.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

_SWITCHES = {
    "4-6": {"RWKV_V7_ON": "0"},
    "7": {"RWKV_V7_ON": "1"},
    "7a": {"RWKV_V7_ON": "1", "RWKV_DE_VERSION": "1"},
}


@cache
def _module(switch: str) -> ModuleType:
    pytest.importorskip("rwkv", reason="the rwkv package is not installed")
    found = importlib.util.find_spec("rwkv.model")
    assert found is not None
    assert found.origin is not None
    spec = importlib.util.spec_from_file_location(f"rwkv_oracle_{switch.replace('-', '_')}", found.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with _environment(switch), _quiet():
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _environment(switch: str) -> Any:
    """The package reads its switches when it is imported and when a model is made."""
    before = dict(os.environ)
    os.environ.update({"RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0", "RWKV_DE_VERSION": "0", **_SWITCHES[switch]})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # TorchScript is deprecated, which is that package's concern
        yield


class Oracle:
    """A model of the `rwkv` package on a ``.pth`` file."""

    def __init__(self, path: Path, version: str, strategy: str = "cpu fp32") -> None:
        self._switch = version if version in ("7", "7a") else "4-6"
        self.version = version
        module = _module(self._switch)
        with _environment(self._switch), _quiet():
            self._model = module.RWKV(str(path.with_suffix("")), strategy)

    def steps(self, tokens: list[int], state: Any = None) -> tuple[np.ndarray, Any]:
        """Logits [T, V] of every token, one step each, and the package's state."""
        rows = []
        with _environment(self._switch), _quiet():
            for token in tokens:
                logits, state = self._model.forward([token], state)
                rows.append(logits.float().numpy().copy())
        return np.stack(rows), state

    def sequence(self, tokens: list[int], state: Any = None) -> tuple[np.ndarray, Any]:
        """Logits [V] after the last token, in sequence mode, and the package's state."""
        with _environment(self._switch), _quiet():
            logits, state = self._model.forward(list(tokens), state)
        return logits.float().numpy().copy(), state

    def named_state(self, state: Any) -> dict[str, np.ndarray]:
        """The package's list of state tensors under our names, each with a batch axis of 1."""
        parts = ("att_shift", "wkv_num", "wkv_den", "wkv_max", "ffn_shift")
        if self.version != "4":
            parts = ("att_shift", "wkv", "ffn_shift")
        return {
            f"{parts[j % len(parts)]}.{j // len(parts)}": tensor.float().numpy()[None].copy()
            for j, tensor in enumerate(state)
        }
