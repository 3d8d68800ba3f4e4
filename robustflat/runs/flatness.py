"""Measuring the flatness of a run's weight landscape."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from robustflat.config.perturbations import NoAttackConfig
from robustflat.errors import UserError
from robustflat.files import write_json
from robustflat.flatness import Figure, Progress, flatness
from robustflat.flatness.store import tensors_digest
from robustflat.runs.restore import CheckpointName, Run, WeightsName


def measure_run(
    run: Run,
    measures: Sequence[str] | None = None,
    *,
    checkpoint: CheckpointName = "last",
    weights: WeightsName = "auto",
    samples: int | None = None,
    options: dict[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Measure a run on fixed, un-augmented training images and write its ``flatness.json``.

    The loss is that of the training images, as the theory of sharpness speaks of them, at the last
    checkpoint, which the training went to.

    Args:
        run: the run.
        measures: names; the configuration's if None.
        checkpoint: "last" or "best".
        weights: raw, averaged, or the average if there is one.
        samples: training images to use; the configuration's if None.
        options: of :class:`robustflat.flatness.Options`, over the configuration's.
        on_progress: told how far the measurement has come.

    Returns:
        What was written: keys ``run``, ``checkpoint``, ``epoch``, ``weights``, ``samples`` and
        ``measures``.
    """
    config = run.config.flatness
    network = run.network(checkpoint, weights)
    if samples is not None and samples < 1:
        raise UserError(f"The number of samples must be at least 1, got {samples}.")
    x, y = run.train_tensors(samples or config.samples)
    # Without a training attack eps is 0, and the robust loss is the clean one.
    attacked = not isinstance(run.config.attack, NoAttackConfig)
    norm, eps = run.threat() if attacked else ("linf", 0.0)
    # Parts of another measurement, or of another state of the run, have a file of their own.
    kind = (tensors_digest(network.model.state_dict()), len(y), norm, eps)
    digest = hashlib.sha256(repr(kind).encode()).hexdigest()[:12]
    found: dict[str, Figure] = flatness(
        network.model,
        (x.to(run.device), y.to(run.device)),
        list(measures or config.measures),
        eps,
        norm,
        run.config.seed,
        batch_size=run.config.evaluate.batch_size,
        store=run.folder.root / f"flatness-{checkpoint}-{digest}.parts.json",
        on_progress=on_progress,
        **{**config.options, **(options or {})},
    )
    report = {
        "run": run.name,
        "checkpoint": checkpoint,
        "epoch": network.epoch,
        "weights": network.weights,
        "samples": len(y),
        "measures": {name: figure.to_dict() for name, figure in found.items()},
    }
    write_json(run.folder.flatness, report)
    return report
