"""Owns the exit codes of a worker, and what an ending means in words."""

from __future__ import annotations

import signal
from pathlib import Path

DONE, FAILED, STOPPED, CLAIMED = 0, 1, 3, 4


def explain(code: int, log: Path) -> str:
    """Why a worker that left no reason ended with ``code`` (negative: by that signal)."""
    if code == STOPPED:
        how = "It was stopped from outside"
    elif code < 0:
        known = {s.value: s.name for s in signal.Signals}
        how = f"It was killed by {known.get(-code, f'signal {-code}')}"
        how += ", perhaps for want of memory" if -code == 9 else ""
    else:
        how = f"It ended with code {code}"
    return f"{how}; {log} tells how far it came. Repeat the command to go on with it."
