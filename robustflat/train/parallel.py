"""Several processes training one model: devices, buffers, faults, and what they must agree on."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from robustflat.errors import ProcessLostError, TrainingDivergedError, UserError, reason

T = TypeVar("T")
# The first process of a host may be downloading or decoding meanwhile.
_TIMEOUT = timedelta(hours=1)
_meetings = count()


@dataclass(frozen=True)
class Processes:
    """This process's rank among ``world`` processes, and its rank on its own host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def greatest(self, value: int) -> int:
        """The greatest ``value`` of all processes; it passes through the CPU, so no GPU waits."""
        if self.world == 1:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of ``value`` over all processes."""
        if self.world == 1:
            return value
        shared = value.clone()
        dist.all_reduce(shared)
        return shared / self.world

    def gather(self, value: T) -> list[T]:
        """What every process has, by rank; all get the list."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        """What the first process has."""
        if self.world == 1:
            return value
        shared = [value]
        dist.broadcast_object_list(shared, 0)
        return shared[0]

    def wait(self) -> None:
        """Wait for all processes."""
        self.greatest(0)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers: BatchNorm saw other rows in each.

        Not DDP's ``broadcast_buffers``: that writes before every forward pass, so two passes in
        one step spoil each other's graph, and what a checkpoint of the first process lacks would
        be lost.
        """
        if self.world == 1:
            return
        alike: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            alike.setdefault(buffer.dtype, []).append(buffer)
        with torch.no_grad():
            for buffers in alike.values():
                flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
                dist.broadcast(flat, 0)
                parts = flat.split([buffer.numel() for buffer in buffers])
                shaped = [p.view(b.shape) for p, b in zip(parts, buffers, strict=True)]
                torch._foreach_copy_(buffers, shaped)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A part that a user's mistake may end: in all processes or in none.

        Raises:
            UserError: the mistake of the lowest rank that met one, in all processes.
        """
        mistake: UserError | None = None
        try:
            yield
        except UserError as error:
            if self.world == 1:
                raise
            mistake = error
        met = [m for m in self.gather(None if mistake is None else str(mistake)) if m is not None]
        if met:
            raise UserError(met[0]) from None


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """A model whose BatchNorm layers normalise by the statistics of all processes' rows.

    Raises:
        UserError: on a CPU, where torch cannot.
    """
    if device.type != "cuda":
        raise UserError(
            f"train.sync_batchnorm needs GPUs, got device {device}: torch synchronises BatchNorm "
            "on them alone. Leave it out, or use a network without BatchNorm."
        )
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted


def replica(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """A model whose gradients are averaged over the processes; its buffers are left to us."""
    ids = [device.index] if device.type == "cuda" else None
    # Newer versions of torch have another name for it.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    ours: dict[str, Any] = {name: False}
    return DistributedDataParallel(model, device_ids=ids, **ours)


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun (or its like) started."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ


def speaks() -> bool:
    """Whether this process is the one that talks to the user."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def was_restarted() -> bool:
    """Whether torchrun or Slurm started this process again after an earlier one ended."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name) or 0) > 0 for name in names)


def device_name(name: str, processes: Processes, gpus: int) -> str:
    """The device of this process: a GPU of its own for each process of a host.

    Args:
        name: as the configuration has it; "auto" is a GPU if there is one, else the CPU.
        processes: this process among the others.
        gpus: how many GPUs this host has.

    Raises:
        UserError: if processes of a host would have to share a GPU.
    """
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if not name.startswith("cuda") or processes.local_world == 1:
        return "cuda:0" if name == "cuda" else name
    if name != "cuda":
        raise UserError(
            f"device: {name} would put all {processes.local_world} processes of this machine on "
            "one GPU. Say device: cuda, and each gets one of its own."
        )
    if processes.local_rank >= gpus:
        raise UserError(
            f"{processes.local_world} processes were started on a machine with {gpus} GPU(s), and "
            f"each needs one of its own. Start torchrun with --nproc-per-node={gpus}, or say "
            "device: cpu."
        )
    return f"cuda:{processes.local_rank}"


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called ``name``; "auto" is this process's GPU if there is one, else the CPU.

    Raises:
        UserError: if there is no such device.
    """
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"The device {name!r} cannot be used: {reason(error)}. Try device: auto."
        ) from None
    return device


@contextmanager
def joined(name: str) -> Iterator[tuple[Processes, torch.device]]:
    """Join the processes that torchrun started, or be the only one; leave them on exit.

    Of a failure that all processes meet, one speaks; the others exit in silence. What holds a
    replica must have ended before the exit.

    Args:
        name: the device of the configuration.

    Yields:
        This process among the others, and its device.

    Raises:
        UserError: if the device cannot be used.
        ProcessLostError: if another process ended or cannot be reached.
    """
    processes = _myself()
    if processes.world == 1:
        yield processes, resolve_device(device_name(name, processes, torch.cuda.device_count()))
        return
    # Of no use to a later life of the same processes: what an earlier one left there.
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"robustflat-{life}-{next(_meetings)}", _store())
    try:
        # Before anyone waits for the others, so that a wrong device is told at once.
        place = resolve_device(device_name(name, processes, torch.cuda.device_count()))
        on_gpu = place.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(place)
        dist.init_process_group(
            # What lies on the CPU goes through gloo, and makes no GPU wait.
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=processes.rank,
            world_size=processes.world,
            timeout=_TIMEOUT,
            device_id=place if on_gpu else None,
        )
        yield processes, place
    except (UserError, TrainingDivergedError) as error:
        traceback.clear_frames(error.__traceback__)  # where a replica may live on
        _leave()
        if not _is_first_to_speak(store):
            raise SystemExit(2) from None
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or _is_gloo(error)):
            raise
        # Not leaving: that would wait for the lost one.
        if not _is_first_to_speak(store):
            raise SystemExit(1) from None
        raise ProcessLostError(
            f"Process {processes.rank} of {processes.world} lost the others: one of them ended or "
            "cannot be reached. What it said itself, above or in its log, tells why. Go on from "
            f"the last checkpoint with --resume. ({reason(error)[:120]})"
        ) from None
    else:
        _leave()


def _leave() -> None:
    """Part from the other processes.

    Up to torch 2.6 the end of a group waits for gloo's threads, which may be waiting for Python's
    lock to let go of a tensor. Of all that hold a group only its backend gives up the lock, so it
    must be the last: any replica has ended, and the group ends here.
    """
    if not dist.is_initialized():
        return
    group = dist.group.WORLD
    assert group is not None
    backend = group._get_backend(torch.device("cpu"))
    del group
    dist.destroy_process_group()
    del backend


def _is_gloo(error: RuntimeError) -> bool:
    """Gloo's errors have no type of their own."""
    text = str(error).lower()
    return "gloo" in text or "connection closed by peer" in text


def _is_first_to_speak(store: Store) -> bool:
    try:
        return store.add("spoken", 1) == 1
    except RuntimeError:  # the store was in the process that ended
        return True


@cache
def _store() -> Store:
    store, _, _ = next(iter(rendezvous("env://", timeout=_TIMEOUT)))
    return store


def _myself() -> Processes:
    if not started_by_torchrun():
        return Processes()
    read = {
        "rank": "RANK",
        "world": "WORLD_SIZE",
        "local_rank": "LOCAL_RANK",
        "local_world": "LOCAL_WORLD_SIZE",
    }
    missing = [name for name in read.values() if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: the "
            "processes of a run are started by torchrun, which sets them all."
        )
    return Processes(**{field: int(os.environ[name]) for field, name in read.items()})
