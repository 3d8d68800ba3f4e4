"""What the command line tells without a traceback: a user's mistake, a training that broke off."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: a setting, file or combination that cannot work.

    The message is one or more sentences: what, got, why, what to do. The command line prints it
    without a traceback and exits with code 2.
    """


class TrainingDivergedError(RuntimeError):
    """Loss or gradient stopped being finite; the message names the step and what can be done."""


class ProcessLostError(RuntimeError):
    """Another process of the same training ended or cannot be reached."""


def reason(error: BaseException) -> str:
    """What went wrong, to stand in a sentence: the first line of the message, else the type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def nearest(name: str, known: Iterable[str], most: int = 2) -> str:
    """The known names that are most like one that is none, as a question; empty if none are.

    Such as ``" Did you mean 'sam' or 'asam'?"``, to follow a sentence.
    """
    near = difflib.get_close_matches(name, list(known), n=most)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def missing(what: str, package: str, extra: str) -> UserError:
    """What to say where ``what`` cannot be had, as a package of an extra is not installed."""
    return UserError(
        f"{what} needs the package {package}, which is not installed. Run: pip install "
        f"'robustflat[{extra}]'."
    )
