"""The meaning in numpy of the wide kernels; see `cuda_double`. Some of their arguments are numbers, not pointers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rwkv_edge.plugins.fused_spec import rounded_up
from rwkv_edge.plugins.wide import NORM_ROWS, PRODUCT, PRODUCTS, Finish, Form
from rwkv_edge.spec import float32_from_stored, numpy_dtype, stored_from_float32

if TYPE_CHECKING:
    from cuda_double import Arguments

DECAY_SCALE = -0.6065306597126334


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def normed(x: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def number(a: Arguments) -> int:
    return a.pointers.pop(0)


def norm(a: Arguments) -> None:
    tokens, batch = number(a), a.macros["grid"][1]
    if a.EMBED:
        x = embedded(a, a.take(batch, tokens, dtype="int32"))
    else:
        x = a.take(batch, tokens, a.WIDTH)
        x = x + a.take(a.PARTS, batch, tokens, a.WIDTH).sum(0)
    weight, bias = (a.take(a.WIDTH, dtype=a.act) for _ in range(2))
    xn = normed(x, 1e-5) * weight + bias
    if a.MIXES == 0:
        kept = number(a)
        assert a.macros["grid"][0] == -(-kept // a.ROWS)
        a.give(xn[:, -kept:], a.act)
        return a.done()
    assert a.macros["grid"][0] == -(-tokens // a.ROWS)
    assert (NORM_ROWS if tokens > 1 else 1) == a.ROWS
    shift, mix = a.take(batch, a.WIDTH, dtype=a.act), a.take(a.MIXES, a.WIDTH, dtype=a.act)
    halted = a.take(batch, dtype="int32") != 0
    before = np.concatenate([shift[:, None], xn[:, :-1]], 1)
    a.give(x)
    a.give(np.where(halted[:, None], shift, xn[:, -1]), a.act)
    mixed = xn + (before - xn) * mix[:, None, None]
    a.give(np.concatenate([mixed, xn[None]]) if a.PLAIN else mixed, a.act)
    return a.done()


def embedded(a: Arguments, ids: np.ndarray) -> np.ndarray:
    """Rows of the embedding; in int8 with a scale each."""
    table, scales, size = number(a), number(a), numpy_dtype(a.act).itemsize
    dtype, item = ("int8", 1) if a.EMBED_INT8 else (a.act, size)
    rows = np.stack([a.driver.view(table + int(t) * a.WIDTH * item, (a.WIDTH,), dtype) for t in ids.reshape(-1)])
    if a.EMBED_INT8:
        scale = np.stack([a.driver.view(scales + int(t) * size, (1,), a.act) for t in ids.reshape(-1)])
        rows = rows.astype(np.float32) * float32_from_stored(scale, a.act)
    else:
        rows = float32_from_stored(rows, a.act)
    return rows.reshape(*ids.shape, a.WIDTH)


def product(a: Arguments) -> None:
    rows = number(a)
    tiles = 0
    for _ in range(PRODUCTS):
        one = {name: number(a) for name in PRODUCT}
        if one["columns"]:
            tiles += -(-one["columns"] // a.TILE_N)
            multiply(a, rows, one)
    assert a.macros["grid"][:2] == [tiles * -(-rows // a.TILE_M), a.SPLIT]
    a.done()


def multiply(a: Arguments, rows: int, one: dict[str, int]) -> None:
    columns, depth, finish = one["columns"], one["depth"], Finish(one["finish"])

    def read(pointer: int, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
        return float32_from_stored(a.driver.view(pointer, shape, dtype).copy(), dtype)

    def write(value: np.ndarray, dtype: str = "float32") -> None:
        target = a.driver.view(one["output"], value.shape, dtype)
        target[...] = stored_from_float32(value.astype(np.float32), dtype)

    assert a.FORMS >> one["form"] & 1
    x, matrix = read(one["input"], (rows, depth), a.act), matrix_of(a, one)[:, :columns]
    if finish == Finish.TO_FLOAT:
        share = rounded_up(rounded_up(depth, a.TILE_K) // a.TILE_K, a.SPLIT) // a.SPLIT * a.TILE_K
        ranges = [slice(i * share, (i + 1) * share) for i in range(a.SPLIT)]
        parts = [row_by_row(x[:, inputs], matrix[inputs]) for inputs in ranges]
        return write(np.stack(parts))
    assert a.SPLIT == 1
    y = row_by_row(x, matrix)
    narrow = {
        Finish.TO_ACT: lambda: y, Finish.TO_TANH: lambda: np.tanh(y), Finish.TO_SIGMOID: lambda: sigmoid(y),
        Finish.TO_RELU_SQUARE: lambda: np.maximum(y, 0) ** 2,
    }  # fmt: skip
    if finish in narrow:
        return write(narrow[finish](), a.act)
    y = y + read(one["offset"], (columns,), "float32" if finish == Finish.TO_DECAY else a.act)
    if finish == Finish.TO_DECAY:
        return write(np.exp(DECAY_SCALE * sigmoid(y)))
    if finish == Finish.TO_RATE:
        return write(sigmoid(y))
    if finish == Finish.TO_MULTIPLE:
        return write(read(one["output"], (rows, columns), a.act) * y, a.act)
    own, first = read(one["output"], (rows, columns)), read(one["other"], (rows, columns))
    return write(own + (first - own) * sigmoid(y))


def row_by_row(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The bits of a row depend on no other row, as on the GPU; a product of all would round them by their place."""
    return np.stack([row @ matrix for row in np.ascontiguousarray(x)])


def matrix_of(a: Arguments, one: dict[str, int]) -> np.ndarray:
    """[depth, pitch]: a head may have more columns in memory than are meant."""
    shape, form = (one["depth"], one["pitch"]), Form(one["form"])
    if form == Form.IN_FLOAT:
        return float32_from_stored(a.driver.view(one["matrix"], shape, a.act).copy(), a.act)
    rows, repeat = (1, one["depth"]) if form == Form.IN_INT8 else (one["depth"] // one["block"], one["block"])
    stored = a.driver.view(one["scale"], (rows, one["pitch"]), a.act).copy()
    scales = np.repeat(float32_from_stored(stored, a.act), repeat, 0)
    if form == Form.IN_INT8:
        return a.driver.view(one["matrix"], shape, "int8").astype(np.float32) * scales
    pairs = a.driver.view(one["matrix"], (one["depth"], one["pitch"] // 2), "uint8")
    nibbles = np.stack([pairs & 15, pairs >> 4], -1).reshape(shape)
    return ((nibbles ^ 8).astype(np.float32) - 8) * scales


def recurrence(
    vectors: list[np.ndarray], parameters: list[np.ndarray], state: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[B, T, H, N] each → y [B, T, H, N], bonus [B, T, H], the new state."""
    (r, w, k, v, a), (k_k, k_a, r_k) = vectors, parameters
    kk = k * k_k
    kk = kk / np.maximum(np.linalg.norm(kk, axis=-1, keepdims=True), 1e-12)
    k = k * ((a - 1) * k_a + 1)
    rows = []
    for t in range(r.shape[1]):
        removed = np.einsum("bhij,bhj->bhi", state, kk[:, t])
        state = state * w[:, t, :, None] - removed[..., None] * (kk * a)[:, t, :, None]
        state = state + v[:, t, ..., None] * k[:, t, :, None]
        rows.append(np.einsum("bhij,bhj->bhi", state, r[:, t]))
    return np.stack(rows, 1), (r * k * r_k).sum(-1), state


def vectors_of(a: Arguments, batch: int, tokens: int, count: int) -> list[np.ndarray]:
    return [a.take(batch, tokens, a.INNER // a.HEAD, a.HEAD) for _ in range(count)]


def step(a: Arguments) -> None:
    heads, batch, _ = a.macros["grid"]
    assert heads == a.INNER // a.HEAD
    *vectors, gate = vectors_of(a, batch, 1, 6)
    *parameters, weight, bias = (a.take(heads, a.HEAD) for _ in range(5))
    halted = a.take(batch, dtype="int32") != 0
    state = a.driver.view(a.pointers.pop(0), (batch, heads, a.HEAD, a.HEAD))
    y, bonus, after = recurrence(vectors, parameters, state.copy())
    state[...] = np.where(halted[:, None, None, None], state, after)
    a.give((normed(y, 64e-5) * weight + bias + bonus[..., None] * vectors[3]) * gate, a.act)
    a.done()


def sequence(a: Arguments) -> None:
    tokens, (blocks, heads, batch) = number(a), a.macros["grid"]
    assert blocks * a.CONSUMERS * a.ROWS >= a.HEAD * a.LANES
    vectors = vectors_of(a, batch, tokens, 5)
    parameters = [a.take(heads, a.HEAD) for _ in range(3)]
    halted = a.take(batch, dtype="int32") != 0
    state = a.driver.view(a.pointers.pop(0), (batch, heads, a.HEAD, a.HEAD))
    y, bonus, after = recurrence(vectors, parameters, state.copy())
    state[...] = np.where(halted[:, None, None, None], state, after)
    a.give(y)
    a.give(bonus)
    a.done()


def gate(a: Arguments) -> None:
    rows, heads = a.macros["grid"][1], a.INNER // a.HEAD
    assert a.macros["grid"][0] == -(-heads // (a.THREADS // 32))
    y, v, g = (a.take(rows, heads, a.HEAD) for _ in range(3))
    bonus, weight, bias = a.take(rows, heads), a.take(heads, a.HEAD), a.take(heads, a.HEAD)
    a.give((normed(y, 64e-5) * weight + bias + bonus[..., None] * v) * g, a.act)
    a.done()


def deep_embed(a: Arguments) -> None:
    rows = a.macros["grid"][0]
    ids, table, low = a.take(rows, dtype="int32"), number(a), a.take(rows, a.RANK)
    nbytes = a.RANK**2 * numpy_dtype(a.act).itemsize
    matrices = [a.driver.view(table + int(t) * nbytes, (a.RANK, a.RANK), a.act).copy() for t in ids]
    a.give(np.stack([x @ float32_from_stored(m, a.act) for x, m in zip(low, matrices, strict=True)]), a.act)
    a.done()


def argmax(a: Arguments) -> None:
    columns = number(a)
    a.give(a.take(a.macros["grid"][0], columns).argmax(1), "int32")
    a.done()


KERNELS = {
    "wide_norm.cu": norm,
    "wide_product.cu": product,
    "wide_product_plain.cu": product,
    "wide_step.cu": step,
    "wide_sequence.cu": sequence,
    "wide_gate.cu": gate,
    "wide_deep_embed.cu": deep_embed,
    "wide_argmax.cu": argmax,
}
