"""One step of a model as a chain of fused kernels: buffers, the arguments of every launch, and its CUDA graphs.

Per layer the kernels of the time mix and of the channel mix (`rwkv_edge.plugins.fused_versions`); then the head and the
greedy choice. The residual stream is kept as a sum that is still open: the stream itself and the partial sums of the
matrix before, which the next kernel adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from rwkv_edge.plugins.fused import Kernels
from rwkv_edge.plugins.fused_spec import FusedKernel
from rwkv_edge.runtime.cuda_driver import Driver
from rwkv_edge.runtime.cuda_launch import Launch
from rwkv_edge.spec import ITEM_SIZE, ModelSpec

FLOAT = 4  # bytes

Part = Literal["att", "ffn"]
Give = Literal["state", "logits", "choice"]
"""What a step computes: the new state alone, the logits too, or also the greedy choice, which is the next token."""


@dataclass(frozen=True)
class StatePlaces:
    """Device addresses of the rows of a state that one chain advances.

    ``single`` by layer and name without the layer ('wkv'), updated in place; ``shifts`` by side and layer, (time mix,
    channel mix): a step reads one side and writes the other.
    """

    single: tuple[Mapping[str, int], ...]
    shifts: tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class Outputs:
    """Device addresses of what a chain reads and gives.

    Attributes:
        tokens: [B] int32.
        logits: [B, V] float32.
        halted: [B] int32; where it is not zero, the state of the stream stays as it is.
    """

    tokens: int
    logits: int
    halted: int


@dataclass(frozen=True, slots=True)
class Planned:
    """A launch whose arguments are addresses, or names of what differs between states and sides."""

    kernel: FusedKernel
    arguments: tuple[int | str, ...]

    def at(self, places: Mapping[str, int]) -> Launch:
        """The launch with these addresses."""
        pointers = tuple(places[at] if isinstance(at, str) else at for at in self.arguments)
        return Launch(self.kernel, pointers, self.kernel.grid)


@dataclass
class Buffers:
    """Scratch memory of a chain by name; made once, used by every state of that many streams."""

    driver: Driver
    by_name: dict[str, int] = field(default_factory=dict)
    floats: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, floats: int) -> None:
        """A buffer of float32."""
        self.by_name[name], self.floats[name] = self.driver.allocate(floats * FLOAT), floats

    def close(self) -> None:
        """Give the memory back."""
        for pointer in self.by_name.values():
            self.driver.free(pointer)
        self.by_name.clear()


class Chain:
    """The step of a model for a number of streams up to `rwkv_edge.plugins.fused.MAX_BATCH`."""

    def __init__(
        self,
        driver: Driver,
        spec: ModelSpec,
        kernels: Kernels,
        weights: Mapping[str, int],
    ) -> None:
        """Allocate the buffers; kernels are compiled when they are first launched.

        Args:
            driver: the GPU.
            spec: of the model.
            kernels: its kernels.
            weights: `Weights.address` of `rwkv_edge.runtime.cuda_weights`.
        """
        self._driver, self._spec, self._kernels, self._weights = driver, spec, kernels, weights
        self._buffers = Buffers(driver)
        for name, floats in kernels.buffers().items():
            self._buffers.add(name, floats * kernels.batch)

    def launches(self, state: StatePlaces, side: int, outputs: Outputs, give: Give) -> list[Launch]:
        """All kernels of one step in order.

        Args:
            state: what it advances.
            side: of the token shifts that hold the state before the step.
            outputs: see `Outputs`.
            give: 'state' alone, 'logits' too, or also the greedy 'choice', which takes the place of the token.
        """
        found: list[Launch] = []
        for layer, halves in enumerate(self._layers):
            for second, half in enumerate(halves):
                places = {
                    **state.single[layer], "tokens": outputs.tokens, "halted": outputs.halted,
                    "shift": state.shifts[side][layer][second], "shift.out": state.shifts[1 - side][layer][second],
                }  # fmt: skip
                found += [planned.at(places) for planned in half]
        if give != "state":
            found.append(self._head.at({"logits": outputs.logits}))
        if give == "choice":
            found.append(self._argmax.at({"tokens": outputs.tokens}))
        return found

    def fill_with_nan(self) -> None:
        """What a test does to find out whether a kernel reads what none has written."""
        for name, pointer in self._buffers.by_name.items():
            self._driver.upload(np.full(self._buffers.floats[name], np.nan, np.float32), pointer)

    def close(self) -> None:
        """Give the buffers back."""
        self._buffers.close()

    @cached_property
    def _layers(self) -> list[tuple[list[Planned], list[Planned]]]:
        """Time mix and channel mix of every layer."""
        return [(self._half(layer, "att"), self._half(layer, "ffn")) for layer in range(self._spec.n_layer)]

    @cached_property
    def _head(self) -> Planned:
        buffers = self._buffers.by_name
        places = {**buffers, "stream": buffers["stream.0"]}
        places |= {name: self._weights[name] for name in ("ln_out.weight", "ln_out.bias", "head", "head.scale")}
        return self._planned(self._kernels.head(), places, places)

    @cached_property
    def _argmax(self) -> Planned:
        return self._planned(self._kernels.argmax(), self._buffers.by_name, self._buffers.by_name)

    def _half(self, layer: int, part: Part) -> list[Planned]:
        """A half of a layer. Weights and buffers share no name: the checkpoint's are called value, key, receptance."""
        buffers, second = self._buffers.by_name, part == "ffn"
        inputs = {
            **buffers, **self._named(f"blocks.{layer}.{part}."), **self._norm(f"blocks.{layer}.ln{1 + second}"),
            "emb": self._weights["emb"], "emb.scale": self._weights["emb.scale"],
            "stream": buffers[f"stream.{int(second)}"],
        }  # fmt: skip
        given = {**buffers, "stream": buffers[f"stream.{1 - second}"]}
        kernels = self._kernels.channel_mix(layer) if second else self._kernels.time_mix(layer)
        return [self._planned(kernel, inputs, given) for kernel in kernels]

    def _named(self, prefix: str) -> dict[str, int]:
        """Weights of a part of a layer by what follows ``prefix``; rows of stacked coefficients by their own names."""
        found = {n.removeprefix(prefix): address for n, address in self._weights.items() if n.startswith(prefix)}
        row = self._kernels.dimensions.width * ITEM_SIZE[self._spec.act_dtype]
        if "mix" in found:
            found |= {name: found["mix"] + i * row for i, name in enumerate(self._kernels.rows)}
        return found

    def _norm(self, name: str) -> dict[str, int]:
        return {f"ln.{part}": self._weights[f"{name}.{part}"] for part in ("weight", "bias")}

    def _planned(self, kernel: FusedKernel, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> Planned:
        """A kernel; arguments that have no address here are the state's, or what a step reads and gives."""
        read = [inputs.get(name, name) for name in kernel.inputs]
        written = [outputs.get(name, "shift.out" if name == "shift" else name) for name in kernel.outputs]
        return Planned(kernel, (*read, *written))


def state_layout(spec: ModelSpec, batch: int) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
    """Offsets and sizes in bytes of state tensors [B, …] by name: those updated in place, and those with two sides.

    Every tensor begins at a multiple of 256 bytes.
    """
    single: dict[str, tuple[int, int]] = {}
    double: dict[str, tuple[int, int]] = {}
    ends = {id(single): 0, id(double): 0}
    for tensor in spec.state:
        group = single if tensor.name.startswith("wkv") else double
        nbytes = batch * tensor.nbytes
        group[tensor.name] = (ends[id(group)], nbytes)
        ends[id(group)] += -(-nbytes // 256) * 256
    return single, double


def row_bytes(spec: ModelSpec, name: str) -> int:
    """Bytes of one stream of a state tensor."""
    tensor = next(t for t in spec.state if t.name == name)
    size = ITEM_SIZE[tensor.dtype]
    for n in tensor.shape:
        size *= n
    return size
