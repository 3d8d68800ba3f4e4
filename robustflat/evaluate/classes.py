"""Owns figures by class: how many are right and withstand, and what each is taken for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def confusion(labels: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """How many examples of each label are taken for each class.

    Args:
        labels: int64 [N].
        predictions: int64 [N].
        classes: C.

    Returns:
        int64 [C, C]: a row for every label.
    """
    return torch.bincount(labels * classes + predictions, minlength=classes**2).view(classes, -1)


def by_class(
    labels: Tensor,
    outcomes: Tensor,
    predictions: Tensor,
    attacked: Tensor,
    names: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Figures of every class that has an example.

    Args:
        labels: int64 [N].
        outcomes: int16 [N], as of an `Evaluation`.
        predictions: int64 [N], without an attack.
        attacked: int64 [N], under it.
        names: Of the classes; the number of one that has none.

    Returns:
        By name: `count`; how many are right, `clean`, and still are after all attacks, `robust`;
        and for what the others are taken, by name, `clean_as` and `attacked_as`.
    """

    def name(i: int) -> str:
        return str(names[i]) if i < len(names) else str(i)

    def taken(own: Tensor, found: Tensor, label: int) -> dict[str, int]:
        kinds, counts = found[own].unique(return_counts=True)
        pairs = zip(kinds.tolist(), counts.tolist(), strict=True)
        return {name(kind): count for kind, count in pairs if kind != label}

    figures = {}
    for label in labels.unique().tolist():
        own = labels == label
        figures[name(label)] = {
            "count": int(own.sum()),
            "clean": int((own & (outcomes != -2)).sum()),
            "robust": int((own & (outcomes == -1)).sum()),
            "clean_as": taken(own, predictions, label),
            "attacked_as": taken(own, attacked, label),
        }
    return figures
