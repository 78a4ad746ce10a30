"""RWKV-7 and 7a for M = B·T rows at once as a chain of wide kernels: prompts, and steps of large batches.

Per layer: norm and six mixes, their products, products of the LoRAs' second halves, the recurrence with group norm and
gate, output; norm and mix, key, value. In 7a (DeepEmbed) s1 beside the key, then the tokens' matrices, then s2, which
multiplies the hidden values. The residual stream is kept as a sum that is still open, as in
`rwkv_edge.runtime.cuda_chain`. Reference: `rwkv_edge.models.v7`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from rwkv_edge.plugins.fused_spec import EMBEDDING, Dimensions, FusedKernel, head_columns
from rwkv_edge.plugins.wide import GATE_THREADS, NORM_ROWS, PRODUCTS, WARP, Finish, Form, Tile, WideKernels
from rwkv_edge.runtime.cuda_chain import Give, Outputs, StatePlaces
from rwkv_edge.runtime.cuda_driver import Driver
from rwkv_edge.runtime.cuda_launch import Launch
from rwkv_edge.runtime.cuda_weights import Weights
from rwkv_edge.spec import ITEM_SIZE, ModelSpec

FLOAT: Final = 4  # bytes
MIX_R, MIX_W, MIX_K, MIX_V, MIX_A, MIX_G = range(6)  # the order in which the coefficients are stored


@dataclass(frozen=True)
class Matrix:
    """Where a matrix lies and how it is stored.

    Attributes:
        address: on the device.
        scale: address of its scales; without any, its own.
        form: how it is stored.
        block: inputs that share a scale in int4, else 0.
        pitch: columns in memory where there are more than are meant, else 0.
    """

    address: int
    scale: int
    form: Form
    block: int
    pitch: int = 0


@dataclass(frozen=True)
class Product:
    """output[m][n] = finish(Σ input[m][k]·matrix[k][n]), all of them device addresses; see wide_product.cuh."""

    input: int
    matrix: Matrix
    output: int
    columns: int
    depth: int
    finish: Finish = Finish.TO_FLOAT
    offset: int = 0
    other: int = 0

    @property
    def values(self) -> tuple[int, ...]:
        """In the order of `rwkv_edge.plugins.wide.PRODUCT`."""
        matrix = self.matrix
        return (
            self.input, matrix.address, matrix.scale, self.output, self.offset, self.other, self.columns,
            matrix.pitch or self.columns, self.depth, self.finish, matrix.form, matrix.block,
        )  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """What a chain advances by T tokens of B streams.

    Attributes:
        batch: B.
        tokens: T.
        ids: device address of the tokens, [B, T] int32.
        state: of the streams.
        side: of the token shifts that hold the state before them.
        halted: device address of flags [B] int32; where one is not zero, the state of the stream stays as it is.
    """

    batch: int
    tokens: int
    ids: int
    state: StatePlaces
    side: int
    halted: int

    @property
    def count(self) -> int:
        """M."""
        return self.batch * self.tokens


class WideChain:
    """The kernels and buffers of a model for up to so many rows."""

    def __init__(
        self,
        driver: Driver,
        spec: ModelSpec,
        dimensions: Dimensions,
        weights: Weights,
        rows: int,
    ) -> None:
        """Allocate the buffers; kernels are compiled when they are first needed.

        Args:
            driver: the GPU.
            spec: of the model.
            dimensions: of the model.
            weights: on the GPU.
            rows: the largest M.
        """
        self._driver, self._spec, self._weights, self.rows = driver, spec, weights.address, rows
        self._stored = weights.stored
        self._kernels = WideKernels(dimensions, rows, driver.capability, driver.multiprocessors)
        self._known: dict[Hashable, FusedKernel] = {}
        d, self._item = dimensions, ITEM_SIZE[dimensions.dtype]
        self._d = d
        self._split_out = self._kernels.split(d.inner, d.width)
        self._split_value = self._kernels.split(d.hidden, d.width)
        parts = max(self._split_out, self._split_value)
        floats = dict.fromkeys(("r", "w", "k", "v", "v_first", "a", "g", "y"), d.inner)
        floats["hs"] = d.rank_deep
        floats |= {"stream.0": d.width, "stream.1": d.width, "parts": parts * d.width, "bonus": d.heads}
        acts = {"mixed": 6 * d.width, "hw": d.rank_w, "ha": d.rank_a, "hg": d.rank_g, "hv": d.rank_v}
        acts |= {"gated": d.inner, "hidden": d.hidden, "turned": d.rank_deep}
        self._bytes = {name: FLOAT * rows * n for name, n in floats.items()}
        self._bytes |= {name: self._item * rows * n for name, n in acts.items()}
        self._bytes["ids"] = FLOAT * rows
        self._buffers = {name: driver.allocate(nbytes) for name, nbytes in self._bytes.items()}

    @property
    def ids(self) -> int:
        """Device memory for the tokens of a chunk, [M] int32."""
        return self._buffers["ids"]

    def launches(self, rows: Rows) -> list[Launch]:
        """All layers in order."""
        found: list[Launch] = []
        for layer in range(self._spec.n_layer):
            found += [self._mixes(layer, rows), self._first_products(layer, rows), self._second_products(layer, rows)]
            found += self._recurrence(layer, rows)
            found += [self._output(layer, rows), self._channel_mix(layer, rows), *self._feed_forward(layer, rows)]
        return found

    def step(self, batch: int, state: StatePlaces, side: int, outputs: Outputs, give: Give) -> list[Launch]:
        """One token of every stream, as `rwkv_edge.runtime.cuda_chain.Chain.launches` says."""
        found = self.launches(Rows(batch, 1, outputs.tokens, state, side, outputs.halted))
        if give != "state":
            found += [self.last_norm(batch, 1, 1), self.head(0, batch, outputs.logits)]
        if give == "choice":
            places = {"columns": self._d.vocabulary, "logits": outputs.logits, "ids": outputs.tokens}
            found.append(self._launch(self._made(self._kernels.argmax), (batch, 1, 1), places))
        return found

    def last_norm(self, batch: int, tokens: int, kept: int) -> Launch:
        """The normed rows of the last ``kept`` tokens of every stream, after `launches`: what `head` multiplies."""
        kernel = self._made(self._kernels.norm, 0, self._split_value, None, kept > 1)
        places = {**self._buffers, **self._norm("ln_out"), "stream": self._buffers["stream.0"]}
        grid = (-(-kept // NORM_ROWS) if kept > 1 else 1, batch, 1)
        return self._launch(kernel, grid, {**places, "tokens": tokens, "kept": kept})

    def head(self, first: int, count: int, logits: int) -> Launch:
        """Logits [count, V] float32 of the rows of `last_norm` from ``first`` on."""
        d = self._d
        source = self._buffers["mixed"] + first * d.width * self._item
        product = Product(source, self._matrix("head", head_columns(d.vocabulary)), logits, d.vocabulary, d.width)
        return self._products(count, [product], self._kernels.tile_of(count))

    def fill_with_nan(self) -> None:
        """What a test does to find out whether a kernel reads what none has written."""
        for name, pointer in self._buffers.items():
            self._driver.upload(np.full(self._bytes[name], 0xFF, np.uint8), pointer)  # NaN in every dtype

    def close(self) -> None:
        """Give the buffers back."""
        self._driver.free(*self._buffers.values())
        self._buffers.clear()

    def _mixes(self, layer: int, rows: Rows) -> Launch:
        kernel = self._made(self._kernels.norm, 6, self._split_value, self._embedded(layer), rows.tokens > 1)
        places = {
            **self._buffers, **self._norm(f"blocks.{layer}.ln1"), "ids": rows.ids, "table": self._weights[EMBEDDING],
            "table.scale": self._weights[f"{EMBEDDING}.scale"], "mix": self._weights[f"blocks.{layer}.att.mix"],
            "stream": self._buffers["stream.0"], "stream.out": self._buffers["stream.1"],
            "shift": rows.state.shifts[rows.side][layer][0], "shift.out": rows.state.shifts[1 - rows.side][layer][0],
        }  # fmt: skip
        return self._launch_norm(kernel, rows, places)

    def _channel_mix(self, layer: int, rows: Rows) -> Launch:
        kernel = self._made(self._kernels.norm, 1, self._split_out, None, rows.tokens > 1, self._is_deep)
        places = {
            **self._buffers, **self._norm(f"blocks.{layer}.ln2"), "mix": self._weights[f"blocks.{layer}.ffn.mix"],
            "stream": self._buffers["stream.1"], "stream.out": self._buffers["stream.0"],
            "shift": rows.state.shifts[rows.side][layer][1], "shift.out": rows.state.shifts[1 - rows.side][layer][1],
        }  # fmt: skip
        return self._launch_norm(kernel, rows, places)

    def _first_products(self, layer: int, rows: Rows) -> Launch:
        d, b = self._d, self._buffers
        value = "v_first" if layer == 0 else "v"
        wanted = [
            ("receptance", MIX_R, "r", d.inner, Finish.TO_FLOAT), ("key", MIX_K, "k", d.inner, Finish.TO_FLOAT),
            ("value", MIX_V, value, d.inner, Finish.TO_FLOAT), ("w1", MIX_W, "hw", d.rank_w, Finish.TO_TANH),
            ("a1", MIX_A, "ha", d.rank_a, Finish.TO_ACT), ("g1", MIX_G, "hg", d.rank_g, Finish.TO_SIGMOID),
        ]  # fmt: skip
        if layer > 0:
            wanted.append(("v1", MIX_V, "hv", d.rank_v, Finish.TO_ACT))
        size = rows.count * d.width * self._item
        return self._products(
            rows.count,
            [
                Product(b["mixed"] + mix * size, self._att_matrix(layer, name), b[to], columns, d.width, finish)
                for name, mix, to, columns, finish in wanted
            ],
        )

    def _second_products(self, layer: int, rows: Rows) -> Launch:
        d, b, att, matrix = self._d, self._buffers, partial(self._att, layer), partial(self._att_matrix, layer)
        wanted = [
            Product(b["hw"], matrix("w2"), b["w"], d.inner, d.rank_w, Finish.TO_DECAY, att("w0")),
            Product(b["ha"], matrix("a2"), b["a"], d.inner, d.rank_a, Finish.TO_RATE, att("a0")),
            Product(b["hg"], matrix("g2"), b["g"], d.inner, d.rank_g),
        ]
        if layer > 0:
            blend = Finish.TO_BLEND
            wanted.append(Product(b["hv"], matrix("v2"), b["v"], d.inner, d.rank_v, blend, att("v0"), b["v_first"]))
        return self._products(rows.count, wanted)

    def _recurrence(self, layer: int, rows: Rows) -> list[Launch]:
        d, kernels, made = self._d, self._kernels, self._made
        names = ("k_k", "k_a", "r_k", "ln_x.weight", "ln_x.bias")
        places = {**self._buffers, **{name: self._att(layer, name) for name in names}}
        places |= {"halted": rows.halted, "wkv": rows.state.single[layer]["wkv"], "tokens": rows.tokens}
        if layer == 0:
            places["v"] = self._buffers["v_first"]
        if rows.tokens == 1:
            return [self._launch(made(kernels.step), (d.heads, rows.batch, 1), places)]
        blocks = kernels.sequence_blocks(rows.batch), -(-d.heads * WARP // GATE_THREADS)
        return [
            self._launch(made(kernels.sequence, rows.batch), (blocks[0], d.heads, rows.batch), places),
            self._launch(made(kernels.gate), (blocks[1], rows.count, 1), places),
        ]

    def _output(self, layer: int, rows: Rows) -> Launch:
        d, b = self._d, self._buffers
        product = Product(b["gated"], self._att_matrix(layer, "output"), b["parts"], d.width, d.inner)
        return self._products(rows.count, [product], split=self._split_out)

    def _feed_forward(self, layer: int, rows: Rows) -> list[Launch]:
        d, b, matrix = self._d, self._buffers, partial(self._ffn_matrix, layer)
        firsts = [Product(b["mixed"], matrix("key"), b["hidden"], d.hidden, d.width, Finish.TO_RELU_SQUARE)]
        if self._is_deep:
            normed = b["mixed"] + rows.count * d.width * self._item
            firsts.append(Product(normed, matrix("s1"), b["hs"], d.rank_deep, d.width))
        value = Product(b["hidden"], matrix("value"), b["parts"], d.width, d.hidden)
        return [
            self._products(rows.count, firsts),
            *(self._deep_embed(layer, rows) if self._is_deep else ()),
            self._products(rows.count, [value], split=self._split_value),
        ]

    def _deep_embed(self, layer: int, rows: Rows) -> list[Launch]:
        """hidden ∘= (hs·E_token) s2 + s0."""
        d, b = self._d, self._buffers
        table, offset = (self._weights[f"blocks.{layer}.ffn.{name}"] for name in ("s_emb", "s0"))
        places = {**b, "ids": rows.ids, "s_emb": table}
        s2, finish = self._ffn_matrix(layer, "s2"), Finish.TO_MULTIPLE
        return [
            self._launch(self._made(self._kernels.deep_embed), (rows.count, 1, 1), places),
            self._products(rows.count, [Product(b["turned"], s2, b["hidden"], d.hidden, d.rank_deep, finish, offset)]),
        ]

    def _products(self, count: int, products: Sequence[Product], tile: Tile | None = None, split: int = 1) -> Launch:
        forms, tile = frozenset(product.matrix.form for product in products), tile or self._kernels.tile
        kernel = self._made(self._kernels.product, forms, split, tile)
        tiles = sum(-(-product.columns // tile.columns) for product in products)
        missing = (0,) * len(products[0].values) * (PRODUCTS - len(products))
        values = (count, *(value for product in products for value in product.values), *missing)
        return Launch(kernel, values, (tiles * -(-count // tile.rows), split, 1))

    def _launch_norm(self, kernel: FusedKernel, rows: Rows, places: Mapping[str, int]) -> Launch:
        blocks = -(-rows.tokens // NORM_ROWS) if rows.tokens > 1 else 1
        return self._launch(kernel, (blocks, rows.batch, 1), {**places, "tokens": rows.tokens, "halted": rows.halted})

    def _launch(self, kernel: FusedKernel, grid: tuple[int, int, int], places: Mapping[str, int]) -> Launch:
        return Launch(kernel, tuple(places[name] for name in kernel.inputs), grid)

    def _made(self, method: Callable[..., FusedKernel], *arguments: Hashable) -> FusedKernel:
        """A kernel of `WideKernels`, made once."""
        key = (method.__name__, *arguments)
        if key not in self._known:
            self._known[key] = method(*arguments)
        return self._known[key]

    def _embedded(self, layer: int) -> Form | None:
        """How the embedding is stored, for the layer that reads it."""
        return Form.of(self._stored.get(EMBEDDING)) if layer == 0 else None

    @property
    def _is_deep(self) -> bool:
        return self._d.rank_deep > 0

    def _ffn_matrix(self, layer: int, name: str) -> Matrix:
        return self._matrix(f"blocks.{layer}.ffn.{name}")

    def _att_matrix(self, layer: int, name: str) -> Matrix:
        return self._matrix(f"blocks.{layer}.att.{name}")

    def _matrix(self, name: str, pitch: int = 0) -> Matrix:
        stored = self._stored.get(name)
        block = (stored and stored.block) or 0
        return Matrix(self._weights[name], self._weights[f"{name}.scale"], Form.of(stored), block, pitch)

    def _att(self, layer: int, name: str) -> int:
        return self._weights[f"blocks.{layer}.att.{name}"]

    def _norm(self, name: str) -> dict[str, int]:
        return {f"ln.{part}": self._weights[f"{name}.{part}"] for part in ("weight", "bias")}
