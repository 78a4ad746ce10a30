"""Which linear gets which format: the scheme, what the version keeps, and what the user chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rwkv_edge.errors import InputError
from rwkv_edge.models.architecture import Architecture

SCHEMES = ("w8a8", "w8", "w4", "mixed")
FORMATS = ("float", "w8a8", "w8", "w4")
"""Of one linear: as exported; int8 times int8 with a static range; int8 weights; int4 weights in blocks."""

BLOCKS = (32, 64, 128)
TARGETS = ("any", "cpu")
HEAD = "head"
EMBEDDING = "emb"
HEAD_CHOICES = ("int8", "int4", "float")
EMBEDDING_CHOICES = ("float", "int8")


@dataclass(frozen=True)
class SchemeOptions:
    """What decides the formats.

    Attributes:
        scheme: a name in `SCHEMES`.
        block: inputs that share a scale in int4: 32, 64 or 128; halved for a linear that has no multiple of it.
        head: 'int8', 'int4' or 'float'.
        embedding: 'float', or 'int8' with a scale for each token.
        target: 'any' for standard operators, 'cpu' for those that ONNX Runtime's CPU provider runs fastest.
    """

    scheme: str = "w8"
    block: int = 32
    head: str = "int8"
    embedding: str = "float"
    target: str = "any"

    def __post_init__(self) -> None:
        choices = {
            "scheme": SCHEMES, "block": BLOCKS, "head": HEAD_CHOICES, "embedding": EMBEDDING_CHOICES, "target": TARGETS,
        }  # fmt: skip
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"{name} must be one of {', '.join(map(str, allowed))}, not '{value}'")
        if self.scheme == "w8a8" and self.target == "cpu":
            raise InputError(
                "the CPU form quantizes activations as they come, so it has no use for the ranges of w8a8; "
                "take --scheme w8, or leave --target cpu out"
            )


def planned_formats(
    linears: Mapping[str, tuple[int, int]], architecture: Architecture, options: SchemeOptions
) -> dict[str, str]:
    """The format of every linear under a scheme; 'mixed' counts as w8 here.

    Args:
        linears: name → [in, out].
        architecture: of the version: what it keeps.
        options: the scheme.
    """
    scheme = "w8" if options.scheme == "mixed" else options.scheme
    formats = {}
    for name, shape in linears.items():
        wanted = scheme
        if name == HEAD:
            wanted = {"int8": "w8a8" if scheme == "w8a8" else "w8", "int4": "w4", "float": "float"}[options.head]
        formats[name] = allowed_format(name, shape, wanted, architecture, options.block)
    return formats


def allowed_format(name: str, shape: tuple[int, int], wanted: str, architecture: Architecture, block: int) -> str:
    """``wanted``, or the next wider format that the version and the shape allow."""
    if is_part_of(name, architecture.keep_float):
        return "float"
    if wanted == "w4" and (is_part_of(name, architecture.keep_int8) or block_of(shape[0], block) is None):
        return "w8"
    return wanted


def is_part_of(name: str, parts: Sequence[str]) -> bool:
    """Whether a parameter's name holds one of ``parts``."""
    return any(part in name for part in parts)


def block_of(width: int, block: int) -> int | None:
    """The largest block up to ``block`` that divides ``width``; None where none of `BLOCKS` does."""
    return max((size for size in BLOCKS if size <= block and width % size == 0), default=None)


def group_of(name: str) -> str:
    """What is decided together: 'blocks.3.att', 'blocks.3.ffn', 'head'."""
    return name.rpartition(".")[0] or name
