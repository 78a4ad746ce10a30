"""Measure a byte-level RWKV-7: bits per byte in parallel and step by step, a sample, agreement with `rwkv`."""

from __future__ import annotations

import importlib
import math
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rwkv7_torch import State, Weights, config_from_weights, forward, wkv_chunked, wkv_serial, zero_state
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

CHECK_BYTES = 100
CHECK_SPLIT = 37  # no multiple of the chunk length
CHECK_TOLERANCE = 1e-4  # max-abs difference of logits
PARALLEL_SEGMENT = 4096  # bytes a call; the state is carried, so it bounds memory and changes nothing else


class ToolError(Exception):
    """Something the user can mend; the message is one sentence."""


def load_weights(path: Path) -> Weights:
    """Weights of a .safetensors or .pth file, as float32 whatever their stored dtype."""
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        config_from_weights(weights)
    except pickle.UnpicklingError as error:
        raise ToolError(f"{path} is neither .safetensors nor a .pth file of plain tensors") from error
    except (OSError, SafetensorError, EOFError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ToolError(f"{path} cannot be read as .safetensors or .pth weights: {reason}") from error
    except (KeyError, ValueError, AttributeError, IndexError, TypeError) as error:
        raise ToolError(f"{path} was expected to hold an RWKV-7 model under the official names: {error!r}") from error
    return {name: value.float() for name, value in weights.items()}


@torch.no_grad()
def bits_per_byte(weights: Weights, text: Tensor) -> float:
    """Mean of −log2 p(byte | bytes before it) over `text` [T] from its second byte on; chunked, from an empty state."""
    state = zero_state(config_from_weights(weights), 1, text.device)
    total = 0.0
    for start in range(0, len(text) - 1, PARALLEL_SEGMENT):
        window = text[start : start + PARALLEL_SEGMENT + 1]
        logits, state = forward(weights, window[None, :-1], state, wkv_chunked)
        total += F.cross_entropy(logits[0], window[1:], reduction="sum").item()
    return total / (len(text) - 1) / math.log(2)


@torch.no_grad()
def bits_per_byte_serial(weights: Weights, text: Tensor) -> float:
    """The same figure by the serial form, one byte a call: what a device does that has nothing but its state."""
    state = zero_state(config_from_weights(weights), 1, text.device)
    total = torch.zeros((), dtype=torch.float64, device=text.device)
    for t in range(len(text) - 1):
        logits, state = forward(weights, text[None, t : t + 1], state, wkv_serial)
        total += F.cross_entropy(logits[0], text[t + 1 : t + 2])
    return total.item() / (len(text) - 1) / math.log(2)


@torch.no_grad()
def generated(weights: Weights, prompt: bytes, count: int, temperature: float, seed: int) -> bytes:
    """`count` bytes sampled after `prompt` from an empty state."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt)])
    state: State = zero_state(config_from_weights(weights), 1, tokens.device)
    sampled = bytearray()
    for _ in range(count):
        logits, state = forward(weights, tokens, state, wkv_serial)
        tokens = torch.multinomial(torch.softmax(logits[:, -1] / temperature, dim=-1), 1, generator=generator)
        sampled.append(int(tokens))
    return bytes(sampled)


@torch.no_grad()
def largest_difference(weights: Weights) -> float:
    """Max-abs difference of the logits after each of 100 bytes: chunked form here, against the `rwkv` package.

    Random bytes, then one byte repeated (hard for chunked forms); the second call starts from the state of the first.
    """
    config = config_from_weights(weights)
    tokens = torch.randint(config.vocabulary, (CHECK_BYTES,), generator=torch.Generator().manual_seed(0))
    tokens[CHECK_BYTES // 2 :] = tokens[CHECK_BYTES // 2]
    first, state = forward(weights, tokens[None, :CHECK_SPLIT], zero_state(config, 1, tokens.device), wkv_chunked)
    second, _ = forward(weights, tokens[None, CHECK_SPLIT:], state, wkv_chunked)
    ours = torch.cat((first[0], second[0]))
    theirs = _rwkv_package_logits(weights, tokens.tolist())
    return (ours - theirs).abs().max().item()


def _rwkv_package_logits(weights: Weights, tokens: list[int]) -> Tensor:
    """Logits [T, V] after each token, by the reference implementation, float32 on the CPU, one token a call."""
    os.environ["RWKV_V7_ON"] = "1"  # read when rwkv.model is imported
    try:
        package = importlib.import_module("rwkv.model")
    except ImportError as error:
        raise ToolError(f"--check needs the package rwkv: pip install rwkv ({error})") from error
    with tempfile.TemporaryDirectory() as folder:
        torch.save(weights, Path(folder, "model.pth"))
        model: Any = package.RWKV(model=str(Path(folder, "model")), strategy="cpu fp32")
    state, rows = None, []
    for token in tokens:
        logits, state = model.forward([token], state)
        rows.append(logits)
    return torch.stack(rows)
