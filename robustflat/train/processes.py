"""Several processes training one model: who this one is, and what they must agree on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process's rank among ``world`` processes."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether ``flag`` is set in any process."""
        if self.world == 1:
            return flag
        shared = torch.tensor(float(flag), device=device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return bool(shared)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of ``value`` over all processes."""
        if self.world == 1:
            return value
        shared = value.clone()
        dist.all_reduce(shared)
        return shared / self.world

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()


def join() -> Processes:
    """Join the processes that torchrun started, or be the only one."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Processes()
    processes = Processes(
        int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    )
    if processes.world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return processes
