"""Progress bars of counts on stderr, drawn on a terminal only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import click


@contextlib.contextmanager
def count_progress() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Yields what makes a bar with the time that is left, of a label and a total; a new bar ends the one before."""
    with contextlib.ExitStack() as stack:

        def start(label: str, total: int) -> Callable[[int], None]:
            stack.close()
            hidden = sys.stderr is None or not sys.stderr.isatty()
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
