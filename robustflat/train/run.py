"""One training run from its configuration, in a folder of its own, alone or among processes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from robustflat.config import RunConfig
from robustflat.data import Data
from robustflat.errors import UserError
from robustflat.train.folder import RunFolder, machine
from robustflat.train.listeners import Listener
from robustflat.train.loop import Trainer
from robustflat.train.parallel import Processes, joined, was_restarted
from robustflat.train.setup import load_data, use_threads


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    listeners: Callable[[RunFolder], Sequence[Listener]] = lambda folder: (),
) -> tuple[RunFolder, bool]:
    """Train a run in the folder ``output/name``.

    Started by torchrun, all processes train one model with DistributedDataParallel and the first
    writes. Started again by torchrun (``--max-restarts``) or Slurm, the run is resumed.

    Args:
        config: the run.
        resume: go on from the last checkpoint of the folder, if there is one.
        overwrite: replace what an earlier run left in the folder.
        listeners: makes those who are told of steps and epochs.

    Returns:
        The folder, and whether the training reached its end (it does not after a SIGTERM, nor
        after a SIGUSR1, which under Slurm also has the job requeued).

    Raises:
        UserError: if anything named in ``config`` cannot be used, or the folder is in use.
        TrainingDivergedError: if loss or gradient is not finite and the policy is to stop.
        ProcessLostError: if another process ended or cannot be reached.
    """
    resume = resume or was_restarted()
    use_threads(config)
    folder = RunFolder(Path(config.output) / config.name)
    with joined(config.device) as (processes, device):
        finished = _train_in(
            folder, config, processes, device, resume=resume, overwrite=overwrite, told=listeners
        )
    return folder, finished


def _train_in(
    folder: RunFolder,
    config: RunConfig,
    processes: Processes,
    device: torch.device,
    *,
    resume: bool,
    overwrite: bool,
    told: Callable[[RunFolder], Sequence[Listener]],
) -> bool:
    """Train, in a function of its own: the trainer must end before the processes part."""
    with processes.together():
        if processes.is_first:
            folder.check(config, resume=resume, overwrite=overwrite)
    dataset = _load_once(config, processes)
    with processes.together():
        trainer = Trainer(
            config,
            dataset,
            device,
            folder=folder,
            processes=processes,
            listeners=told(folder) if processes.is_first else (),
        )
    machines = processes.gather(machine(str(device)))
    with folder.written_by_one() if processes.is_first else nullcontext():
        # Only now that everything is known to fit is anything written, or an earlier run cleared.
        with processes.together():
            if processes.is_first:
                # Again: another process may have begun it before this one held the folder.
                folder.check(config, resume=resume, overwrite=overwrite)
                folder.prepare(config, resume=resume, machines=machines)
        if resume:
            trainer.resume()
        finished = trainer.run()
    if trainer.requeue_requested and processes.is_first and not finished:
        _requeue()
    return finished


def _load_once(config: RunConfig, processes: Processes) -> Data:
    """The images: the first process of every host may have to fetch what the others then find."""
    with processes.together():
        dataset = load_data(config) if processes.local_rank == 0 else None
    with processes.together():
        return dataset or load_data(config)


def _requeue() -> None:
    """Ask Slurm to start this job again.

    Raises:
        UserError: if it cannot.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        raise UserError(
            f"The run is saved, but Slurm's job {job} could not be requeued: {reason.strip()}. "
            "Submit it again with --resume."
        ) from None
