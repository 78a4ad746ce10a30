"""One step of RWKV-7 as a chain of fused kernels: buffers, the arguments of every launch, and its CUDA graphs.

Per layer: time_mix_in, wkv, time_mix_out, channel_mix_in, channel_mix_out; then the head and the greedy choice. The
residual stream is kept as a sum that is still open: the stream itself and the partial sums of the matrix before, which
the next kernel adds. Reference: `rwkv_edge.models.v7`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from rwkv_edge.plugins.fused import Kernels
from rwkv_edge.plugins.fused_spec import FusedKernel
from rwkv_edge.runtime.cuda_driver import Driver
from rwkv_edge.spec import ITEM_SIZE, ModelSpec

FLOAT = 4  # bytes

Give = Literal["state", "logits", "choice"]
"""What a step computes: the new state alone, the logits too, or also the greedy choice, which is the next token."""


@dataclass(frozen=True)
class StatePlaces:
    """Device addresses of the rows of a state that one chain advances.

    ``wkv`` by layer, updated in place; ``shifts`` by side and layer, (time mix, channel mix): a step reads one side and
    writes the other.
    """

    wkv: tuple[int, ...]
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


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments."""

    kernel: FusedKernel
    function: Any
    pointers: tuple[int, ...]


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

    def __init__(self, driver: Driver, spec: ModelSpec, kernels: Kernels, weights: Mapping[str, int]) -> None:
        """Compile the kernels and allocate the buffers.

        Args:
            driver: the GPU.
            spec: of the model.
            kernels: its kernels.
            weights: `Weights.address` of `rwkv_edge.runtime.cuda_weights`.
        """
        self._driver, self._spec, self._kernels, self._weights = driver, spec, kernels, weights
        self._functions: dict[FusedKernel, Any] = {}
        d, batch, tuning = kernels.dimensions, kernels.batch, kernels.tuning
        self._buffers = Buffers(driver)
        sizes = {
            "stream.0": d.width, "stream.1": d.width, "r": d.inner, "k": d.inner, "v": d.inner, "v_first": d.inner,
            "hw": d.rank_w, "ha": d.rank_a, "hg": d.rank_g, "hv": d.rank_v, "y": d.inner, "hidden": d.hidden,
            "parts": d.width * max(tuning.time_mix_out.split, tuning.channel_mix_out.split),
            "best": kernels.head_blocks,
            "best_at": kernels.head_blocks,
        }  # fmt: skip
        for name, floats in sizes.items():
            self._buffers.add(name, floats * batch)

    def launches(self, state: StatePlaces, side: int, outputs: Outputs, give: Give) -> list[Launch]:
        """All kernels of one step in order.

        Args:
            state: what it advances.
            side: of the token shifts that hold the state before the step.
            outputs: see `Outputs`.
            give: 'state' alone, 'logits' too, or also the greedy 'choice', which takes the place of the token.
        """
        found: list[Launch] = []
        for layer in range(self._spec.n_layer):
            found += self._time_mix(layer, state, side, outputs)
            found += self._channel_mix(layer, state, side, outputs)
        if give != "state":
            buffers = self._buffers.by_name
            places = {**buffers, "stream": buffers["stream.0"], "logits": outputs.logits}
            places |= {name: self._weights[name] for name in ("ln_out.weight", "ln_out.bias", "head", "head.scale")}
            found.append(self._launch(self._kernels.head(), places, places))
        if give == "choice":
            found.append(self._launch(self._kernels.argmax(), self._buffers.by_name, {"tokens": outputs.tokens}))
        return found

    def enqueue(self, launches: list[Launch]) -> None:
        """Put kernels on the stream. The first waits for all that is ahead; the others may overlap the one ahead."""
        for index, launch in enumerate(launches):
            kernel = launch.kernel
            self._driver.launch(
                launch.function, kernel.grid, kernel.threads, kernel.shared, launch.pointers, early=index > 0
            )

    def fill_with_nan(self) -> None:
        """What a test does to find out whether a kernel reads what none has written."""
        for name, pointer in self._buffers.by_name.items():
            self._driver.upload(np.full(self._buffers.floats[name], np.nan, np.float32), pointer)

    def close(self) -> None:
        """Give the buffers back."""
        self._buffers.close()

    def _time_mix(self, layer: int, state: StatePlaces, side: int, outputs: Outputs) -> list[Launch]:
        kernels, buffers = self._kernels, self._buffers.by_name
        att = self._named(f"blocks.{layer}.att.") | self._norm(f"blocks.{layer}.ln1")
        value = "v_first" if layer == 0 else "v"
        inputs = {
            **buffers, **att, "tokens": outputs.tokens, "emb": self._weights["emb"],
            "emb.scale": self._weights["emb.scale"], "stream": buffers["stream.0"], "halted": outputs.halted,
            "shift": state.shifts[side][layer][0], "v": buffers[value], "wkv": state.wkv[layer],
        }  # fmt: skip
        # weights and buffers share no name but v, k, r: those of the checkpoint are called value, key, receptance
        first = {**buffers, "stream": buffers["stream.1"], "shift": state.shifts[1 - side][layer][0]}
        first["v"] = buffers[value]
        second = {"y": buffers["y"], "wkv": state.wkv[layer]}
        return [
            self._launch(kernels.time_mix_in(layer), inputs, first),
            self._launch(kernels.wkv(layer), inputs, second),
            self._launch(kernels.time_mix_out(layer), inputs, buffers),
        ]

    def _channel_mix(self, layer: int, state: StatePlaces, side: int, outputs: Outputs) -> list[Launch]:
        kernels, buffers = self._kernels, self._buffers.by_name
        ffn = self._named(f"blocks.{layer}.ffn.") | self._norm(f"blocks.{layer}.ln2")
        inputs = {**buffers, **ffn, "stream": buffers["stream.1"], "shift": state.shifts[side][layer][1]}
        inputs["halted"] = outputs.halted
        given = {**buffers, "stream": buffers["stream.0"], "shift": state.shifts[1 - side][layer][1]}
        return [
            self._launch(kernels.channel_mix_in(layer), inputs, given),
            self._launch(kernels.channel_mix_out(layer), inputs, given),
        ]

    def _named(self, prefix: str) -> dict[str, int]:
        """Weights of a part of a layer by what follows ``prefix``."""
        return {n.removeprefix(prefix): address for n, address in self._weights.items() if n.startswith(prefix)}

    def _norm(self, name: str) -> dict[str, int]:
        return {f"ln.{part}": self._weights[f"{name}.{part}"] for part in ("weight", "bias")}

    def _launch(self, kernel: FusedKernel, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> Launch:
        if kernel not in self._functions:
            ptx = kernel.ptx(self._driver.capability)
            self._functions[kernel] = self._driver.function(ptx, kernel.name, kernel.shared)
        pointers = (*(inputs[name] for name in kernel.inputs), *(outputs[name] for name in kernel.outputs))
        return Launch(kernel, self._functions[kernel], pointers)


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
