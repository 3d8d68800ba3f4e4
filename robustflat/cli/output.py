"""What commands write to, beside their files: a console, and lines on stderr."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console


class _Lines(logging.Handler):
    """Says on stderr, a line each, what the measurements tell: their cost before they start."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


def speak() -> None:
    """Have measurements say on stderr what they do."""
    logger = logging.getLogger("robustflat")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())


def console(quiet: bool = False) -> Console:
    """As wide as COLUMNS says, or the terminal is; where there is none, wide enough for most."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(quiet=quiet) if known else Console(width=200, quiet=quiet)


def note(out: Console, text: str) -> None:
    """A doubt or a limit, beside the figures."""
    out.print(f"note: {text}", style="yellow", markup=False)
