"""What commands write to, beside their files: a console, and lines on stderr."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from robustflat.evaluate import Team


class _Lines(logging.Handler):
    """Says on stderr, a line each, what the measurements tell: their cost before they start."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


def begin() -> tuple[Team, Console]:
    """The processes that measure together, and the console, on which the first alone writes.

    On stderr it says what measurements do.
    """
    from robustflat.evaluate import Team

    team = Team.of_torchrun()
    if team.is_first:
        logger = logging.getLogger("robustflat")
        logger.setLevel(logging.INFO)
        if not any(isinstance(handler, _Lines) for handler in logger.handlers):
            logger.addHandler(_Lines())
    return team, console(quiet=not team.is_first)


def console(quiet: bool = False) -> Console:
    """As wide as COLUMNS says, or the terminal is; where there is none, wide enough for most."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(quiet=quiet) if known else Console(width=200, quiet=quiet)


def note(out: Console, text: str) -> None:
    """A doubt or a limit, beside the figures."""
    out.print(f"note: {text}", style="yellow", markup=False)
