"""Measuring the flatness of a run's weight landscape."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from robustflat.flatness import Figure, Progress, flatness
from robustflat.flatness.measures import find
from robustflat.flatness.store import tensors_digest
from robustflat.runs import records
from robustflat.subject import Subject


def measure_subject(
    subject: Subject,
    measures: Sequence[str] | None = None,
    *,
    checkpoint: str | None = None,
    weights: str | None = None,
    samples: int | None = None,
    options: dict[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Measure a subject on fixed, un-augmented training images; add it to ``flatness.json``.

    The loss is that of the training images, as the theory of sharpness speaks of them, at the last
    checkpoint, which the training went to.

    Args:
        subject: what is measured.
        measures: names; the configuration's if None.
        checkpoint: "last" (also None, of a run) or "best".
        weights: raw, averaged, or the average if there is one.
        samples: training images to use; the configuration's if None.
        options: of :class:`robustflat.flatness.Options`, over the configuration's.
        on_progress: told how far the measurement has come.

    Returns:
        What was measured now: keys ``run``, ``checkpoint``, ``epoch``, ``weights``, ``norm``,
        ``eps``, ``data``, ``samples``, ``seed``, ``options`` and ``measures``.
    """
    config = subject.flatness
    network = subject.network(checkpoint or ("last" if subject.is_run else None), weights)
    x, y = subject.tensors("train", config.samples if samples is None else samples)
    chosen = list(measures or config.measures)
    norm, eps = "linf", 0.0  # for the measures that ask for no threat
    if subject.threat is not None or any(_is_attacked(name) for name in chosen):
        norm, eps = subject.the_threat().norm_name, subject.the_threat().eps
    # Parts of another measurement, or of another state of the subject, have a file of their own.
    kind = (tensors_digest(network.model.state_dict()), len(y), norm, eps)
    digest = hashlib.sha256(repr(kind).encode()).hexdigest()[:12]
    found: dict[str, Figure] = flatness(
        network.model,
        (x.to(subject.device), y.to(subject.device)),
        chosen,
        eps,
        norm,
        subject.seed,
        batch_size=subject.evaluation.batch_size,
        store=subject.home.root / f"flatness-{network.checkpoint}-{digest}.parts.json",
        on_progress=on_progress,
        **{**config.options, **(options or {})},
    )
    report = {
        "kind": "flatness",
        "checkpoint": network.checkpoint,
        "epoch": network.epoch,
        "weights": network.weights,
        "norm": norm,
        "eps": eps,
        "data": subject.data,
        "samples": len(y),
        "seed": subject.seed,
        "options": {**config.options, **(options or {})},
        "measures": {name: figure.to_dict() for name, figure in found.items()},
    }
    records.add(subject.home.flatness, "flatness", subject.name, [report])
    return {"run": subject.name, **report}


def _is_attacked(measure: str) -> bool:
    """Whether a measure depends on the threat; two of the clean loss use its ball."""
    return find(measure).loss != "clean" or measure in ("input_gradient_norm", "local_linearity")
