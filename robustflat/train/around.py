"""What asks a training to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signals(
    request: Callable[[int], None], *, kept_after_a_fault: bool = False
) -> Iterator[None]:
    """Let SIGTERM, and SIGUSR1 (Slurm: the time is nearly over), call ``request``.

    Args:
        request: is handed the signal's number.
        kept_after_a_fault: do so after an exception too. torchrun sends SIGTERM to the others of a
            process that died, and they shall not end before they have said what they know.
    """
    before = {}

    def handler(signum: int, frame: FrameType | None) -> None:
        request(signum)

    try:
        for which in (signal.SIGTERM, signal.SIGUSR1):
            before[which] = signal.signal(which, handler)
    except ValueError:  # not in the main thread, where signals are somebody else's
        yield
        return
    try:
        yield
    except BaseException:
        if kept_after_a_fault:
            before.clear()
        raise
    finally:
        for which, former in before.items():
            signal.signal(which, former)
