"""Draws landscapes of subjects (runs or any models), each kept in its subject's home."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robustflat.errors import UserError
from robustflat.landscapes.draw import between, landscape
from robustflat.landscapes.record import Landscape
from robustflat.subject import Network, Subject, distinct_names


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Which state of subjects is drawn, on which images, and how.

    Attributes:
        checkpoint: "last" (also None, of a run) or "best".
        weights: raw, averaged, or the average if there is one.
        split: "train" or "test"; the images are not augmented.
        samples: how many of them, every class keeping its share; the configuration's for flatness
            if None.
        settings: of :func:`robustflat.landscapes.landscape` or
            :func:`robustflat.landscapes.between`. The seed of the directions is 0 for all subjects
            unless given, so that their landscapes can be drawn on one axis.
    """

    checkpoint: str | None = None
    weights: str | None = None
    split: str = "train"
    samples: int | None = None
    settings: Mapping[str, Any]


def draw_subject(subject: Subject, sight: Sight) -> Landscape:
    """The loss around a subject's weights."""
    network = _network(subject, sight)
    about = _about(subject, sight, network) | {"subject": subject.name}
    return landscape(network.model, _images(subject, sight), about=about, **_common(subject, sight))


def draw_between(subjects: Sequence[Subject], sight: Sight) -> Landscape:
    """The loss on the line through two subjects' weights, or the plane through three.

    Of a single run it is the line through its best and its last checkpoint. Images, threat and home
    are the first one's.

    Raises:
        UserError: if there are more of them, or their networks differ.
    """
    first = subjects[0]
    if len(subjects) == 1 and first.is_run and sight.checkpoint is None:
        states = {name: first.network(name, sight.weights) for name in ("best", "last")}
    elif len(subjects) in (2, 3):
        names = distinct_names([subject.home.root for subject in subjects])
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(
                f"{', '.join(sorted(twice))} is named more than once: no line leads from weights "
                "to themselves. Name different runs."
            )
        networks = [_network(subject, sight) for subject in subjects]
        states = dict(zip(names, networks, strict=True))
    else:
        raise UserError(
            "A landscape between runs goes through two or three of them, or through the best and "
            f"the last checkpoint of one (without --checkpoint); got {len(subjects)}."
        )
    about = _about(first, sight, next(iter(states.values()))) | {"subject": list(states)}
    return between(
        _network(first, sight).model, {name: state.model for name, state in states.items()},
        _images(first, sight), about=about, **_common(first, sight),
    )  # fmt: skip


def _network(subject: Subject, sight: Sight) -> Network:
    return subject.network(sight.checkpoint or ("last" if subject.is_run else None), sight.weights)


def _images(subject: Subject, sight: Sight) -> tuple[Tensor, Tensor]:
    x, y = subject.tensors(sight.split, _count(subject, sight))
    return x.to(subject.device), y.to(subject.device)


def _count(subject: Subject, sight: Sight) -> int:
    return subject.flatness.samples if sight.samples is None else sight.samples


def _about(subject: Subject, sight: Sight, network: Network) -> dict[str, Any]:
    return {
        "checkpoint": network.checkpoint,
        "epoch": network.epoch,
        "weights": network.weights,
        "data": subject.data,
        "split": sight.split,
    }


def _common(subject: Subject, sight: Sight) -> dict[str, Any]:
    """The settings, with the subject's threat, batches and home, and training images to refresh on.

    Of clean losses and directions alone, nothing asks for a threat.
    """
    found = {
        "batch_size": subject.evaluation.batch_size,
        "store": subject.home.landscapes,
        **sight.settings,
    }
    if {*found.get("losses", ("robust",)), found.get("direction_loss", "clean")} != {"clean"}:
        threat = subject.the_threat()
        found |= {"norm": threat.norm_name, "eps": threat.eps}
    if found.get("batchnorm") == "refresh":
        x, _ = subject.tensors("train", _count(subject, sight))
        found["refresh_on"] = x.to(subject.device)
    return found
