"""Landscapes of runs: the loss along one direction, or between and around checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from robustflat.errors import UserError
from robustflat.flatness import Landscape, Progress, between, landscape
from robustflat.runs.restore import CheckpointName, Run, WeightsName


def draw_run(
    run: Run,
    *,
    checkpoint: CheckpointName = "last",
    weights: WeightsName = "auto",
    samples: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> Landscape:
    """The loss around a run's weights, on fixed un-augmented training images.

    Args:
        run: the run.
        checkpoint: "last" or "best".
        weights: raw, averaged, or the average if there is one.
        samples: training images to use; the configuration's for flatness if None.
        on_progress: told how far it has come.
        **settings: of :func:`robustflat.flatness.landscape`. The seed of the direction is the same
            for all runs unless given, so that their landscapes can be drawn on one axis.

    Returns:
        The landscape; a copy is saved as ``landscape.npz`` and ``.json`` in the run's folder.
    """
    network = run.network(checkpoint, weights)
    x, y = run.train_tensors(samples or run.config.flatness.samples)
    norm, eps = run.threat()
    found = landscape(
        network.model,
        (x.to(run.device), y.to(run.device)),
        eps=eps,
        norm=norm,
        batch_size=run.config.evaluate.batch_size,
        on_progress=on_progress,
        **settings,
    )
    found.save(run.folder.landscape)
    return found


def draw_between(
    runs: Sequence[Run],
    *,
    checkpoint: CheckpointName = "last",
    weights: WeightsName = "auto",
    samples: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> Landscape:
    """The loss on the line through two runs' weights, or the plane through three.

    Args:
        runs: two or three runs of one architecture and data set.
        checkpoint: "last" or "best".
        weights: raw, averaged, or the average if there is one.
        samples: training images of the first run to use.
        on_progress: told how far it has come.
        **settings: of :func:`robustflat.flatness.between`.

    Raises:
        UserError: if there are not two or three runs, or their networks differ.
    """
    if len(runs) not in (2, 3):
        raise UserError(
            f"A landscape between runs goes through two or three of them, got {len(runs)}."
        )
    first = runs[0]
    networks = {run.name: run.network(checkpoint, weights).model for run in runs}
    x, y = first.train_tensors(samples or first.config.flatness.samples)
    norm, eps = first.threat()
    return between(
        first.network(checkpoint, weights).model,
        networks,
        (x.to(first.device), y.to(first.device)),
        eps=eps,
        norm=norm,
        batch_size=first.config.evaluate.batch_size,
        on_progress=on_progress,
        **settings,
    )
