"""The sampling options of `generate` (and of whatever else draws tokens)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rwkv_edge.errors import InputError

if TYPE_CHECKING:
    from rwkv_edge.runtime.sampling import Sampler

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("--temperature", 1.0, "Divides the logits; 0 always takes the most likely token."),
    ("--top-k", 0, "Keep the K most likely tokens; 0 keeps all."),
    ("--top-p", 1.0, "Keep the most likely tokens that reach this probability."),
    ("--min-p", 0.0, "Drop tokens below this share of the largest probability."),
    ("--presence-penalty", 0.0, "Subtracted from logits of tokens generated before."),
    ("--frequency-penalty", 0.0, "Subtracted once for every time a token was generated."),
    ("--penalty-decay", 0.996, "Factor on those counts after each token."),
    ("--repetition-penalty", 1.0, "Divides the logits of tokens seen before."),
)


def sampling_options(function: F) -> F:
    """All parameters of `SamplerConfig` as options."""
    function = click.option("--seed", type=int, metavar="N", help="Draw the same text every time.")(function)
    function = click.option(
        "--logit-bias", multiple=True, metavar="TOKEN=BIAS", help="Added to a token's logit; -inf bans it. Repeatable."
    )(function)
    for name, default, text in reversed(_OPTIONS):
        metavar = "N" if isinstance(default, int) else "X"
        function = click.option(name, default=default, show_default=True, metavar=metavar, help=text)(function)
    return function


def sampler_from_options(options: Mapping[str, Any]) -> Sampler:
    """The sampler that the options describe.

    Raises:
        InputError: a value is out of range.
    """
    from rwkv_edge.runtime.sampling import Sampler, SamplerConfig

    values = dict(options)
    values["logit_bias"] = dict(_bias(text) for text in values.pop("logit_bias"))
    return Sampler(SamplerConfig(**values))


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        found = int(token), float(bias)
    except ValueError as error:
        raise InputError(f"a logit bias is TOKEN=BIAS, such as 0=-inf, not '{text}'") from error
    if not 0 <= found[0] < 1 << 31:
        raise InputError(f"a logit bias is TOKEN=BIAS, but there is no token {token}")
    return found
