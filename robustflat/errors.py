"""What the command line tells without a traceback: a user's mistake, a training that broke off."""

from __future__ import annotations


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
