"""Measuring a subject on corrupted images: its error by corruption and severity, and the mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustflat.data import CORRUPTIONS, FileImages, corrupted
from robustflat.evaluate import Team, choose
from robustflat.evaluate.accuracy import right
from robustflat.evaluate.examples import Examples
from robustflat.evaluate.frozen import Plain, held
from robustflat.runs import records
from robustflat.subject import Subject

# AlexNet's errors on ImageNet-C, means over the severities, by which Hendrycks and Dietterich 2019
# normalise theirs (github.com/hendrycks/robustness), in the order of `CORRUPTIONS`.
ALEXNET = (
    0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816, 0.826572,
    0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500,
)  # fmt: skip
_IMAGENET_CLASSES = 1000


def measure_corruptions(
    subject: Subject,
    folder: str | Path,
    *,
    corruptions: Sequence[str] | None = None,
    checkpoint: str | None = None,
    weights: str | None = None,
    samples: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    team: Team | None = None,
) -> dict[str, Any]:
    """Classify the corrupted test images of a folder; add what was found to ``corruptions.json``.

    Args:
        subject: What is measured.
        folder: The corrupted sets; see `robustflat.data.corrupted`.
        corruptions: Their names; the 15 of Hendrycks and Dietterich 2019 if None.
        checkpoint: "best" (also None, of a run) or "last".
        weights: "raw", "average", or the average if there is one.
        samples: A fixed class-balanced subset of each set, and of the clean test images.
        on_progress: Told the set, how many are done and how many there are.
        team: The processes that share the sets.

    Returns:
        A measurement, whose ``result`` has ``clean_error``, ``errors`` (by corruption, one for each
        severity), ``mean_error`` over corruptions and severities, ``mce`` (normalised by AlexNet's
        errors, of all 15 corruptions of ImageNet's 1,000 classes; else None) and ``count``, the
        images of each set.

    Raises:
        UserError: If the folder is not whole, or does not fit the subject; before anything is paid.
    """
    names = tuple(dict.fromkeys(corruptions or CORRUPTIONS))
    path = subject.home.corruptions
    records.read(path, "corruptions")
    data = subject.images()
    sets = corrupted(folder, data.classes, data.shape, names)
    counted = len(choose(sets[0].images(), samples))
    clean = choose(data.test, None if samples is None else min(samples, len(data.test)))
    network = subject.network(checkpoint or ("best" if subject.is_run else None), weights)
    batch_size, team = subject.evaluation.batch_size, team or Team()

    errors: list[float] = []
    with held(network.model) as device:
        plain = Plain(network.model)

        def one(number: int) -> float:
            if not number:
                return _error(plain, clean, batch_size, device)
            images = sets[number - 1].images()
            if isinstance(images, FileImages) and isinstance(data.test, FileImages):
                images = images.threaded(data.test.threads)
            return _error(plain, choose(images, samples), batch_size, device)

        for found in team.each(one, range(len(sets) + 1)):
            errors += found
            if on_progress is not None and team.is_first:
                last = max(0, len(errors) - 2)
                text = f"{sets[last].corruption} {sets[last].severity}"
                on_progress(text, len(errors), len(sets) + 1)
    by_name: dict[str, list[float]] = {name: [] for name in names}
    for place, error in zip(sets, errors[1:], strict=True):
        by_name[place.corruption].append(error)
    result = {
        "clean_error": errors[0],
        "errors": by_name,
        "mean_error": sum(errors[1:]) / len(sets),
        "mce": mean_corruption_error(by_name, len(data.classes)),
        "count": counted,
    }
    measured = records.measurement(
        subject, "corruptions", network.state(), samples=samples, result=result,
        options={"folder": Path(folder).name, "corruptions": list(names)},
    )  # fmt: skip
    if team.is_first:
        records.add(path, "corruptions", subject.name, [measured])
    return measured


def mean_corruption_error(errors: dict[str, list[float]], classes: int) -> float | None:
    """mCE: the mean of errors over severities, each in units of AlexNet's, over 15 corruptions.

    Args:
        errors: By corruption, those of all severities.
        classes: Of the data; the reference is that of ImageNet's 1,000.

    Returns:
        1 for AlexNet; None where there is no reference or a corruption is missing.
    """
    if classes != _IMAGENET_CLASSES or set(errors) != set(CORRUPTIONS):
        return None
    means = [sum(errors[name]) / len(errors[name]) for name in CORRUPTIONS]
    return sum(mean / theirs for mean, theirs in zip(means, ALEXNET, strict=True)) / len(means)


def _error(model: nn.Module, chosen: Examples, batch_size: int, device: torch.device) -> float:
    """The share of images that a model does not classify as they are labelled."""
    wrong = 0
    for positions in torch.arange(len(chosen)).split(batch_size):
        logits = model(chosen.images(positions).to(device))
        labels = chosen.labels[positions].to(device)
        wrong += int((~right(logits, labels)).sum())
    return wrong / len(chosen)
