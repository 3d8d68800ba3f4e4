"""The one exception type that stands for a mistake of the user's, not of the program's."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: a setting, file or combination that cannot work.

    The message is one or more sentences: what, got, why, what to do. The command line prints it
    without a traceback and exits with code 2.
    """
