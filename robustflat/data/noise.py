"""Owns label noise: which training labels are replaced, and by what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustflat.data.seeding import generator_for
from robustflat.data.split import proportional

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
# Patrini et al. 2017, "Making deep neural networks robust to label noise", section 5.
CIFAR10_CONFUSIONS = {
    "truck": "automobile",
    "bird": "airplane",
    "deer": "horse",
    "cat": "dog",
    "dog": "cat",
}


@dataclass(frozen=True, kw_only=True)
class LabelNoise:
    """Wrong labels in the train split, never in validation or test.

    Attributes:
        kind: "symmetric": exactly `round(rate N)` labels, spread over the classes by their shares,
            each replaced by one of the other classes, all equally likely (so `rate` is the share
            of wrong labels; papers that may draw the true class again have rate (1 - 1/C)).
            "asymmetric": in every class that has a confusion, exactly `round(rate n_c)` labels
            become it. CIFAR-10 has the confusions of Patrini et al. 2017; with other classes,
            class c becomes c + 1 (the last one 0).
        rate: Share of the labels, in [0, 1].
        seed: Which labels, and what they become.
    """

    kind: Literal["symmetric", "asymmetric"]
    rate: float
    seed: int = 0

    def apply(self, labels: Tensor, classes: Sequence[str]) -> Tensor:
        """Replace labels.

        Args:
            labels: int64, [N]. Not changed.
            classes: Names of the classes.

        Returns:
            The noisy labels, int64 [N].
        """
        noisy = labels.clone()
        if self.kind == "symmetric":
            hit = proportional(labels, round(self.rate * len(labels)), seed=self.seed)
            shift = torch.randint(
                1, len(classes), (len(hit),), generator=generator_for(3, self.seed)
            )
            noisy[hit] = (labels[hit] + shift) % len(classes)
            return noisy
        for source, target in confusions(classes).items():
            members = torch.nonzero(labels == source).flatten()
            order = torch.randperm(len(members), generator=generator_for(4, self.seed, source))
            noisy[members[order[: round(self.rate * len(members))]]] = target
        return noisy


def confusions(classes: Sequence[str]) -> dict[int, int]:
    """What each class is mistaken for under asymmetric noise.

    Args:
        classes: Names of the classes.

    Returns:
        Class to class.
    """
    if tuple(classes) == CIFAR10_CLASSES:
        index = {name: i for i, name in enumerate(CIFAR10_CLASSES)}
        return {index[a]: index[b] for a, b in CIFAR10_CONFUSIONS.items()}
    return {c: (c + 1) % len(classes) for c in range(len(classes))}
