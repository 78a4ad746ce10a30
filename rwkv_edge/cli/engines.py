"""The options of `build`, which `export --format engine` takes too, and its progress bars."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from rwkv_edge.cli.common import PATH, hides_progress, note, size
from rwkv_edge.errors import InputError

if TYPE_CHECKING:
    from rwkv_edge.artifact import Manifest
    from rwkv_edge.exporters.tensorrt import BuildOptions

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--backend", {
        "type": click.Choice(["auto", "tensorrt", "tensorrt-rtx"]), "default": "auto", "show_default": True,
        "help": "What builds and runs the engines.",
    }),
    ("--target", {
        "multiple": True, "metavar": "SM",
        "help": "GPU to build for: sm75, sm86, sm89, sm120…; repeatable.  [default: the one of this machine]",
    }),
    ("--timing-cache", {"type": PATH, "metavar": "FILE", "help": "Measured kernel times: read if there, then kept."}),
    ("--workspace", {"type": click.IntRange(1), "metavar": "MB", "help": "Most scratch memory of an engine."}),
    ("--opt-level", {"type": click.IntRange(0, 5), "metavar": "N", "help": "The builder's effort, from 0 to 5."}),
    ("--refit", {"is_flag": True, "help": "Let weights be exchanged in the engine later."}),
    ("--version-compatible", {"is_flag": True, "help": "Let later versions of this TensorRT's major release run it."}),
    ("--max-batch", {
        "type": click.IntRange(1), "default": 8, "show_default": True, "metavar": "N",
        "help": "Most streams of an engine, where the artifact was exported with --batch dynamic.",
    }),
    ("--sample-k", {
        "type": click.IntRange(0, 3840), "default": 0, "show_default": "none", "metavar": "K",
        "help": "Let the engine find the K largest logits, so that only these leave the GPU where they decide a token.",
    }),
)  # fmt: skip


def engine_options(function: F) -> F:
    """All of `BuildOptions` as options, but the form of the recurrence."""
    for name, settings in reversed(_OPTIONS):
        function = click.option(name, **settings)(function)
    return function


def build_options(given: Mapping[str, Any], wkv: str | None, keep_graphs: bool = True) -> BuildOptions:
    """What the options say.

    Raises:
        InputError: a value is out of range.
    """
    from rwkv_edge.exporters.tensorrt import BuildOptions

    values = dict(given)
    return BuildOptions(targets=tuple(values.pop("target")), wkv=wkv, keep_graphs=keep_graphs, **values)


def planned_engines(form: str, precision: str, wkv: str, given: Mapping[str, Any]) -> BuildOptions | None:
    """What an export builds afterwards; None for 'onnx'. Refuses what will not work before anything is exported.

    Raises:
        InputError: options of engines where none is built, or something that the backend or the GPU has not.
        MissingDependencyError: the backend is not installed.
    """
    if form == "onnx":
        context = click.get_current_context()
        for name, _ in _OPTIONS:
            source = context.get_parameter_source(name.removeprefix("--").replace("-", "_"))
            if source is ParameterSource.COMMANDLINE:
                raise InputError(f"{name} is for engines; add --format both")
        if wkv == "plugin":
            raise InputError("a plugin is part of an engine; add --format both, or export with --wkv function or fused")
        return None
    from rwkv_edge.exporters.tensorrt import plan_build

    options = build_options(given, "plugin" if wkv == "plugin" else None, keep_graphs=form == "both")
    plan_build(options, precision, "function" if wkv == "plugin" else wkv)
    return options


def add_engines(artifact: Path, options: BuildOptions | None) -> None:
    """Build the engines of an artifact and say so; nothing without options."""
    if options is None:
        return
    from rwkv_edge.exporters.tensorrt import build_engines

    note(f"{artifact}: {engine_summary(build_engines(artifact, options, engine_progress))}", err=False)


@contextlib.contextmanager
def engine_progress(label: str) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr for one engine, drawn on a terminal only; yields what is told the part that is done."""
    with click.progressbar(length=100, label=label, file=sys.stderr, show_pos=False, hidden=hides_progress()) as bar:

        def report(fraction: float) -> None:
            if steps := int(fraction * 100) - bar.pos:
                bar.update(steps)

        yield report


def engine_summary(manifest: Manifest) -> str:
    """One line about the engines that were built."""
    engines = manifest.engines
    names = ", ".join(engine.file for engine in engines)
    nbytes = sum(manifest.files[engine.file].nbytes for engine in engines)
    first = next(engine for engine in engines if engine.kind == "step")
    return (
        f"{names} for {', '.join(first.targets)}, {first.backend} {first.version}, wkv {first.wkv}, "
        f"{f'{first.sample_k} candidates, ' if first.sample_k else ''}{size(nbytes)}, "
        f"{sum(engine.seconds for engine in engines):.1f} s"
    )
