"""Progress bars of counts on stderr, drawn on a terminal only."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from rwkv_edge.cli.common import hides_progress


class Percentage(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.4
    """A part in percent: '0.5%' or '0.5'."""

    name = "PERCENT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """'0.5%' → 0.005."""
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d{1,3}(?:\.\d{1,9})?) *%?", str(value), re.ASCII)
        if not found or not 0 < float(found[1]) < 100:
            self.fail(f"'{value}' is no percentage between 0 and 100", param, ctx)
        return float(found[1]) / 100


@contextlib.contextmanager
def count_progress() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Yields what makes a bar with the time that is left, of a label and a total; a new bar ends the one before."""
    with contextlib.ExitStack() as stack:

        def start(label: str, total: int) -> Callable[[int], None]:
            stack.close()
            hidden = hides_progress()
            steps = max(1, total // 200)
            bar = stack.enter_context(
                click.progressbar(
                    length=total,
                    label=f"{label} ({total:,})",
                    file=sys.stderr,
                    show_pos=False,
                    hidden=hidden,
                    update_min_steps=steps,
                )
            )

            def update(count: int) -> None:
                bar.update(count)

            return update

        yield start
