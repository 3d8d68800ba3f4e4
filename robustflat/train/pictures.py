"""What of a run is looked at as pictures: examples, what is taken for what, the weights' line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustflat.data.split import proportional
from robustflat.evaluate.shown import Shown, show
from robustflat.landscapes import Landscape, landscape
from robustflat.perturb import InputPerturbation, pgd

_EXAMPLES = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures(Shown):
    """Up to 128 images of a split, and the loss around the weights.

    Attributes:
        split: which.
        classes: names, in the order of the labels.
        line: the loss on as many training images along a random filter-normalised direction.
    """

    split: str
    classes: tuple[str, ...]
    line: Landscape

    def confusion(self) -> Tensor:
        """How many of class i were taken for class j when attacked, ``[C, C]``."""
        count = len(self.classes)
        return torch.bincount(count * self.y + self.attacked, minlength=count**2).view(count, count)


def take(
    model: nn.Module,
    splits: dict[str, tuple[Tensor, Tensor]],
    classes: tuple[str, ...],
    attack: InputPerturbation | None,
    device: torch.device,
    *,
    seed: int,
    batch_size: int,
) -> Pictures:
    """Look at the validation split, or at that of training where there is none.

    Neither the model nor torch's generator changes by a bit.
    """
    split = "validation" if "validation" in splits else "train"
    x, y = _some(splits[split], device)
    attack = pgd("linf", 0.0) if attack is None else attack
    shown = show(model, x, y, attack, seed=seed, batch_size=batch_size)
    line = landscape(
        model,
        _some(splits["train"], device),
        points=11,
        losses=("clean", "robust_fixed"),
        attack=attack,
        seed=seed,
        batch_size=batch_size,
    )
    return Pictures(split=split, classes=classes, line=line, **vars(shown))


def _some(images: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """All classes by their shares: the images may be sorted by class."""
    x, y = images
    chosen = proportional(y.cpu(), min(_EXAMPLES, len(y)), seed=0).to(y.device)
    return x[chosen].to(device), y[chosen].to(device)
