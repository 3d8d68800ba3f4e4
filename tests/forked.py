"""Processes that cost little to start: forked from a server that has imported torch once."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Not forks of this very process: where there is a GPU, its autograd threads would be missing.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "sklearn.datasets", "robustflat.train.run"]
)
WORLD = 2


def forked(work: Callable[..., Any], *arguments: Any, said: Path, **environment: str) -> Any:
    """A process, started, that does ``work``; what it says goes to the file ``said``."""
    environment = {**os.environ, **environment}
    process = _CONTEXT.Process(target=_begun, args=(environment, said, work, *arguments))
    process.start()
    return process


def pair(
    work: Callable[..., Any], *arguments: Any, folder: Path, lives: int = 1
) -> list[tuple[list[int], str]]:
    """Two processes at the same work, as torchrun starts them, and starts them again.

    Returns:
        Of each life their exit codes, and what they said.
    """
    # As torchrun's agent does, this process holds what they meet in.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared |= {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    found = []
    for life in range(lives):
        shared["TORCHELASTIC_RESTART_COUNT"] = str(life)
        said = [folder / f"{life}.{rank}.said" for rank in range(WORLD)]
        processes = [
            forked(work, *arguments, said=file, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
            for rank, file in enumerate(said)
        ]
        for process in processes:
            process.join(120)
            process.kill()
            process.join()
        text = "".join(file.read_text() for file in said)
        found.append(([process.exitcode for process in processes], text))
    return found


def together(work: Callable[..., Any], *arguments: Any, folder: Path) -> None:
    """Let two processes do the same work, to its end."""
    ((codes, said),) = pair(work, *arguments, folder=folder)
    assert codes == [0] * WORLD, said[-3000:]


def of_group(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What each of two processes of a group (gloo) returns; ``work`` is given its rank."""
    together(_joined, work, folder, folder=folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def command(*arguments: str) -> None:
    """The command line, as a process of its own runs it."""
    from robustflat.cli import main

    sys.argv = ["robustflat", *arguments]
    main()


def _begun(
    environment: dict[str, str], said: Path, work: Callable[..., Any], *arguments: Any
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(1)
    work(*arguments)


def _joined(work: Callable[[int], Any], folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
