"""RWKV-7 in plain torch, written for training: functions of a dict of tensors under the official key names.

Letters in shapes: B streams, T positions, D width, H heads, N head size, V vocabulary, C chunk length.
Names, shapes and initialisation of the weights are those of RWKV-LM (RWKV-v7, `x070`), the formulas those of the `rwkv`
package, with which `train_demo_model.py --check` compares this file. Everything runs in float32, except that matrix
products of the layers (never of the recurrence) follow `torch.autocast` where the caller turns it on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-5
GROUP_NORM_EPS = 64e-5  # 1e-5 * head_size_divisor² (8²), as in RWKV-LM
LOG_DECAY_SCALE = -0.606531  # -exp(-0.5): the decay exp(-0.606531 * sigmoid(.)) stays within (0.545, 1)
CHUNK = 32  # exp(0.606531 * 32) = 2.7e8 is the largest factor of the chunked form: harmless in float32

Weights = dict[str, Tensor]
Wkv = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Config:
    """Dimensions of a model. The defaults are those of the demo model, 3.0 million parameters."""

    layers: int = 6
    width: int = 192
    head_size: int = 64
    ffn_width: int = 768
    decay_rank: int = 32
    rate_rank: int = 32  # of `a`, the in-context learning rate
    value_rank: int = 16
    gate_rank: int = 32
    vocabulary: int = 256  # token id = byte


class LayerState(NamedTuple):
    """What one layer carries from a token to the next."""

    att_shift: Tensor  # [B, D]
    wkv: Tensor  # [B, H, N (value), N (key)] float32
    ffn_shift: Tensor  # [B, D]


State = list[LayerState]


def config_from_weights(weights: Weights) -> Config:
    """Read the dimensions off the shapes; KeyError if `weights` is no RWKV-7 model of two layers or more."""
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    return Config(
        layers=layers,
        width=weights["emb.weight"].shape[1],
        head_size=weights["blocks.0.att.r_k"].shape[1],
        ffn_width=weights["blocks.0.ffn.key.weight"].shape[0],
        decay_rank=weights["blocks.0.att.w1"].shape[1],
        rate_rank=weights["blocks.0.att.a1"].shape[1],
        value_rank=weights["blocks.1.att.v1"].shape[1],
        gate_rank=weights["blocks.0.att.g1"].shape[1],
        vocabulary=weights["emb.weight"].shape[0],
    )


def initial_weights(config: Config, generator: torch.Generator) -> Weights:
    """Fresh float32 weights, initialised as RWKV-LM does: embedding ±1e-4, outputs zero, other matrices orthogonal."""
    width = config.width
    weights = {
        "emb.weight": torch.empty(config.vocabulary, width).uniform_(-1e-4, 1e-4, generator=generator),
        **_layer_norm_weights("blocks.0.ln0", width),
    }
    for layer in range(config.layers):
        prefix = f"blocks.{layer}."
        weights |= _layer_norm_weights(prefix + "ln1", width) | _layer_norm_weights(prefix + "ln2", width)
        weights |= {
            prefix + "att." + name: value for name, value in _time_mix_weights(config, layer, generator).items()
        }
        weights |= {
            prefix + "ffn." + name: value for name, value in _channel_mix_weights(config, layer, generator).items()
        }
    head_gain = 0.5 * math.sqrt(max(1.0, config.vocabulary / width))
    return (
        weights
        | _layer_norm_weights("ln_out", width)
        | {"head.weight": _orthogonal(config.vocabulary, width, head_gain, generator)}
    )


def zero_state(config: Config, streams: int, device: torch.device) -> State:
    """The empty state of every layer."""
    heads, size = config.width // config.head_size, config.head_size
    return [
        LayerState(
            att_shift=torch.zeros(streams, config.width, device=device),
            wkv=torch.zeros(streams, heads, size, size, device=device),
            ffn_shift=torch.zeros(streams, config.width, device=device),
        )
        for _ in range(config.layers)
    ]


def forward(
    weights: Weights, tokens: Tensor, state: State, wkv: Wkv, dropout: float = 0.0, compiled: bool = False
) -> tuple[Tensor, State]:
    """Run tokens [B, T] from `state`; returns logits [B, T, V] and the state after the last token.

    `wkv` is `wkv_chunked` or its serial twin; `dropout` the rate on the embedding and on both branches of every layer;
    `compiled` runs the branches through torch.compile.
    """
    attend, feed = _compiled_mixes() if compiled else (time_mix, channel_mix)
    # A product with one-hot rows instead of a gather: exact, and its backward pass is deterministic on a GPU.
    with torch.autocast(tokens.device.type, enabled=False):
        table = _layer_norm(weights, "blocks.0.ln0", weights["emb.weight"])
        x = (tokens[..., None] == torch.arange(table.shape[0], device=tokens.device)).to(table.dtype) @ table
    x = F.dropout(x, dropout, training=dropout > 0)
    v_first: Tensor | None = None
    after: State = []
    for layer, before in enumerate(state):
        names = (*_TIME_MIX_NAMES, *_VALUE_MIX_NAMES) if layer else _TIME_MIX_NAMES
        p = {name: weights[f"blocks.{layer}.att.{name}"] for name in names}
        normed = _layer_norm(weights, f"blocks.{layer}.ln1", x)
        branch, wkv_state, v_first = attend(p, normed, before.att_shift, before.wkv, v_first, wkv)
        x = x + F.dropout(branch, dropout, training=dropout > 0)
        p = {name: weights[f"blocks.{layer}.ffn.{name}"] for name in _CHANNEL_MIX_NAMES}
        normed_ffn = _layer_norm(weights, f"blocks.{layer}.ln2", x)
        x = x + F.dropout(feed(p, normed_ffn, before.ffn_shift), dropout, training=dropout > 0)
        after.append(LayerState(normed[:, -1], wkv_state, normed_ffn[:, -1]))
    with torch.autocast(tokens.device.type, enabled=False):
        logits = F.linear(_layer_norm(weights, "ln_out", x.float()), weights["head.weight"])
    return logits, after


def time_mix(
    p: Weights, x: Tensor, shift: Tensor, state: Tensor, v_first: Tensor | None, wkv: Wkv
) -> tuple[Tensor, Tensor, Tensor]:
    """The attention half of a layer on x [B, T, D] (normed); returns its branch, the new wkv state and `v_first`.

    `p` holds the weights below `att.`; `v_first` is None in layer 0, which makes it.
    """
    split = (*x.shape[:2], *p["r_k"].shape)  # [B, T, H, N]
    delta = _shifted(x, shift) - x
    xr, xw, xk, xv, xa, xg = (x + delta * p["x_" + name] for name in "rwkvag")
    r, k, v = F.linear(xr, p["receptance.weight"]), F.linear(xk, p["key.weight"]), F.linear(xv, p["value.weight"])
    a = torch.sigmoid(p["a0"] + (xa @ p["a1"]) @ p["a2"])
    gate = torch.sigmoid(xg @ p["g1"]) @ p["g2"]
    log_decay = LOG_DECAY_SCALE * torch.sigmoid((p["w0"] + torch.tanh(xw @ p["w1"]) @ p["w2"]).float())
    kk = F.normalize((k * p["k_k"]).view(split).float(), dim=-1, eps=1e-12)
    k = k * (1 + (a - 1) * p["k_a"])
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(p["v0"] + (xv @ p["v1"]) @ p["v2"])
    rh, wh, kh, vh, ah = (t.view(split).float() for t in (r, log_decay, k, v, a))
    y, wkv_state = wkv(state, rh, wh, kh, vh, kk, ah)
    y = F.layer_norm(y, split[-1:], eps=GROUP_NORM_EPS).flatten(-2) * p["ln_x.weight"] + p["ln_x.bias"]
    y = y + ((rh * kh * p["r_k"]).sum(-1, keepdim=True) * vh).flatten(-2)
    return F.linear(y * gate, p["output.weight"]), wkv_state, v_first


def channel_mix(p: Weights, x: Tensor, shift: Tensor) -> Tensor:
    """The feed-forward half of a layer: squared ReLU of the token-shifted x [B, T, D], no receptance."""
    mixed = x + (_shifted(x, shift) - x) * p["x_k"]
    return F.linear(torch.relu(F.linear(mixed, p["key.weight"])) ** 2, p["value.weight"])


@functools.cache
def _compiled_mixes() -> tuple[
    Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[[Weights, Tensor, Tensor], Tensor]
]:
    """Both halves of a layer, fused by torch.compile: once for layer 0, once for all others."""
    return torch.compile(time_mix, dynamic=False), torch.compile(channel_mix, dynamic=False)


def wkv_serial(
    state: Tensor, r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is defined, one position after the other: the naive twin of `wkv_chunked`.

    S ← S·diag(w) − (S kk)(kk∘a)ᵀ + v kᵀ, y = S r; S [B, H, N (value), N (key)], the other inputs [B, T, H, N].
    """
    outputs = []
    for t in range(r.shape[1]):
        removed = state @ kk[:, t, :, :, None]
        state = (
            state * torch.exp(log_decay[:, t, :, None])
            - removed @ (kk * a)[:, t, :, None]
            + v[:, t, :, :, None] @ k[:, t, :, None]
        )
        outputs.append((state @ r[:, t, :, :, None]).squeeze(-1))
    return torch.stack(outputs, dim=1), state


def wkv_chunked(
    state: Tensor, r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor
) -> tuple[Tensor, Tensor]:
    """The same recurrence in chunks of C positions; only S ← S·M + Z, one product a chunk, is sequential.

    Let P_t be the decay accumulated since the chunk began, P'_t the same before t, and α_t = −kk_t∘P'_t. Unrolling
    `wkv_serial`, the rows u_t = (−S_{t−1} kk_t)ᵀ are U = (I − A)⁻¹(α Sᵀ + B V), with A_tj = α_t·(kk_j∘a_j/P_j) and
    B_tj = α_t·(k_j/P_j) for j < t. Positions beyond T are padded with a decay of 1 and zeros, which leave S unchanged.
    """
    with torch.autocast(r.device.type, enabled=False):
        length = r.shape[1]
        r, log_decay, k, v, kk, a = (_chunks(t) for t in (r, log_decay, k, v, kk, a))  # [B, H, T/C, C, N]
        lower = torch.ones(CHUNK, CHUNK, device=r.device).tril()
        cum = lower @ log_decay
        end = cum[..., -1:, :]
        alpha, rho = -kk * torch.exp(cum - log_decay), r * torch.exp(cum)
        beta, key = kk * a, k
        beta_in, key_in = (beta * torch.exp(-cum)).mT, (key * torch.exp(-cum)).mT
        beta_out, key_out = beta * torch.exp(end - cum), key * torch.exp(end - cum)
        inverse = unit_lower_inverse((alpha @ beta_in) * lower.tril(-1))
        from_state = inverse @ alpha  # U = from_state · Sᵀ + from_values
        from_values = inverse @ ((alpha @ key_in) * lower.tril(-1) @ v)
        rb = (rho @ beta_in) * lower
        read_state = rho + rb @ from_state
        y = rb @ from_values + ((rho @ key_in) * lower) @ v
        turn = from_state.mT @ beta_out  # M without its diagonal, the decay over the chunk [B, H, T/C, N, N]
        add = from_values.mT @ beta_out + v.mT @ key_out  # Z [B, H, T/C, N, N]
        before = []
        for decay, turned, added in zip(torch.exp(end).unbind(2), turn.unbind(2), add.unbind(2), strict=True):
            before.append(state)
            state = torch.addcmul(added, state, decay) + state @ turned
        y = y + read_state @ torch.stack(before, dim=2).mT
        return y.flatten(2, 3)[:, :, :length].transpose(1, 2), state


def unit_lower_inverse(a: Tensor) -> Tensor:
    """(I − a)⁻¹ of a strictly lower triangular [..., C, C], C a power of two, by doubling the solved diagonal blocks.

    The product (I + a)(I + a²)(I + a⁴)… is shorter but diverges on repeated tokens: powers grow before they vanish.
    """
    index = torch.arange(a.shape[-1], device=a.device)
    inverse, size = torch.eye(a.shape[-1], device=a.device).expand_as(a), 1
    while size < a.shape[-1]:
        block, half = index // (2 * size), index // size % 2
        off_diagonal = (block[:, None] == block) & (half[:, None] == 1) & (half == 0)
        inverse = inverse + inverse @ (a * off_diagonal) @ inverse
        size *= 2
    return inverse


_TIME_MIX_NAMES = (
    *("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "w1", "w2", "a0", "a1", "a2", "g1", "g2", "k_k", "k_a", "r_k"),
    *("receptance.weight", "key.weight", "value.weight", "output.weight", "ln_x.weight", "ln_x.bias"),
)
_VALUE_MIX_NAMES = ("v0", "v1", "v2")  # absent in layer 0
_CHANNEL_MIX_NAMES = ("x_k", "key.weight", "value.weight")


def _chunks(t: Tensor) -> Tensor:
    """[B, T, H, N] → [B, H, ⌈T/C⌉, C, N], zeros behind the last position."""
    padded = F.pad(t.transpose(1, 2), (0, 0, 0, -t.shape[1] % CHUNK))
    return padded.reshape(*padded.shape[:2], -1, CHUNK, padded.shape[-1])


def _shifted(x: Tensor, previous: Tensor) -> Tensor:
    """Every position's predecessor: `previous` [B, D], then x [B, T, D] without its last position."""
    return torch.cat((previous[:, None], x[:, :-1]), dim=1)


def _layer_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], LAYER_NORM_EPS)


def _layer_norm_weights(name: str, width: int) -> Weights:
    return {name + ".weight": torch.ones(width), name + ".bias": torch.zeros(width)}


def _orthogonal(rows: int, columns: int, gain: float, generator: torch.Generator) -> Tensor:
    return torch.nn.init.orthogonal_(torch.empty(rows, columns), gain=gain, generator=generator)


def _time_mix_weights(config: Config, layer: int, generator: torch.Generator) -> Weights:
    """The tensors below `att.`; every constant is RWKV-LM's. Layer 0 has no v0, v1, v2: nothing reads them there."""
    width, size = config.width, config.head_size
    depth, height = layer / max(1, config.layers - 1), 1.0 - layer / config.layers
    position = torch.arange(width) / width
    linear = torch.arange(width) / (width - 1)
    zigzag = (torch.arange(width) % size - (size - 1) / 2) / ((size - 1) / 2)
    zigzag = zigzag * zigzag.abs()
    exponents = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
    weights = {f"x_{name}": 1.0 - position ** (power * height) for name, power in exponents.items()}
    weights |= {
        "w0": -5.5 + 6 * linear ** (1 + depth**0.3) + 2.5 * zigzag,
        "a0": -0.19 + 0.3 * zigzag + 0.4 * (linear - 0.5),
        "k_k": 0.71 - 0.1 * (linear - 0.5),
        "k_a": torch.full((width,), 1.02),
    }
    ranks = {"w": config.decay_rank, "a": config.rate_rank, "g": config.gate_rank}
    if layer > 0:
        weights["v0"] = 0.73 - 0.4 * (linear - 0.5)
        ranks["v"] = config.value_rank
    weights = {name: value.reshape(1, 1, width) for name, value in weights.items()}
    for name, rank in ranks.items():
        weights[name + "1"] = torch.zeros(width, rank)
        weights[name + "2"] = _orthogonal(rank, width, 0.1, generator)
    weights["r_k"] = torch.full((width // size, size), -0.04)
    for name, gain in (("receptance", 1.0), ("key", 0.1), ("value", 1.0)):
        weights[name + ".weight"] = _orthogonal(width, width, gain, generator)
    weights["output.weight"] = torch.zeros(width, width)
    weights["ln_x.weight"] = torch.full((width,), ((1 + layer) / config.layers) ** 0.7)
    weights["ln_x.bias"] = torch.zeros(width)
    return weights


def _channel_mix_weights(config: Config, layer: int, generator: torch.Generator) -> Weights:
    """The tensors below `ffn.`, RWKV-LM's initialisation."""
    width = config.width
    position = torch.arange(width) / width
    return {
        "x_k": (1.0 - position ** ((1.0 - layer / config.layers) ** 4)).reshape(1, 1, width),
        "key.weight": _orthogonal(config.ffn_width, width, 1.0, generator),
        "value.weight": torch.zeros(width, config.ffn_width),
    }
