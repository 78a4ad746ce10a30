"""Adapters: what fine-tuning with LoRA, DiSHA, Bone or MiSS leaves, merged into a checkpoint tensor by tensor.

PiSSA's files cannot be told from LoRA's and need a second file with the initial halves; DoRA and AdaLoRA need more than
a sum. Merge those with the tool that trained them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_edge.checkpoints import open_checkpoint, open_stored
from rwkv_edge.checkpoints.base import Checkpoint, TensorInfo
from rwkv_edge.checkpoints.deltas import BLOCK_PARTS, Delta, delta_of
from rwkv_edge.checkpoints.layouts import ADAPTER_PART, AS_STORED, LAYOUTS, TRANSPOSED, TUNED_STATE, Layout, View
from rwkv_edge.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch

CHUNK_NUMEL = 1 << 21
"""Elements of a weight that are merged at a time (8 MiB of float32)."""

_PEFT = r"^base_model\.model\.|\.base_layer(?=\.)|\.modules_to_save(\.default)?(?=\.)"
_LAYER = re.compile(r"(?:^|\.)(?:blocks|layers)\.(\d{1,6})\.(.+)$")
_UNSUPPORTED = (
    ("lora_magnitude_vector", "DoRA"),
    ("lora_embedding_", "a LoRA of the embedding"),
    ("init_lora_", "PiSSA's initial halves"),
    ("lora_E", "AdaLoRA"),
)
_OFFICIAL = Layout("official names", lambda tensors: True)


@dataclass(frozen=True)
class Adapter:
    """What a file of a fine-tuner holds, by names and shapes.

    Attributes:
        stored: the open file.
        targets: name of a target's weight → part → tensor of the file. Names are as in the file, without PEFT's prefix.
        whole: name of a tensor that replaces the base's → tensor of the file.
        states: official name of a tensor of a tuned state → tensor of the file.
    """

    stored: Checkpoint
    targets: Mapping[str, Mapping[str, str]]
    whole: Mapping[str, str]
    states: Mapping[str, str]

    @property
    def is_lora(self) -> bool:
        """Whether an alpha is needed."""
        return any(part not in BLOCK_PARTS for parts in self.targets.values() for part in parts)

    @property
    def kind(self) -> str:
        """'LoRA', 'DiSHA or Bone', 'MiSS', or several of them."""
        found = set()
        for parts in self.targets.values():
            for part, name in parts.items():
                block = "DiSHA or Bone" if len(self.stored.tensors[name].shape) == 3 else "MiSS"
                found.add(block if part in BLOCK_PARTS else "LoRA")
        return " and ".join(sorted(found))

    @property
    def ranks(self) -> list[int]:
        """Every rank that occurs, sorted."""
        found = set()
        for parts in self.targets.values():
            for part, name in parts.items():
                shape = self.stored.tensors[name].shape or (0,)
                narrow_last = part in ("lora_B", "lora.0", "lora.1") or len(shape) == 3
                found.add(shape[-1] if narrow_last else shape[0])
        return sorted(found)

    @property
    def layers(self) -> list[int]:
        """Indices of the blocks that it changes."""
        return sorted({int(match[1]) for name in [*self.targets, *self.whole] if (match := _LAYER.search(name))})

    @property
    def target_kinds(self) -> list[str]:
        """Such as 'att.key', in the file's names."""
        return sorted({(m[2] if (m := _LAYER.search(name)) else name).removesuffix(".weight") for name in self.targets})


def is_adapter(stored: Checkpoint) -> bool:
    """Whether a file holds what a fine-tuner adds to weights."""
    return any(ADAPTER_PART.match(name) for name in stored.tensors)


def read_adapter(stored: Checkpoint) -> Adapter:
    """Sort the tensors of an adapter.

    Args:
        stored: from `open_stored`.

    Raises:
        CheckpointError: no tensor of a known adapter, a method that cannot be merged, or two tensors for one place.
    """
    targets: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    states: dict[str, str] = {}
    for name in stored.tensors:
        unsupported = next((words for part, words in _UNSUPPORTED if part in name), None)
        if unsupported:
            raise CheckpointError(
                f"{stored.path}: '{name}' is of {unsupported}, which cannot be merged here; "
                "merge it with the tool that trained it"
            )
        if ".original_module." in name:
            continue
        match, state = ADAPTER_PART.match(name), TUNED_STATE.search(name)
        target = re.sub(_PEFT, "", f"{match['target']}.weight" if match else name)
        places, key = (targets.setdefault(target, {}), match["part"] or match["st"]) if match else (whole, target)
        if state:
            places, key = states, state[0].lstrip(".")
        if key in places:
            raise CheckpointError(f"{stored.path}: '{places[key]}' and '{name}' are for one place; keep one adapter")
        places[key] = name
    if not targets:
        raise CheckpointError(f"{stored.path} is not an adapter: expected names such as 'blocks.0.att.key.lora_A'")
    return Adapter(stored, targets, whole, states)


def merge_adapter(checkpoint: Checkpoint, adapter: str | Path | Checkpoint, alpha: float | None = None) -> Checkpoint:
    """The checkpoint with an adapter merged into it, computed whenever a tensor is loaded and kept nowhere.

    A changed tensor is W + ΔW, summed in float32 (in float64 where W is float64), whatever the dtypes of both, and
    rounded once, to nearest even, to the dtype that W is stored in. RWKV-PEFT's scripts round ΔW to the adapter's dtype
    before the sum, so theirs may differ in the last bit. Tensors that stand in the adapter as a whole replace the
    base's, in the adapter's dtype; a tuned state in it is there as if the base had it.

    Args:
        checkpoint: the base, from `open_checkpoint`.
        adapter: the file or PEFT folder, or what `open_stored` returned for it.
        alpha: LoRA's α (ΔW = B·A·α/r), which no file of weights says; PEFT's adapter_config.json beside it may, and is
            asked where this is None. DiSHA, Bone and MiSS have none.

    Raises:
        CheckpointError: not an adapter, or one that does not fit the base; names the tensor.
        InputError: ``alpha`` is missing, not finite, or given to a method that has none.
    """
    parsed = read_adapter(open_stored(adapter) if isinstance(adapter, (str, Path)) else adapter)
    if alpha is None and parsed.is_lora:
        alpha = _peft_alpha(parsed.stored.path)
    _check_alpha(parsed, alpha)
    return MergedCheckpoint(checkpoint, parsed, alpha)


def open_merged(path: str | Path, adapter: str | Path | None, alpha: float | None = None) -> Checkpoint:
    """`open_checkpoint`, with an adapter merged where one is named.

    Raises:
        CheckpointError: either cannot be opened, or they do not fit.
        InputError: ``alpha`` without an adapter, or an adapter without the alpha that it needs.
    """
    if adapter is None and alpha is not None:
        raise InputError("--lora-alpha is the alpha of a LoRA: pass its file with --lora too")
    checkpoint = open_checkpoint(path)
    return checkpoint if adapter is None else merge_adapter(checkpoint, adapter, alpha)


def _check_alpha(adapter: Adapter, alpha: float | None) -> None:
    path = adapter.stored.path
    if adapter.is_lora and alpha is None:
        raise InputError(f"{path} is a LoRA of rank {adapter.ranks[0]}, whose alpha it does not say: pass --lora-alpha")
    if alpha is not None and not adapter.is_lora:
        raise InputError(f"{path} is {adapter.kind}, which has no alpha; leave --lora-alpha out")
    if alpha is not None and not math.isfinite(alpha):
        raise InputError(f"--lora-alpha must be a finite number, not {alpha}")


def _peft_alpha(path: Path) -> float | None:
    """lora_alpha of the adapter_config.json beside the weights, if there is one.

    Raises:
        CheckpointError: it scales in another way than by α/r.
    """
    try:
        config = json.loads((path.parent / "adapter_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    alpha = config.get("lora_alpha") if isinstance(config, dict) else None
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        return None
    if config.get("use_rslora") or config.get("alpha_pattern"):
        raise CheckpointError(
            f"{path.parent / 'adapter_config.json'} asks for a scale of its own (use_rslora, alpha_pattern), not for "
            "alpha/r: merge it with PEFT, or pass --lora-alpha"
        )
    return float(alpha)


@dataclass(frozen=True)
class _Change:
    """What happens to one tensor of the base."""

    delta: Delta | None = None
    transposed: bool = False  # the adapter's layout stores the weight transposed
    whole: tuple[str, View] | None = None
    names: tuple[str, ...] = field(default=())


class MergedCheckpoint:
    """A base and an adapter; see `merge_adapter`."""

    def __init__(self, base: Checkpoint, adapter: Adapter, alpha: float | None) -> None:
        """Checks names and shapes; loads nothing.

        Raises:
            CheckpointError: a tensor of the adapter does not fit the base.
        """
        self._base = base
        self._adapter = adapter
        self._alpha = alpha
        self._tensors = dict(base.tensors)
        self._changes: dict[str, _Change] = {}
        layout = _layout_that_fits(base, adapter)
        for place, name in adapter.whole.items():
            self._replace(place, name, layout)
        for target, parts in adapter.targets.items():
            self._change(target, parts, layout)
        for place, name in adapter.states.items():
            self._add_state(place, name)

    @property
    def path(self) -> Path:
        """The base's file or folder."""
        return self._base.path

    @property
    def layout(self) -> str:
        """Such as "PyTorch .pth, with LoRA (rank 8, alpha 16, 24 layers) of my-lora.pth"."""
        adapter = self._adapter
        alpha = "" if self._alpha is None else f", alpha {self._alpha:g}"
        ranks = ", ".join(str(rank) for rank in adapter.ranks)
        what = f"{adapter.kind} (rank {ranks}{alpha}, {len(adapter.layers)} layers)"
        return f"{self._base.layout}, with {what} of {adapter.stored.path.name}"

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The base's, except where a whole tensor of another dtype replaces one."""
        return self._tensors

    def load(self, name: str) -> torch.Tensor:
        """The base's tensor, mapped; or the merged one, computed anew."""
        change = self._changes.get(name)
        if change is None:
            return self._base.load(name)
        if change.whole is None:
            weight = self._base.load(name)
        else:
            stored, view = change.whole
            weight = view.apply(self._adapter.stored.load(stored)).reshape(self._tensors[name].shape)
        if change.delta is None:
            return weight
        if change.transposed:
            return _merged(weight.t(), change.delta, self._adapter.stored).t()
        return _merged(weight, change.delta, self._adapter.stored)

    def release(self, name: str) -> None:
        """Drop the resident pages of what `load` read."""
        change = self._changes.get(name, _Change())
        if name in self._base.tensors:
            self._base.release(name)
        for part in change.names:
            self._adapter.stored.release(part)

    def _replace(self, place: str, name: str, layout: Layout) -> None:
        info = self._adapter.stored.tensors[name]
        for official, view in layout.translate(place):
            expected = self._expect(official, name).shape
            try:
                fits = [n for n in view.shape(info.shape) if n != 1] == [n for n in expected if n != 1]
            except ValueError:
                fits = False
            if not fits:
                raise CheckpointError(
                    f"{self._adapter.stored.path}: '{name}' {list(info.shape)} does not fit {official} of {self.path}, "
                    f"{list(expected)}; is it an adapter of another model?"
                )
            self._tensors[official] = TensorInfo(expected, info.dtype)
            self._changes[official] = _Change(whole=(name, view), names=(name,))

    def _change(self, target: str, parts: Mapping[str, str], layout: Layout) -> None:
        official, view = layout.translate(target)[0]
        name = next(iter(parts.values()))
        shape = self._expect(official, name).shape
        if len(shape) != 2 or not (view is AS_STORED or view.transposes):
            raise CheckpointError(
                f"{self._adapter.stored.path}: '{name}' changes {official}, which is not a matrix of the base"
            )
        out, inner = shape[::-1] if view.transposes else shape
        try:
            delta = delta_of(parts, self._adapter.stored.tensors, out, inner, self._alpha)
        except ValueError as error:
            raise CheckpointError(f"{self._adapter.stored.path}: {target} {error}") from error
        earlier = self._changes.get(official, _Change())
        self._changes[official] = _Change(delta, view.transposes, earlier.whole, (*earlier.names, *delta.names))

    def _add_state(self, official: str, name: str) -> None:
        """A tuned state beside the adapter is as one inside the base; `load_tuned_state` checks its shape."""
        info, from_st = self._adapter.stored.tensors[name], self._adapter.stored.path.suffix.lower() == ".st"
        view = TRANSPOSED if from_st and len(info.shape) > 1 else AS_STORED
        self._tensors[official] = TensorInfo(view.shape(info.shape), info.dtype)
        self._changes[official] = _Change(whole=(name, view), names=(name,))

    def _expect(self, official: str, name: str) -> TensorInfo:
        if official not in self._base.tensors:
            raise CheckpointError(
                f"{self._adapter.stored.path}: '{name}' is for {official}, which {self.path} lacks; "
                "is it an adapter of another model?"
            )
        return self._base.tensors[official]


def _layout_that_fits(base: Checkpoint, adapter: Adapter) -> Layout:
    """The layout under which all places of the adapter are in the base; else the one that comes nearest."""

    def lacking(layout: Layout) -> int:
        places = [official for name in [*adapter.targets, *adapter.whole] for official, _ in layout.translate(name)]
        return sum(place not in base.tensors for place in places)

    return min((_OFFICIAL, *(layout for layout in LAYOUTS if not layout.refusal)), key=lacking)


def _merged(weight: torch.Tensor, delta: Delta, adapter: Checkpoint) -> torch.Tensor:
    """The changed weight in its dtype, row chunk by row chunk, so that little of it is ever in float32."""
    import torch

    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    merged = torch.empty(weight.shape, dtype=weight.dtype)
    step = delta.rows * max(1, CHUNK_NUMEL // (weight.shape[1] * delta.rows))
    for start in range(0, weight.shape[0], step):
        chunk = weight[start : start + step].to(wide)
        merged[start : start + step] = delta.merge(chunk, start, adapter.load).to(weight.dtype)
    return merged
