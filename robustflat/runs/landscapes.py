"""Landscapes of runs: the loss along one direction, or between and around checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from robustflat.errors import UserError
from robustflat.flatness import Landscape, Progress, between, landscape
from robustflat.subject import Network, Subject, distinct_names


def draw_subject(
    subject: Subject,
    *,
    checkpoint: str | None = None,
    weights: str | None = None,
    samples: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> Landscape:
    """The loss around a subject's weights, on fixed un-augmented training images.

    Args:
        subject: what is drawn.
        checkpoint: "last" (also None, of a run) or "best".
        weights: raw, averaged, or the average if there is one.
        samples: training images to use; the configuration's for flatness if None.
        on_progress: told how far it has come.
        **settings: of :func:`robustflat.flatness.landscape`. The seed of the direction is the same
            for all runs unless given, so that their landscapes can be drawn on one axis.

    Returns:
        The landscape; a copy is saved as ``landscape.npz`` and ``.json`` in the run's folder.
    """
    network = _network(subject, checkpoint, weights)
    found = landscape(
        network.model,
        _images(subject, samples),
        **_attack(subject, settings),
        batch_size=subject.evaluation.batch_size,
        on_progress=on_progress,
        **settings,
    )
    found.save(subject.home.landscape)
    return found


def draw_between(
    subjects: Sequence[Subject],
    *,
    checkpoint: str | None = None,
    weights: str | None = None,
    samples: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> Landscape:
    """The loss on the line through two runs' weights, or the plane through three.

    Args:
        subjects: two or three of one architecture and data set.
        checkpoint: "last" (also None, of a run) or "best".
        weights: raw, averaged, or the average if there is one.
        samples: training images of the first one to use.
        on_progress: told how far it has come.
        **settings: of :func:`robustflat.flatness.between`.

    Raises:
        UserError: if there are not two or three of them, or their networks differ.
    """
    if len(subjects) not in (2, 3):
        raise UserError(
            f"A landscape between runs goes through two or three of them, got {len(subjects)}."
        )
    first = subjects[0]
    names = distinct_names([subject.home.root for subject in subjects])
    networks = {
        name: _network(subject, checkpoint, weights).model
        for name, subject in zip(names, subjects, strict=True)
    }
    return between(
        _network(first, checkpoint, weights).model,
        networks,
        _images(first, samples),
        **_attack(first, settings),
        batch_size=first.evaluation.batch_size,
        on_progress=on_progress,
        **settings,
    )


def _network(subject: Subject, checkpoint: str | None, weights: str | None) -> Network:
    return subject.network(checkpoint or ("last" if subject.is_run else None), weights)


def _images(subject: Subject, samples: int | None) -> tuple[Tensor, Tensor]:
    x, y = subject.train_tensors(subject.flatness.samples if samples is None else samples)
    return x.to(subject.device), y.to(subject.device)


def _attack(subject: Subject, settings: dict[str, Any]) -> dict[str, Any]:
    """Norm and eps of the robust losses; of clean ones alone, nothing asks for a threat."""
    if subject.threat is None and set(settings.get("losses", ("robust",))) == {"clean"}:
        return {}
    threat = subject.the_threat()
    return {"norm": threat.norm_name, "eps": threat.eps}
