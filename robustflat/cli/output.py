"""What commands write to, beside their files: a console, and lines on stderr."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from typing import IO, TYPE_CHECKING, TextIO, cast

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from robustflat.evaluate import Team


class _Lines(logging.Handler):
    """Says on stderr, a line each, what the measurements tell: their cost before they start."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


class _Unpadded(io.TextIOBase):
    """A file for programs to read: no line ends in blanks, with which rich fills up titles."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The file's: rich draws only what it can hold."""
        return self._file.encoding or "utf-8"

    def write(self, text: str) -> int:
        """Write whole lines, as rich does."""
        return self._file.write(re.sub(r" +$", "", text, flags=re.MULTILINE))

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()


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
    file = None if sys.stdout.isatty() else cast("IO[str]", _Unpadded(sys.stdout))
    return Console(file=file, width=None if known else 200, quiet=quiet)


def note(out: Console, text: str) -> None:
    """A doubt or a limit, beside the figures."""
    out.print(f"note: {text}", style="yellow", markup=False)
