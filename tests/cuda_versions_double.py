"""The meaning in numpy of the fused kernels of RWKV-4 to 6 and 7a; see `cuda_double`, which has those of RWKV-7."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from cuda_double import Arguments, embedded, normed, residual, shifted, sigmoid

from rwkv_edge.spec import float32_from_stored

MIXES = ("w", "k", "v", "r", "g")  # the order of RWKV-6's mixed inputs


FINISH: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "PLAIN": lambda x: x,
    "TANH": np.tanh,
    "SIGMOID": sigmoid,
    "RELU_SQUARED": lambda x: np.maximum(x, 0) ** 2,
}


def mix_in(a: Arguments) -> None:
    columns = [int(a.macros[f"COLUMNS_{i}"]) for i in range(a.PRODUCTS)]
    x = embedded(a) if a.EMBED else residual(a)
    before = a.take(a.BATCH, a.WIDTH, dtype=a.act)
    weight, bias = (a.take(a.WIDTH, dtype=a.act) for _ in range(2))
    xn = normed(x, 1e-5) * weight + bias
    mixes = [a.take(a.WIDTH, dtype=a.act) for _ in columns]
    matrices = a.matrices(*((a.WIDTH, n) for n in columns))
    after = shifted(a, xn, before)
    a.give(x)
    a.give(after, a.act)
    if a.NORMED:
        a.give(xn)
    for i, (mix, matrix) in enumerate(zip(mixes, matrices, strict=True)):
        mixed = before + (xn - before) * mix if a.BEFORE else xn + (before - xn) * mix
        source = xn if a.PLAIN_INPUT >> i & 1 else mixed
        a.give(FINISH[a.macros[f"FINISH_{i}"]](source @ matrix))
    a.done()


def mixes6(a: Arguments) -> None:
    xn, before = a.take(a.BATCH, a.WIDTH), a.take(a.BATCH, a.WIDTH, dtype=a.act)
    hidden = a.take(a.BATCH, len(MIXES), a.RANK)
    mix, second = a.take(len(MIXES), 1, a.WIDTH, dtype=a.act), a.weight(len(MIXES), a.RANK, a.WIDTH)
    a.give(xn + (before - xn) * (mix + np.einsum("bir,ird->ibd", hidden, second)))
    a.done()


def time_mix_in6(a: Arguments) -> None:
    mixed = dict(zip(MIXES, a.take(len(MIXES), a.BATCH, a.WIDTH), strict=True))
    matrices = a.matrices(*[(a.WIDTH, a.INNER)] * 4, (a.WIDTH, a.RANK))
    for name, matrix in zip("rkvgw", matrices, strict=True):
        product = mixed[name] @ matrix
        a.give(np.tanh(product) if name == "w" else product)
    a.done()


def wkv6(a: Arguments) -> None:
    batch, heads = a.macros["grid"][1], a.INNER // a.HEAD
    r, k, v = (a.take(batch, heads, a.HEAD) for _ in range(3))
    gate = a.take(batch, heads, a.HEAD) if a.GATE else None
    half = (a.take(batch, a.RANK) @ a.weight(a.RANK, a.INNER)).reshape(r.shape) if a.RANK else None
    decay, first, weight, bias = (a.take(heads, a.HEAD) for _ in range(4))
    old = a.take(batch, heads, a.HEAD, a.HEAD)
    halted = a.halted(batch)
    w = np.exp(decay) + np.zeros_like(r) if half is None else np.exp(-np.exp(decay + half))
    added = k[..., None] * v[:, :, None, :]
    y = np.einsum("bhk,bhkv->bhv", r, old + first[..., None] * added)
    y = normed(y, 64e-5) * weight + bias
    a.give(y if gate is None else y * gate * sigmoid(gate))
    a.give(np.where(halted[:, None, None, None], old, old * w[..., None] + added))
    a.done()


def wkv4(a: Arguments) -> None:
    batch = a.macros["grid"][1]
    r, k, v = (a.take(batch, a.INNER) for _ in range(3))
    decay, first = a.take(a.INNER), a.take(a.INNER)
    num, den, top = state = [a.take(batch, a.INNER) for _ in range(3)]
    halted = a.halted(batch)[:, None]
    p = np.maximum(top, first + k)
    past, current = np.exp(top - p), np.exp(first + k - p)
    a.give(r * (past * num + current * v) / (past * den + current))
    q = np.maximum(top + decay, k)
    kept, added = np.exp(top + decay - q), np.exp(k - q)
    for old, new in zip(state, (kept * num + added * v, kept * den + added, q), strict=True):
        a.give(np.where(halted, old, new))
    a.done()


def deep_embed(a: Arguments) -> None:
    tokens, table = a.take(a.BATCH, dtype="int32"), a.pointers.pop(0)
    low = a.take(a.BATCH, a.RANK)
    (second,) = a.matrices((a.RANK, a.HIDDEN))
    offset, hidden = a.take(a.HIDDEN, dtype=a.act), a.take(a.BATCH, a.HIDDEN)
    item = {"float32": 4}.get(a.act, 2)
    turned = np.empty_like(low)
    for b, token in enumerate(tokens):
        matrix = a.driver.view(table + int(token) * a.RANK**2 * item, (a.RANK, a.RANK), a.act)
        turned[b] = low[b] @ float32_from_stored(matrix.copy(), a.act)
    a.give(hidden * (turned @ second + offset))
    a.done()


KERNELS = {
    "mix_in.cu": mix_in,
    "v6_mixes.cu": mixes6,
    "v6_time_mix_in.cu": time_mix_in6,
    "v6_wkv.cu": wkv6,
    "v4_wkv.cu": wkv4,
    "v7a_deep_embed.cu": deep_embed,
}
