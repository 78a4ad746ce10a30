"""The library's log is a command's notes."""

from __future__ import annotations

import logging

import click
import pytest

from rwkv_edge.cli import _noted
from rwkv_edge.cli.common import QUIET


@pytest.mark.parametrize("quiet", [False, True])
def test_log_of_the_library(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    logger, root = logging.getLogger("rwkv_edge.runtime.any"), logging.getLogger("rwkv_edge")
    before = (root.level, list(root.handlers), root.propagate)
    context = click.Context(click.Command("any"))
    context.meta[QUIET] = quiet
    with _noted(), context.scope():
        logger.info("compiling kernels\x1b[2J")
        logger.debug("a detail")
        logging.getLogger("other").info("not ours")
    assert capsys.readouterr() == ("", "" if quiet else "compiling kernels\\x1b[2J\n")
    assert (root.level, list(root.handlers), root.propagate) == before
