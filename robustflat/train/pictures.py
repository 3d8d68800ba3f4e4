"""What of a run is looked at as pictures: examples, what is taken for what, the weights' line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustflat.data.split import proportional
from robustflat.landscapes import Landscape, landscape
from robustflat.perturb import InputPerturbation, buffers_kept, evaluating, pgd

_EXAMPLES = 128


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Up to 128 images of a split as the model sees them, in eval mode, on the CPU.

    Attributes:
        split: which.
        classes: names, in the order of the labels.
        x: images ``[N, C, H, W]`` in [0, 1].
        x_adv: the same, attacked.
        y: labels ``[N]``.
        clean: predictions of ``x``.
        attacked: predictions of ``x_adv``.
        line: the loss on as many training images along a random filter-normalised direction.
    """

    split: str
    classes: tuple[str, ...]
    x: Tensor
    x_adv: Tensor
    y: Tensor
    clean: Tensor
    attacked: Tensor
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
    generator = torch.Generator(device).manual_seed(seed)
    with evaluating(model), buffers_kept(model), torch.no_grad():
        attacked = [
            attack(model, some, labels, generator=generator)
            for some, labels in zip(x.split(batch_size), y.split(batch_size), strict=True)
        ]
        found = [
            torch.cat([model(part).argmax(1) for part in parts]).cpu()
            for parts in (x.split(batch_size), attacked)
        ]
    line = landscape(
        model,
        _some(splits["train"], device),
        points=11,
        losses=("clean", "robust_fixed"),
        attack=attack,
        seed=seed,
        batch_size=batch_size,
    )
    return Pictures(
        split=split,
        classes=classes,
        x=x.cpu(),
        x_adv=torch.cat(attacked).cpu(),
        y=y.cpu(),
        clean=found[0],
        attacked=found[1],
        line=line,
    )


def _some(images: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """All classes by their shares: the images may be sorted by class."""
    x, y = images
    chosen = proportional(y.cpu(), min(_EXAMPLES, len(y)), seed=0).to(y.device)
    return x[chosen].to(device), y[chosen].to(device)
