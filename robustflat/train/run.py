"""One training run from its configuration, in a folder of its own, alone or among processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from robustflat.config import RunConfig
from robustflat.train.folder import RunFolder
from robustflat.train.loop import Listener, Trainer
from robustflat.train.processes import join
from robustflat.train.setup import load_data, resolve_device, use_threads


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    listeners: Callable[[RunFolder], Sequence[Listener]] = lambda folder: (),
) -> tuple[RunFolder, bool]:
    """Train a run in the folder ``output/name``.

    Started by torchrun, all processes train one model with DistributedDataParallel and the first
    writes.

    Args:
        config: the run.
        resume: go on from the last checkpoint of the folder, if there is one.
        overwrite: replace what an earlier run left in the folder.
        listeners: makes those who are told of steps and epochs.

    Returns:
        The folder, and whether the training reached its end (it does not after a SIGTERM).

    Raises:
        UserError: if anything named in ``config`` cannot be used, or the folder is in use.
        TrainingDivergedError: if loss or gradient is not finite and the policy is to stop.
    """
    use_threads(config)
    processes = join()
    folder = RunFolder(Path(config.output) / config.name)
    device = resolve_device(config.device, processes.local_rank)
    if processes.is_first:
        folder.check(config, resume=resume, overwrite=overwrite)
        dataset = load_data(config)
        processes.wait()
    else:
        # The first process may be downloading what the others then find.
        processes.wait()
        dataset = load_data(config)
    trainer = Trainer(
        config,
        dataset,
        device,
        folder=folder,
        processes=processes,
        listeners=listeners(folder) if processes.is_first else (),
    )
    # Only now that everything is known to fit is anything written, or an earlier run cleared.
    if processes.is_first:
        folder.prepare(config, resume=resume)
    processes.wait()
    if resume:
        trainer.resume()
    return folder, trainer.run()
