"""A small random checkpoint of every version."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rwkv_edge.evaluation.synthetic import Shape, Shape7, random_v4, random_v5, random_v6, random_v7

MAKERS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "4": lambda: random_v4(Shape()),
    "5.0": lambda: random_v5(Shape(), "5.0"),
    "5.1": lambda: random_v5(Shape(), "5.1"),
    "5.2": lambda: random_v5(Shape(), "5.2"),
    "6": lambda: random_v6(Shape()),
    "7": lambda: random_v7(Shape7()),
    "7a": lambda: random_v7(Shape7(), deep_embed=32),
}
"""Version → weights by official names: 2 layers × 128, 2 heads."""
