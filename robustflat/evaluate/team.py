"""Owns the sharing of one evaluation among processes: each a part, joined in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes that evaluate together; by default there is only this one.

    Attributes:
        rank: This one's number.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_torchrun(cls) -> Team:
        """All processes that torchrun started, or this one alone."""
        size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
        if size == 1:
            return cls()
        if not dist.is_initialized():
            # Only verdicts travel, from host to host memory.
            dist.init_process_group("gloo")
        return cls(int(os.environ["RANK"]), size)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def each(self, work: Callable[[int], T], numbers: range) -> Iterator[list[T]]:
        """Do `work` for every number, a round of as many as there are processes at a time.

        Args:
            work: From a number to a result that can be pickled.
            numbers: The same in all processes.

        Yields:
            The results of a round, in the order of the numbers, in all processes.

        Raises:
            Exception: What one process raised, in all of them, so that none waits for it.
        """
        for start in range(numbers.start, numbers.stop, self.size):
            found: Any = None
            try:
                if start + self.rank < numbers.stop:
                    found = work(start + self.rank)
            except Exception as error:
                if self.size == 1:
                    raise
                found = error
            results = [found]
            if self.size > 1:
                results = [None] * self.size
                dist.all_gather_object(results, found)
            for result in results:
                if isinstance(result, Exception):
                    raise result
            yield results[: numbers.stop - start]

    def once(self, work: Callable[[], T]) -> T:
        """The result of `work` in the first process, in all of them."""
        ((result,),) = self.each(lambda _: work(), range(1))
        return result
