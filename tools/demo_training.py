"""Train a byte-level RWKV-7 on one text, with the state carried from segment to segment.

B streams read the text in order, T bytes a step; gradients end where a segment begins; now and then a stream restarts
elsewhere from an empty state. So the model meets states that are thousands of bytes old, as it will in use. On CUDA one
graph holds the whole step, and the matrix products of the layers run in bfloat16.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from demo_measure import ToolError
from rwkv7_torch import Config, LayerState, Weights, forward, initial_weights, wkv_chunked, zero_state
from torch import Tensor

WARM_UP_STEPS = 100
EAGER_STEPS = 3  # before CUDA graph capture, so that libraries and optimizer state are initialised
REPORT_EVERY = 100


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults, with --compile on one H100, made the demo model."""

    steps: int = 2400
    seed: int = 0
    streams: int = 64  # B
    segment: int = 256  # T, bytes that a stream reads in a step
    restart: float = 1 / 16  # chance that a stream restarts empty at a step
    learning_rate: float = 2e-3
    final_rate: float = 0.02  # share of the learning rate that the cosine ends on
    weight_decay: float = 1.0
    dropout: float = 0.3
    corruption: float = 0.0  # share of the input bytes that random bytes of the text replace
    averaging: float = 0.998  # decay of the moving average of the weights, which is what is stored
    clip: float = 1.0  # largest norm of a gradient


class Streams:
    """B readers of one text that advance T bytes a step and restart at random."""

    def __init__(self, text: Tensor, recipe: Recipe) -> None:
        self.text, self.recipe = text, recipe
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.last = len(text) - recipe.segment - 1
        self.position = torch.randint(self.last + 1, (recipe.streams,), generator=self.generator)
        self.offsets = torch.arange(recipe.segment + 1, device=text.device)

    def advance(self) -> tuple[Tensor, Tensor]:
        """The next windows [B, T + 1], and keep [B]: 0 for streams that start from an empty state, else 1."""
        shape, generator, device = self.position.shape, self.generator, self.text.device
        fresh = (torch.rand(shape, generator=generator) < self.recipe.restart) | (self.position > self.last)
        start = torch.where(fresh, torch.randint(self.last + 1, shape, generator=generator), self.position)
        self.position = start + self.recipe.segment
        return self.text[start.to(device)[:, None] + self.offsets], (~fresh).to(device, torch.float32)


class Trainer:
    """Weights, their average, optimizer and carried state; buffers stay in place, so that a CUDA graph can replay."""

    def __init__(self, config: Config, recipe: Recipe, text: Tensor, compiled: bool) -> None:
        self.recipe, self.text, device = recipe, text, text.device
        torch.manual_seed(recipe.seed)  # dropout and corruption
        fresh = initial_weights(config, torch.Generator().manual_seed(recipe.seed))
        self.weights = {name: value.to(device).requires_grad_() for name, value in fresh.items()}
        self.average = {name: value.detach().clone() for name, value in self.weights.items()}
        self.state = zero_state(config, recipe.streams, device)
        self.window = torch.zeros(recipe.streams, recipe.segment + 1, dtype=torch.long, device=device)
        self.keep = torch.zeros(recipe.streams, device=device)
        self.loss, self.average_decay = torch.zeros((), device=device), torch.zeros((), device=device)
        self.on_gpu = device.type == "cuda"
        self.compiled = compiled
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.weights, recipe.weight_decay, device),
            betas=(0.9, 0.99),
            eps=1e-15,  # gradients of a ±1e-4 embedding are tiny; RWKV-LM takes 1e-18
            fused=self.on_gpu,
            capturable=self.on_gpu,
        )

    def load(self, step: int, window: Tensor, keep: Tensor) -> None:
        """Fill the buffers that `update` reads."""
        self.window.copy_(window)
        self.keep.copy_(keep)
        self.average_decay.fill_(min(self.recipe.averaging, (1 + step) / (10 + step)))
        for group in self.optimizer.param_groups:
            group["lr"].fill_(group["scale"] * learning_rate(self.recipe, step))

    def update(self) -> None:
        """One step of training: reads the loaded buffers, writes `loss`, `state`, `weights` and `average`."""
        before = [LayerState(*(_masked(value, self.keep) for value in layer)) for layer in self.state]
        with torch.autocast(self.text.device.type, torch.bfloat16, enabled=self.on_gpu):
            logits, after = forward(
                self.weights, self._inputs(), before, wkv_chunked, self.recipe.dropout, self.compiled
            )
        loss = F.cross_entropy(logits.float().flatten(0, 1), self.window[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(self.weights.values()))
        with torch.no_grad():
            self.loss.copy_(loss)
            for layer, result in zip(self.state, after, strict=True):
                for value, new in zip(layer, result, strict=True):
                    value.copy_(new)
            self._apply(gradients)

    def _inputs(self) -> Tensor:
        """The window's bytes but the last [B, T], some of them replaced."""
        inputs = self.window[:, :-1]
        if self.recipe.corruption == 0:
            return inputs
        noise = self.text[torch.randint(len(self.text), inputs.shape, device=inputs.device)]
        return torch.where(torch.rand(inputs.shape, device=inputs.device) < self.recipe.corruption, noise, inputs)

    def _apply(self, gradients: Sequence[Tensor]) -> None:
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        scale = self.recipe.clip / norm.clamp(min=self.recipe.clip)
        for value, gradient in zip(self.weights.values(), gradients, strict=True):
            value.grad = gradient * scale
        self.optimizer.step()
        for name, average in self.average.items():
            average.lerp_(self.weights[name], 1 - self.average_decay)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to `final_rate` of the peak."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
    return recipe.learning_rate * warm_up * (recipe.final_rate + (1 - recipe.final_rate) * cosine)


def trained(config: Config, recipe: Recipe, text: Tensor, eager: bool, compiled: bool) -> tuple[Weights, float]:
    """Train on `text` [bytes]; returns the averaged weights and the mean loss of the last steps, in bits per byte.

    Raises ToolError if the loss stops being finite. `eager` does without the CUDA graph, `compiled`
    turns the layers into fused kernels first (torch.compile).
    """
    repeatable()
    trainer, streams = Trainer(config, recipe, text, compiled), Streams(text, recipe)
    graph: torch.cuda.CUDAGraph | None = None
    mean, counted, started = torch.zeros((), device=text.device), 0, time.monotonic()
    for step in range(recipe.steps):
        trainer.load(step, *streams.advance())
        if trainer.on_gpu and not eager and step == EAGER_STEPS:
            graph = captured(trainer)
        if graph is None:
            trainer.update()
        else:
            graph.replay()
        mean, counted = mean + trainer.loss, counted + 1
        if counted == REPORT_EVERY or step == recipe.steps - 1:
            bits = mean.item() / counted / math.log(2)
            print(f"step {step + 1:5d}  {bits:.4f} bits per byte  {time.monotonic() - started:.1f} s", flush=True)
            if not math.isfinite(bits):
                raise ToolError("the loss is no longer finite: try a smaller --learning-rate")
            mean, counted = torch.zeros_like(mean), 0
    return trainer.average, bits


def repeatable() -> None:
    """Ask for deterministic kernels, as far as a GPU has them; to be called before the first product on it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # NVIDIA's condition for reproducible cuBLAS results
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def captured(trainer: Trainer) -> torch.cuda.CUDAGraph:
    """The training step as a CUDA graph. Capture records and does not run: the caller replays."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trainer.update()
    return graph


def _parameter_groups(weights: Weights, decay: float, device: torch.device) -> list[dict[str, Any]]:
    """RWKV-LM's three groups: matrices called .weight decay, att.w0 learns at twice the rate, the rest is plain."""
    names: dict[str, list[str]] = {"decay": [], "fast": [], "plain": []}
    for name, value in weights.items():
        matrix = name.endswith(".weight") and value.dim() == 2
        names["decay" if matrix else "fast" if name.endswith("att.w0") else "plain"].append(name)
    return [
        {
            "params": [weights[name] for name in members],
            "weight_decay": decay if kind == "decay" else 0.0,
            "scale": 2.0 if kind == "fast" else 1.0,
            "lr": torch.zeros((), device=device),  # a tensor, so that a CUDA graph reads its present value
        }
        for kind, members in names.items()
    ]


def _masked(value: Tensor, keep: Tensor) -> Tensor:
    """`value` [B, …] with zeros for the streams whose `keep` [B] is 0."""
    return value * keep.view(-1, *(1 for _ in value.shape[1:]))
