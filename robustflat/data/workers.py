"""Owns the making of batches in other processes, ahead of those who wait for them."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from robustflat.errors import UserError, reason

T = TypeVar("T")
_GRACE = 5  # seconds


def usual_workers(processes: int = 1) -> int:
    """So many workers as the CPU has cores for each of some processes, at most eight.

    Args:
        processes: Those on this machine that have workers.

    Returns:
        One or more.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    return max(1, min(8, cores // processes))


def in_workers(
    make: Callable[[int], T], numbers: range, workers: int, *, pinned: bool = False
) -> Iterator[T]:
    """``make(k)`` for some numbers, in their order, a little ahead of where they are used.

    Args:
        make: Gives tensors on the CPU, and plain values.
        numbers: The arguments.
        workers: How many processes; 0 makes each here, when it is asked for.
        pinned: Whether the tensors shall be in memory that a GPU copies from without waiting.

    Yields:
        What was made, whoever made it.

    Raises:
        UserError: What a worker met, or that one was ended.
    """
    if workers == 0:
        yield from map(make, numbers)
        return
    with warnings.catch_warnings():
        # Of more workers than cores, and of threads in a process that forks: the workers touch
        # nothing that those hold.
        warnings.simplefilter("ignore")
        loader: DataLoader[Any] = DataLoader(
            _Made(make),
            batch_size=None,
            sampler=numbers,
            num_workers=min(workers, max(len(numbers), 1)),
            pin_memory=pinned,
            worker_init_fn=_begin,
            generator=torch.Generator(),  # the global one is left alone
        )
        made = iter(loader)
    try:
        for one in made:
            if isinstance(one, UserError):
                raise one
            yield one
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"A process that reads images was ended ({reason(error)}). If memory ran "
            "out, or the shared memory in /dev/shm, set data.workers lower, or 0 to read in the "
            "training process itself. Then go on with --resume."
        ) from None
    finally:
        del made  # ends the workers, whoever still holds this frame


class _Made(Dataset[Any]):
    """A user's mistake is handed over as it is: raised, it would arrive inside a traceback."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __getitem__(self, k: int) -> Any:
        try:
            return self.make(k)
        except UserError as error:
            return error


def _begin(worker: int) -> None:
    """Signals to the whole group of processes are for the one that trains; it ends its workers.

    It may be waiting for one of them, so after a SIGTERM they go on for a while.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
