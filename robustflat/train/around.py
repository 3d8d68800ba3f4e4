"""Those around a training: who is told what happens, and what asks it to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol


class Listener(Protocol):
    """Is told what happens; cannot change it."""

    def on_start(self, epochs: int, steps: int, done: int) -> None:
        """The run has ``epochs`` epochs of ``steps`` steps, ``done`` of the former behind it."""

    def on_step(self, epoch: int, step: int) -> None:
        """Step ``step`` of ``epoch`` (both from 0) was taken."""

    def on_epoch(self, row: dict[str, Any]) -> None:
        """An epoch ended; ``row`` is its line of metrics.jsonl."""

    def on_end(self) -> None:
        """The run ended or was stopped."""


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
