"""Layouts: what other tools call the tensors of an RWKV model, which of them they transpose, and which they stack.

One table decides, by tensor names and, where a tool keeps the official names, by shapes. Sources of the rows:

- transformers: `convert_rwkv_checkpoint_to_hf.py` (RWKV-4), and the scripts of BBuf/RWKV-World-HF-Tokenizer that wrote
  the RWKV-5 and RWKV-6 repositories of the organisation RWKV;
- fla: `utils/convert_from_rwkv7.py`, `utils/convert_from_rwkv6.py`, and `load_state_dict` of its RWKV-7 for ``x_x``;
- web-rwkv: `assets/scripts/convert_safetensors.py`, which writes fp16 and stores its small matrices transposed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_edge.checkpoints.base import Checkpoint, TensorInfo
from rwkv_edge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, TensorInfo]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """How an official tensor lies in a stored one.

    Attributes:
        shape: stored shape → official shape; ValueError where it cannot be.
        apply: stored tensor → official tensor, without a copy where strides can express it.
        transposes: the view swaps the last two axes and nothing else, so that it is its own inverse.
    """

    shape: Callable[[Shape], Shape]
    apply: Callable[[torch.Tensor], torch.Tensor]
    transposes: bool = False


def _swapped(shape: Shape) -> Shape:
    if len(shape) < 2:
        raise ValueError("two dimensions or more")
    return (*shape[:-2], shape[-1], shape[-2])


def _row(index: int, count: int) -> View:
    """One of ``count`` tensors that lie stacked on the first axis."""

    def shape(stored: Shape) -> Shape:
        if len(stored) < 2 or stored[0] != count:
            raise ValueError(f"{count} rows")
        return stored[1:]

    return View(shape, lambda tensor: tensor[index])


_FLA_ORDER = (1, 2, 3, 0, 4)
"""Where the official order w, k, v, r, g lies in fla's r, w, k, v, g."""


def _mix_down_shape(stored: Shape) -> Shape:
    if len(stored) != 2 or stored[0] % 5:
        raise ValueError("[5 ranks, width]")
    return (stored[1], stored[0])


def _mix_up_shape(stored: Shape) -> Shape:
    if len(stored) != 2 or stored[1] % 5:
        raise ValueError("[width, 5 ranks]")
    return (5, stored[1] // 5, stored[0])


AS_STORED = View(lambda shape: shape, lambda tensor: tensor)
TRANSPOSED = View(_swapped, lambda tensor: tensor.transpose(-2, -1), transposes=True)
_MIX_DOWN = View(_mix_down_shape, lambda t: t.reshape(5, -1, t.shape[1])[list(_FLA_ORDER)].flatten(0, 1).t())
_MIX_UP = View(_mix_up_shape, lambda t: t.t().reshape(5, -1, t.shape[0])[list(_FLA_ORDER)])
# (reordering the five parts copies a matrix of a few hundred kB)


@dataclass(frozen=True)
class Layout:
    """One way of naming and laying out the tensors.

    Attributes:
        words: what `info` and the manifest call it.
        matches: whether the tensors of a file are laid out like this.
        renames: regular expressions and replacements, applied in this order to every stored name.
        stacks: ends of (renamed) names of stacked tensors, what to put in their place, and the letters of the rows.
        views: regular expressions on official names, for the tensors that are not stored as they are.
        refusal: why a file like this is no model by itself, and what to do with it.
    """

    words: str
    matches: Callable[[Tensors], bool]
    renames: tuple[tuple[str, str], ...] = ()
    stacks: tuple[tuple[str, str, str], ...] = ()
    views: tuple[tuple[str, View], ...] = ()
    refusal: str = ""

    def translate(self, name: str) -> list[tuple[str, View]]:
        """The official tensors that the stored tensor ``name`` holds."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        for end, start, letters in self.stacks:
            if name.endswith(end):
                stem = name.removesuffix(end) + start
                return [(stem + letter, _row(i, len(letters))) for i, letter in enumerate(letters)]
        return [(name, next((view for pattern, view in self.views if re.search(pattern, name)), AS_STORED))]


def _has(pattern: str) -> Callable[[Tensors], bool]:
    compiled = re.compile(pattern)
    return lambda tensors: any(compiled.search(name) for name in tensors)


def _is_web_rwkv_5(tensors: Tensors) -> bool:
    """Its time_first is a renamed time_faaaa, [H, N]; the official time_first (5.0, 5.1) is [H] and another thing."""
    first = tensors.get("blocks.0.att.time_first")
    return "blocks.0.att.ln_x.weight" in tensors and first is not None and len(first.shape) == 2 and first.shape[1] > 1


def _is_web_rwkv_7(tensors: Tensors) -> bool:
    """Its low-rank halves are [rank, D] and [D, rank]; where a rank equals D in all of them, nothing tells."""
    width = tensors["blocks.0.ln1.weight"].numel if "blocks.0.ln1.weight" in tensors else 0
    halves = [tensors[name].shape for x in "wag" if (name := f"blocks.0.att.{x}1") in tensors]
    return any(len(shape) == 2 and shape[1] == width != shape[0] for shape in halves)


ADAPTER_PART = re.compile(
    r"^(?P<target>.+)\.(?:(?P<part>lora_A|lora_B|disha|bone|miss_block|bone_block)(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
    r"|(?P<st>lora\.[01]))$"
)
"""Names of the tensors that fine-tuners add to a target: RWKV-PEFT's, PEFT's (with an adapter's name), web-rwkv's."""

TUNED_STATE = re.compile(r"(?:^|\.)blocks\.(\d{1,6})\.(att|attention|ffn|feed_forward)\.(time_state|ts_state)$")
"""Names of tuned states: time_state [H, N, N], and the token shifts ts_state [D] of RWKV-PEFT's 'fullstate'."""

_FLA = (
    (r"^model\.", ""),
    (r"^embeddings\.", "emb."),
    (r"^layers\.", "blocks."),
    (r"^norm\.", "ln_out."),
    (r"^lm_head\.", "head."),
    (r"^(blocks\.\d+)\.pre_norm\.", r"\1.ln0."),
    (r"^(blocks\.\d+)\.attn_norm\.", r"\1.ln1."),
    (r"^(blocks\.\d+)\.ffn_norm\.", r"\1.ln2."),
    (r"^(blocks\.\d+)\.attn\.", r"\1.att."),
    (r"\.att\.g_norm\.", ".att.ln_x."),
    (r"\.(att|ffn)\.(x_proj\.0|\w+)\.linear\.weight$", r".\1.\2.weight"),
    (r"\.att\.r_proj\.", ".att.receptance."),
    (r"\.att\.k_proj\.", ".att.key."),
    (r"\.att\.v_proj\.", ".att.value."),
    (r"\.att\.g_proj\.", ".att.gate."),
    (r"\.att\.o_proj\.", ".att.output."),
)
_FLA_7 = (
    (r"\.att\.([wavg])_lora\.lora\.0\.weight$", r".att.\g<1>1"),
    (r"\.att\.([wavg])_lora\.lora\.2\.weight$", r".att.\g<1>2"),
    (r"\.att\.([wavg])_lora\.lora\.2\.bias$", r".att.\g<1>0"),
)
_FLA_6 = (
    (r"\.att\.x_proj\.0\.mu$", ".att.time_maa_x"),
    (r"\.att\.x_proj\.0\.weight$", ".att.time_maa_w1"),
    (r"\.att\.x_proj\.2\.weight$", ".att.time_maa_w2"),
    (r"\.att\.w_proj\.linear\.lora\.0\.weight$", ".att.time_decay_w1"),
    (r"\.att\.w_proj\.linear\.lora\.2\.weight$", ".att.time_decay_w2"),
    (r"\.att\.w_proj\.linear\.lora\.2\.bias$", ".att.time_decay"),
    (r"\.att\.bonus$", ".att.time_faaaa"),
    (r"\.ffn\.key\.mu$", ".ffn.time_maa_k"),
    (r"\.ffn\.receptance\.mu$", ".ffn.time_maa_r"),
)
_TRANSFORMERS = (
    (r"^rwkv7?\.", ""),
    (r"^embeddings\.", "emb."),
    (r"^(blocks\.\d+)\.pre_ln\.", r"\1.ln0."),
    (r"^(blocks\.\d+)\.attention\.", r"\1.att."),
    (r"^(blocks\.\d+)\.feed_forward\.", r"\1.ffn."),
    (r"\.time_mix_key$", ".time_mix_k"),
    (r"\.time_mix_value$", ".time_mix_v"),
    (r"\.time_mix_receptance$", ".time_mix_r"),
    (r"\.time_mix_gate$", ".time_mix_g"),
)
_STATE_VIEW = (r"\.att\.time_state$", TRANSPOSED)
_WRAPPERS = r"^(?:(?:_forward_module|module|model|rwkv)\.)+"  # of Lightning, DeepSpeed and their likes

WEB_RWKV = "web-rwkv's"
LAYOUTS = (
    Layout(
        "an adapter",
        lambda tensors: any(ADAPTER_PART.match(name) for name in tensors),
        refusal="pass the model that it was trained on as the checkpoint, and this file with --lora",
    ),
    Layout(
        "a tuned state",
        lambda tensors: all(TUNED_STATE.search(name) for name in tensors),
        refusal="pass the model that it was trained on as the checkpoint, and this file with --state",
    ),
    Layout(
        "fla's names of RWKV-7",
        _has(r"(^|\.)layers\.\d+\.attn\.r_k$"),
        renames=_FLA + _FLA_7,
        stacks=((".att.x_x", ".att.x_", "rwkvag"),),
        views=((r"\.att\.[wavg][12]$", TRANSPOSED),),
    ),
    Layout(
        "fla's names of RWKV-6",
        _has(r"(^|\.)layers\.\d+\.attn\.x_proj\.0\.mu$"),
        renames=_FLA + _FLA_6,
        stacks=((".att.x_bias", ".att.time_maa_", "rwkvg"),),
        views=(
            (r"\.att\.time_decay_w[12]$", TRANSPOSED),
            (r"\.att\.time_maa_w1$", _MIX_DOWN),
            (r"\.att\.time_maa_w2$", _MIX_UP),
        ),
    ),
    Layout(
        "transformers' names",
        _has(r"^(rwkv\.)?blocks\.\d+\.attention\.|^rwkv7\.blocks\.\d+\.att\."),
        renames=_TRANSFORMERS,
    ),
    Layout(
        f"{WEB_RWKV} names of RWKV-6",
        _has(r"^blocks\.\d+\.att\.time_mix_x$"),
        renames=((r"\.time_mix_(\w+)$", r".time_maa_\1"), (r"\.att\.time_first$", ".att.time_faaaa")),
        views=((r"\.att\.time_(maa|decay)_w[12]$", TRANSPOSED), _STATE_VIEW),
    ),
    Layout(
        f"{WEB_RWKV} names of RWKV-5",
        _is_web_rwkv_5,
        renames=((r"\.att\.time_first$", ".att.time_faaaa"),),
        views=(_STATE_VIEW,),
    ),
    Layout(
        f"{WEB_RWKV} transposition of RWKV-7",
        _is_web_rwkv_7,
        views=((r"\.att\.[wavg][12]$", TRANSPOSED), _STATE_VIEW),
    ),
    Layout(
        "official names behind a prefix",
        _has(_WRAPPERS + r"blocks\.\d+\.(att|ffn)\."),
        renames=((_WRAPPERS, ""),),
    ),
)
"""The rows in the order in which they are tried; a file that none matches has the official names, or is no model."""


def layout_of(tensors: Tensors) -> Layout | None:
    """The first row that matches, or None for the official names."""
    return next((layout for layout in LAYOUTS if layout.matches(tensors)), None)


def with_official_names(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint under the official names.

    Raises:
        CheckpointError: it is an adapter or a tuned state, or its tensors contradict their layout.
    """
    layout = layout_of(checkpoint.tensors)
    if layout is None:
        return checkpoint
    if layout.refusal:
        raise CheckpointError(f"{checkpoint.path} is {layout.words}, not a model: {layout.refusal}")
    return LayoutCheckpoint(checkpoint, layout)


class LayoutCheckpoint:
    """A checkpoint in another layout; its tensors are views of the stored ones."""

    def __init__(self, stored: Checkpoint, layout: Layout) -> None:
        """Translates names and shapes; loads nothing.

        Raises:
            CheckpointError: two stored tensors have the same official name, or a shape does not fit the layout.
        """
        self._stored = stored
        self._sources: dict[str, tuple[str, View]] = {}
        tensors: dict[str, TensorInfo] = {}
        for name, info in stored.tensors.items():
            for official, view in layout.translate(name):
                if official in self._sources:
                    other = self._sources[official][0]
                    raise CheckpointError(f"{stored.path}: '{other}' and '{name}' are both '{official}'")
                try:
                    tensors[official] = TensorInfo(view.shape(info.shape), info.dtype)
                except ValueError as error:
                    found = list(info.shape)
                    raise CheckpointError(
                        f"{stored.path}: tensor '{name}' has shape {found}, expected {error} in {layout.words}"
                    ) from error
                self._sources[official] = (name, view)
        self.tensors: Mapping[str, TensorInfo] = tensors
        self._words = layout.words

    @property
    def path(self) -> Path:
        """The file or folder that the user named."""
        return self._stored.path

    @property
    def layout(self) -> str:
        """Such as "safetensors, fla's names of RWKV-7"."""
        return f"{self._stored.layout}, {self._words}"

    def load(self, name: str) -> torch.Tensor:
        """The view of the stored tensor, in its stored dtype."""
        stored, view = self._sources[name]
        return view.apply(self._stored.load(stored))

    def release(self, name: str) -> None:
        """Drop the stored tensor's resident pages."""
        self._stored.release(self._sources[name][0])
