"""The vocabulary in eager torch: the reference that exported graphs are compared with.

Written for clarity: the recurrence is a loop over tokens in the plainest form of the formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn import functional

from rwkv_edge.models.versions import Model
from rwkv_edge.spec import ModelSpec


class TorchOps:
    """Interpreter of `rwkv_edge.models.ops.Ops` over torch tensors on the CPU."""

    def __init__(self, params: Mapping[str, torch.Tensor], spec: ModelSpec, batch: int, act: torch.dtype) -> None:
        """``act`` is the dtype of activations; float64 makes everything float64."""
        self._params = params
        self._spec = spec
        self._batch = batch
        self._act = act
        self._wide = torch.float64 if act == torch.float64 else torch.float32

    def param(self, name: str) -> torch.Tensor:
        """See `Ops.param`, as for all that follows."""
        return self._params[name]

    def embed(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """[R] → [R, D]."""
        return self._params[name][tokens]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """x · W."""
        return x @ self._params[name]

    def layer_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """LayerNorm over the last axis."""
        return functional.layer_norm(
            x, x.shape[-1:], self._params[f"{name}.weight"], self._params[f"{name}.bias"], 1e-5
        )

    def residual(self, x: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """x + update."""
        return x + update

    def token_shift(self, x: torch.Tensor, previous: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows before each row, and the last row of each stream."""
        streams = x.reshape(self._batch, -1, x.shape[-1])
        before = torch.cat([previous[:, None], streams[:, :-1]], dim=1)
        return before.reshape(-1, x.shape[-1]), streams[:, -1]

    def mix(self, x: torch.Tensor, delta: torch.Tensor, name: str, count: int) -> tuple[torch.Tensor, ...]:
        """x + delta∘μ_i."""
        mixed = x + delta * self._params[name]
        return tuple(mixed[i : i + 1] for i in range(count)) if count > 1 else (mixed,)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """[..., R, D] → [R, H, N]."""
        return x.reshape(-1, self._spec.n_head, self._spec.head_size)

    def merge_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[R, H, N] → [R, D]."""
        return x.reshape(-1, self._spec.n_att)

    def fp32(self, x: torch.Tensor) -> torch.Tensor:
        """To float32, or float64 in a float64 run."""
        return x.to(self._wide)

    def act(self, x: torch.Tensor) -> torch.Tensor:
        """To the activations' dtype."""
        return x.to(self._act)

    def sigmoid(self, x: torch.Tensor) -> torch.Tensor:
        """1 / (1 + e^-x)."""
        return torch.sigmoid(x)

    def tanh(self, x: torch.Tensor) -> torch.Tensor:
        """Hyperbolic tangent."""
        return torch.tanh(x)

    def exp(self, x: torch.Tensor) -> torch.Tensor:
        """e^x."""
        return torch.exp(x)

    def relu_squared(self, x: torch.Tensor) -> torch.Tensor:
        """max(x, 0)²."""
        return torch.relu(x).square()

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """x / max(‖x‖, 1e-12)."""
        return functional.normalize(x, dim=-1, p=2.0, eps=1e-12)

    def head_norm(self, x: torch.Tensor, eps: float) -> torch.Tensor:
        """Normalise each head."""
        return functional.layer_norm(x, x.shape[-1:], eps=eps)

    def head_sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over N, axis kept."""
        return x.sum(-1, keepdim=True)

    def wkv7(
        self,
        state: torch.Tensor,
        r: torch.Tensor,
        decay_log: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kk: torch.Tensor,
        a: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token by token, in the order of the paper's formula."""
        w = torch.exp(decay_log)
        streams = [t.reshape(self._batch, -1, *t.shape[1:]) for t in (r, w, k, v, kk, a)]
        outputs = []
        for t in range(streams[0].shape[1]):
            r_t, w_t, k_t, v_t, kk_t, a_t = (s[:, t] for s in streams)  # each [B, H, N]
            removed = torch.einsum("bhvk,bhk->bhv", state, kk_t)
            state = (
                state * w_t[:, :, None, :]
                - removed[..., None] * (kk_t * a_t)[:, :, None, :]
                + v_t[..., None] * k_t[:, :, None, :]
            )
            outputs.append(torch.einsum("bhvk,bhk->bhv", state, r_t))
        return torch.stack(outputs, 1).reshape(r.shape), state

    def wkv4(
        self,
        state: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        decay: torch.Tensor,
        first: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Token by token, exponents relative to their maximum."""
        num, den, top = state
        keys, values = (t.reshape(self._batch, -1, t.shape[-1]) for t in (k, v))
        outputs = []
        for t in range(keys.shape[1]):
            k_t, v_t = keys[:, t], values[:, t]
            p = torch.maximum(top, first + k_t)
            old, new = torch.exp(top - p), torch.exp(first + k_t - p)
            outputs.append((old * num + new * v_t) / (old * den + new))
            q = torch.maximum(top + decay, k_t)
            old, new = torch.exp(top + decay - q), torch.exp(k_t - q)
            num, den, top = old * num + new * v_t, old * den + new, q
        return torch.stack(outputs, 1).reshape(-1, k.shape[-1]), (num, den, top)

    def wkv5(
        self,
        state: torch.Tensor,
        r: torch.Tensor,
        decay_log: torch.Tensor,
        first: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`wkv6` with the same decay for every token."""
        return self.wkv6(state, r, decay_log.expand(r.shape), first, k, v)

    def wkv6(
        self,
        state: torch.Tensor,
        r: torch.Tensor,
        decay_log: torch.Tensor,
        first: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token by token; S is [key, value]."""
        streams = [t.reshape(self._batch, -1, *t.shape[1:]) for t in (r, torch.exp(decay_log), k, v)]
        outputs = []
        for t in range(streams[0].shape[1]):
            r_t, w_t, k_t, v_t = (s[:, t] for s in streams)  # each [B, H, N]
            added = k_t[..., None] * v_t[:, :, None, :]
            outputs.append(torch.einsum("bhk,bhkv->bhv", r_t, state + first[..., None] * added))
            state = state * w_t[..., None] + added
        return torch.stack(outputs, 1).reshape(r.shape), state

    def mix_lora(
        self, x: torch.Tensor, delta: torch.Tensor, name: str, inner: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, ...]:
        """x + delta∘(μ_i + inner_i·W_i)."""
        parts = inner.reshape(inner.shape[-2], count, -1).transpose(0, 1) @ self._params[f"{name}.w2"]
        mixed = x + delta * (self._params[name] + parts)
        return tuple(mixed[i : i + 1] for i in range(count))

    def token_matrix(self, x: torch.Tensor, name: str, tokens: torch.Tensor, rank: int) -> torch.Tensor:
        """One [r, r] matrix per row."""
        matrices = self._params[name][tokens].reshape(-1, rank, rank)
        return torch.einsum("rj,rjk->rk", x.reshape(-1, rank), matrices)

    def last_row(self, x: torch.Tensor) -> torch.Tensor:
        """[R, D] → [B, D]."""
        return x.reshape(self._batch, -1, x.shape[-1])[:, -1]


class TorchModel:
    """A checkpoint run by eager torch, statelessly: the caller keeps the state."""

    def __init__(self, model: Model, dtype: torch.dtype | None = None) -> None:
        """Loads all weights.

        Args:
            model: its spec's precision is the dtype of the activations.
            dtype: float64 to run everything in it instead.
        """
        self.spec = model.spec
        self._model = model
        self._dtype = dtype = dtype or getattr(torch, model.spec.act_dtype)
        self._wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._params = {
            p.name: torch.cat(list(p.chunks(model.checkpoint, dtype if p.dtype == "act" else self._wide)))
            for p in model.params
        }

    def initial_state(self, batch: int = 1) -> dict[str, torch.Tensor]:
        """The state before the first token, each tensor [B, …]."""
        return {
            t.name: torch.full((batch, *t.shape), t.fill, dtype=self._wide if t.dtype == "float32" else self._dtype)
            for t in self.spec.state
        }

    def state_from_arrays(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """State tensors by name, each [B, …], in the dtypes of this model."""
        return {
            t.name: torch.tensor(arrays[t.name]).to(self._wide if t.dtype == "float32" else self._dtype)
            for t in self.spec.state
        }

    @torch.no_grad()
    def forward(
        self, tokens: np.ndarray | Sequence[Sequence[int]], state: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Feed tokens [B, T]; returns logits [B, V] of the last token in float32 (float64), and the new state."""
        ids = torch.as_tensor(np.asarray(tokens, np.int64))
        ops = TorchOps(self._params, self.spec, ids.shape[0], self._dtype)
        return self._model.architecture.step(ops, self.spec, ids.reshape(-1), state)
