"""The fused nodes of a step graph: operators of the domain ``rwkv``, each one of the fused kernels.

The exporter writes them as local functions whose bodies are plain operators; a TensorRT plugin of the same name puts
the kernel in a node's place. Inputs and outputs are the kernel's arguments in their order. The matrices of a node are
float; each stands also where the kernel takes the scale that only an integer matrix has, and which it does not read.

Letters of shapes: B streams, D width, A = H·N inner width, F hidden width, V vocabulary, S partial sums; w, a, g and v
are the ranks of the LoRAs of that name, m that of RWKV-6's mixes and M = 5 m, d that of DeepEmbed and E = d². A digit
is itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from rwkv_edge.plugins.fused_spec import (
    ALIGNMENT,
    OWN_SHARED,
    SKEW,
    WARP,
    Choice,
    Dimensions,
    FusedKernel,
    Tuning,
    ring_bytes,
)
from rwkv_edge.plugins.fused_versions import KERNELS
from rwkv_edge.plugins.layout import FLOAT
from rwkv_edge.plugins.spec import Argument
from rwkv_edge.spec import ModelSpec

ACT: Final = "act"
"""The dtype of arguments that are in the precision of the export."""

EMBEDDING: Final = "emb"
"""The weight that belongs to no layer."""

SCALE: Final = ".scale"
"""What follows the name of a matrix where the kernel takes its scale."""

TIME_MIX_PARTS, CHANNEL_MIX_PARTS = 4, 8  # blocks that share the rows of a matrix, at least
INPUTS: Final = 16 << 10  # bytes of shared memory for the inputs of a product
OTHER: Final = 256  # bytes of shared memory for single values
TUNING: Final = Tuning(time_mix_out=Choice(32), channel_mix_out=Choice(64), eager=False)
"""TensorRT launches one kernel after the other, so none is let in early; and it gives a block no more shared memory
than every device does unasked."""

RANKS: Final = {
    "w": ("rank_w", "rank_decay"), "a": ("rank_a",), "g": ("rank_g",), "v": ("rank_v",), "m": ("rank_mix",),
    "d": ("rank_deep_embed",),
}  # fmt: skip
"""Letters of ranks, and what specs call them."""

KERNEL_RANKS: Final = {"w": "rank_w", "a": "rank_a", "g": "rank_g", "v": "rank_v", "d": "rank_deep"}
"""And what the kernels' dimensions call them."""


@dataclass(frozen=True)
class FusedNode:
    """One operator.

    Arguments are named as the kernel's: weights by what follows 'blocks.i.att.' or 'blocks.i.ffn.' in weights.bin, the
    layer norm before that half of the layer as 'ln.weight' and 'ln.bias', states as 'shift' and 'wkv'; every other name
    is an edge from the last node that gave it. Edges are float32.

    Attributes:
        name: of the operator.
        kind: what it is called in every version and layer: 'time_mix_in'.
        version: of RWKV.
        part: 'att' or 'ffn', the half of a layer that it belongs to.
        index: of its kernel among those of the half.
        layer: 0 where it is of the first layer alone, else 1.
        halves: it halves the residual stream, as some models do in float16 after every sixth layer.
        inputs: tensors read; dtypes are 'act', 'float32' and 'int32'.
        outputs: tensors written.
    """

    name: str
    kind: str
    version: str
    part: str
    index: int
    layer: int
    halves: bool
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]

    def parts(self, sizes: Mapping[str, int]) -> int:
        """S of the partial sums that its kernel gives, where it gives any; more where the inputs of a block would fill
        too much of its memory."""
        rows, least = (
            (sizes.get("A", 0), TIME_MIX_PARTS) if self.part == "att" else (sizes.get("F", 0), CHANNEL_MIX_PARTS)
        )
        while FLOAT * sizes["B"] * rows > least * INPUTS:
            least *= 2
        return least

    def kernel(self, sizes: Mapping[str, int], dtype: str) -> FusedKernel:
        """The kernel for a shape of the inputs.

        Args:
            sizes: by letter, of all letters in the axes of the inputs.
            dtype: of arguments that are 'act'.

        Raises:
            InputError: the kernels do not take these dimensions, or that many streams.
        """
        dimensions, own, before = self._dimensions(sizes, dtype), self.parts(sizes), sizes.get("S", 1)
        time_mix, channel_mix = (own, before) if self.part == "att" else (before, own)
        tuning = replace(
            TUNING,
            wkv=_wkv_choice(dimensions),
            time_mix_out=replace(TUNING.time_mix_out, split=time_mix),
            channel_mix_out=replace(TUNING.channel_mix_out, split=channel_mix),
        )
        return _half(self.version, self.part, self.layer, dimensions, sizes["B"], tuning)[self.index]

    def _dimensions(self, sizes: Mapping[str, int], dtype: str) -> Dimensions:
        """The dimensions that a node knows; its kernel depends on no other."""
        inner = sizes.get("A", 0)
        ranks = {kernels: sizes.get(letter, 0) for letter, kernels in KERNEL_RANKS.items()}
        ranks["rank_mix"] = sizes.get("m", sizes.get("M", 0) // 5)
        return Dimensions(
            width=sizes.get("D") or inner or sizes["F"],
            inner=inner,
            hidden=sizes.get("F", 0),
            heads=sizes.get("H", inner // ALIGNMENT),
            head_size=sizes.get("N", ALIGNMENT),
            vocabulary=0,
            dtype=dtype,
            rescale=int(self.halves),  # before layer 1
            **ranks,
        )


@dataclass(frozen=True)
class FusedLayers:
    """The nodes of a version in the order of a step.

    Attributes:
        first: of layer 0.
        later: of every later layer.
        halving: of one before which the residual stream is halved.
    """

    first: tuple[FusedNode, ...]
    later: tuple[FusedNode, ...]
    halving: tuple[FusedNode, ...]

    def of(self, layer: int, rescale: int = 0) -> tuple[FusedNode, ...]:
        """Those of a layer of a model whose stream is halved every ``rescale`` layers."""
        if layer == 0:
            return self.first
        return self.halving if rescale and layer % rescale == 0 else self.later

    @property
    def nodes(self) -> dict[str, FusedNode]:
        """All of them by name."""
        return {node.name: node for node in (*self.first, *self.later, *self.halving)}


@dataclass(frozen=True)
class _Half:
    """What the kernels of half a layer do not say themselves: names of nodes, dtypes and axes of arguments."""

    names: tuple[str, ...]
    arguments: Mapping[str, Argument]


def _skewed(rows: int) -> int:
    """Floats that hold as many, of which every `SKEW` are moved by four; see fused.cuh."""
    return rows + rows // SKEW * 4


def _arguments(text: str) -> dict[str, Argument]:
    """``name:dtype:axes`` each, separated by spaces; the dtype is f for float32, i for int32, or empty for 'act'."""
    dtypes = {"f": "float32", "i": "int32", "": ACT}
    parts = (part.split(":") for part in text.split())
    return {name: Argument(name, dtypes[dtype], axes) for name, dtype, axes in parts}


# What a product gives keeps the leading axis of 1 of stacked token-shift mixes. Partial sums are S of them in a kernel
# and one in a body: whoever reads them adds up the first axis, so that the graph is the same for every split.
_COMMON = f"tokens:i:B {EMBEDDING}::VD stream:f:BD parts:f:SBD shift::BD ln.weight::D ln.bias::D "
_PROJECTIONS = "receptance::DA key::DA value::DA output::AD y:f:BA "
_HEADS = "ln_x.weight:f:HN ln_x.bias:f:HN wkv:f:BHNN "
_FIVE: Final = ("time_mix_in", "wkv", "time_mix_out")

_V4_ATT: Final = _Half(
    _FIVE,
    _arguments(
        _COMMON + _PROJECTIONS + "mix_r::1D mix_k::1D mix_v::1D r:f:BA k:f:BA v:f:BA decay:f:A first:f:A "
        "wkv_num:f:BA wkv_den:f:BA wkv_max:f:BA"
    ),
)
_V5_ATT: Final = _Half(
    _FIVE,
    _arguments(
        _COMMON + _PROJECTIONS + _HEADS + "mix_r::11D mix_k::11D mix_v::11D mix_g::11D gate::DA "
        "r:f:1BA k:f:1BA v:f:1BA g:f:1BA decay_log:f:HN first:f:HN"
    ),
)
_V6_ATT: Final = _Half(
    ("time_mix_norm", "time_mix_mixes", *_FIVE),
    _arguments(
        _COMMON + _PROJECTIONS + _HEADS + "mix_x::1D mix.w1::DM mix::51D mix.w2::5mD gate::DA "
        "normed:f:BD h:f:BM mixed:f:5BD r:f:1BA k:f:1BA v:f:1BA g:f:1BA hw:f:1Bw "
        "decay.w1::Dw decay.w2::wA decay:f:A first:f:HN"
    ),
)
_GATED_FFN: Final = _Half(
    ("channel_mix_in", "channel_mix_out"),
    _arguments(_COMMON + "mix_k::1D mix_r::1D key::DF receptance::DD value::FD hidden:f:BF factor:f:BD"),
)
_V7_ATT: Final = _Half(
    _FIVE,
    _arguments(
        _COMMON + _PROJECTIONS + _HEADS + "mix::61D w1::Dw a1::Da g1::Dg v1::Dv w2::wA a2::aA g2::gA v2::vA "
        "w0:f:A a0::A v0::A r:f:1BA k:f:1BA v:f:1BA v_first:f:1BA hw:f:1Bw ha:f:1Ba hg:f:1Bg hv:f:1Bv "
        "k_k:f:HN k_a:f:HN r_k:f:HN"
    ),
)
_V7_FFN: Final = _Half(
    ("channel_mix_in", "channel_mix_out"), _arguments(_COMMON + "mix::1D key::DF value::FD hidden:f:BF")
)
_V7A_FFN: Final = _Half(
    ("channel_mix_in", "deep_embed", "channel_mix_out"),
    _arguments(_COMMON + "mix::1D key::DF value::FD hidden:f:BF s1::Dd s_emb::VE hs:f:Bd s2::dF s0::F"),
)

_HALVES: Final[Mapping[str, tuple[_Half, _Half]]] = {
    "4": (_V4_ATT, _GATED_FFN),
    "5.0": (_V5_ATT, _GATED_FFN),
    "5.1": (_V5_ATT, _GATED_FFN),
    "5.2": (_V5_ATT, _GATED_FFN),
    "6": (_V6_ATT, _GATED_FFN),
    "7": (_V7_ATT, _V7_FFN),
    "7a": (_V7_ATT, _V7A_FFN),
}

FUSED_VERSIONS: Final = tuple(_HALVES)
"""Those that have fused nodes."""

_ANY: Final = Dimensions(
    width=64, inner=64, hidden=64, heads=1, head_size=64, vocabulary=64, rank_w=8, rank_a=8, rank_g=8, rank_v=8,
    dtype="float32", rank_mix=8, rank_deep=8,
)  # fmt: skip
"""Names and order of arguments depend on no dimension."""


@lru_cache
def fused_layers(version: str) -> FusedLayers:
    """The nodes of a version in `FUSED_VERSIONS`."""
    return FusedLayers(_nodes(version, 0, False), _nodes(version, 1, False), _nodes(version, 1, True))


def _nodes(version: str, layer: int, halves: bool) -> tuple[FusedNode, ...]:
    """Those of a layer; the first of it halves the stream, if any. Nodes of all layers are of layer 1."""
    found: list[FusedNode] = []
    for part, half in zip(("att", "ffn"), _HALVES[version], strict=True):
        own, other = (_half(version, part, i, _ANY, 1, TUNING) for i in (layer, 1 - layer))
        for index, name in enumerate(half.names):
            kernel = own[index]
            same = (kernel.inputs, kernel.outputs) == (other[index].inputs, other[index].outputs)
            halving = halves and not found
            suffix = "_halving" if halving else "" if layer or same else "_first"
            found.append(
                FusedNode(
                    f"v{version.replace('.', '_')}_{name}{suffix}",
                    name,
                    version,
                    part,
                    index,
                    1 if same else layer,
                    halving,
                    tuple(_argument(half, argument) for argument in kernel.inputs),
                    tuple(_argument(half, argument) for argument in kernel.outputs),
                )
            )
    return tuple(found)


def sizes_of(node: FusedNode, spec: ModelSpec) -> dict[str, int]:
    """The sizes that a node's inputs have in a model of a fixed batch size, by letter."""
    parts = CHANNEL_MIX_PARTS if node.part == "att" else TIME_MIX_PARTS
    sizes = {
        "B": spec.batch or 1, "D": spec.n_embd, "A": spec.n_att, "F": spec.n_ffn, "H": spec.n_head, "N": spec.head_size,
        "V": spec.vocab_size, "S": parts,
        **{letter: sum(spec.extra.get(name, 0) for name in names) for letter, names in RANKS.items()},
    }  # fmt: skip
    sizes |= {"M": 5 * sizes["m"], "E": sizes["d"] ** 2}
    letters = {letter for argument in node.inputs for letter in argument.axes}
    return {letter: size for letter, size in sizes.items() if letter in letters}


def _half(
    version: str, part: str, layer: int, dimensions: Dimensions, batch: int, tuning: Tuning
) -> tuple[FusedKernel, ...]:
    """The kernels of half a layer."""
    kernels = KERNELS[version](dimensions, batch, tuning, halting=False)
    return kernels.time_mix(layer) if part == "att" else kernels.channel_mix(layer)


def _argument(half: _Half, name: str) -> Argument:
    return replace(half.arguments[name.removesuffix(SCALE)], name=name)


def _wkv_choice(d: Dimensions) -> Choice:
    """As many loads in flight as fit beside the LoRAs' hidden values and sums, by warp and in all, and a head's y."""
    ranks, warps = (d.rank_w, d.rank_a, d.rank_g, d.rank_v), TUNING.wkv.threads // WARP
    own = FLOAT * ((warps + 1) * (len(ranks) + 1) * _skewed(d.head_size) + sum(map(_skewed, ranks))) + OTHER
    choice = replace(TUNING.wkv, tile=d.head_size)
    while choice.ahead > 1 and own + sum(ring_bytes(n, choice, None, d.dtype, 1) for n in ranks) > OWN_SHARED:
        choice = replace(choice, ahead=choice.ahead // 2)
    return choice
