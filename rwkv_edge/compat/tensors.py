"""What `RWKV.forward` returns: tensors of torch where it is installed, else arrays that answer like them."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from rwkv_edge.errors import InputError, MissingDependencyError, StateError
from rwkv_edge.spec import ModelSpec

KINDS = ("torch", "numpy")
Wrap = Callable[[np.ndarray, str], Any]
"""An array and its dtype in the model ('bfloat16' arrives as float32) → what the caller sees."""


class HostTensor(np.ndarray[Any, Any]):
    """An array with the methods of a torch tensor that programs for the `rwkv` package call on logits and states."""

    def detach(self) -> HostTensor:
        """Itself."""
        return self

    def cpu(self) -> HostTensor:
        """Itself: it is in host memory."""
        return self

    def float(self) -> HostTensor:
        """As float32."""
        return self.astype(np.float32, copy=False).view(HostTensor)

    def numpy(self) -> np.ndarray:
        """A plain array of the same memory."""
        return self.view(np.ndarray)

    def clone(self) -> HostTensor:
        """A copy."""
        return self.copy()


def wrap_for(kind: str | None) -> Wrap:
    """How arrays are handed out: as ``kind``, or where None by whether torch is installed.

    Raises:
        InputError: another kind.
        MissingDependencyError: torch is asked for and not installed.
    """
    if kind not in (None, *KINDS):
        raise InputError(f"tensors must be one of {', '.join(KINDS)}, not {kind!r}")
    found = importlib.util.find_spec("torch") is not None
    if kind == "torch" and not found:
        raise MissingDependencyError("torch", "export", "returning tensors of torch")
    return _torch_tensor if kind == "torch" or (kind is None and found) else _host_tensor


def _torch_tensor(array: np.ndarray, dtype: str) -> Any:
    import torch

    tensor = torch.from_numpy(array)
    return tensor.bfloat16() if dtype == "bfloat16" else tensor


def _host_tensor(array: np.ndarray, dtype: str) -> HostTensor:
    return array.view(HostTensor)


def array_of(value: Any) -> np.ndarray:
    """Values of a tensor or array as a float32 array of its own.

    Raises:
        StateError: something else.
    """
    try:
        if hasattr(value, "detach"):
            value = value.detach().float().cpu().numpy()
        return np.array(value, np.float32)
    except (TypeError, ValueError) as error:
        raise StateError(f"a state is a list of tensors, but an element is {type(value).__name__}") from error


class State(Sequence[Any]):
    """The state of one stream, as a list of tensors: per layer ``att_shift, wkv, ffn_shift``; RWKV-4 has five.

    The order, shapes and orientation are those of the `rwkv` package, so a list of its tensors can be passed to
    `RWKV.forward` too. A state is a value: `forward` does not change it. Its tensors are copied out of the session when
    one is first looked at; from then on they are the state, and may be changed.
    """

    def __init__(self, session: Any, native: Any, wrap: Wrap, items: list[Any] | None = None) -> None:
        self._session, self._native, self._wrap, self._items = session, native, wrap, items

    def native_for(self, session: Any) -> Any:
        """The session's own state with these values, not to be changed; None if it has to be imported from a list."""
        return self._native if session is self._session else None

    def __len__(self) -> int:
        return len(self._session.spec.state)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        return self._list()[index]

    def __setitem__(self, index: int, value: Any) -> None:
        self._list()[index] = value

    def __iter__(self) -> Iterator[Any]:
        return iter(self._list())

    def __copy__(self) -> State:
        return State(self._session, self._native, self._wrap, None if self._items is None else list(self._items))

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return State(self._session, self._native, self._wrap, copy.deepcopy(self._items, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (self._list(),)

    def _list(self) -> list[Any]:
        if self._items is None:
            arrays = self._session.export_state(self._native)
            tensors = self._session.spec.state
            self._items = [self._wrap(np.ascontiguousarray(arrays[t.name][0]), t.dtype) for t in tensors]
            self._native = None
        return self._items


def named_arrays(items: Sequence[Any], spec: ModelSpec) -> Mapping[str, np.ndarray]:
    """A list of state tensors as arrays [1, …] by name, for `Session.import_state`.

    Raises:
        StateError: another number of them.
    """
    if len(items) != len(spec.state):
        raise StateError(
            f"a state of this model is a list of {len(spec.state)} tensors, not {len(items)}; begin with None"
        )
    return {t.name: array_of(value)[None] for t, value in zip(spec.state, items, strict=True)}
