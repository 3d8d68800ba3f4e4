"""A few images as a model sees them: clean, attacked, and what each is taken for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustflat.evaluate.kept import Kept
from robustflat.perturb import InputPerturbation, buffers_kept, evaluating


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown(Kept):
    """Images and predictions, on the CPU.

    Attributes:
        x: images ``[N, C, H, W]`` in [0, 1].
        x_adv: the same, attacked.
        y: labels ``[N]``.
        clean: predictions of ``x``.
        attacked: predictions of ``x_adv``.
    """

    x: Tensor
    x_adv: Tensor
    y: Tensor
    clean: Tensor
    attacked: Tensor


def magnified(x: Tensor, x_adv: Tensor) -> tuple[Tensor, float]:
    """What an attack changed: the largest change of a pixel is at 0 or 1, none at 0.5.

    Args:
        x: images ``[N, C, H, W]``.
        x_adv: the same, attacked.

    Returns:
        As many images in [0, 1], and that largest change.
    """
    difference = x_adv - x
    largest = float(difference.abs().max())
    return difference / (2 * largest or 1.0) + 0.5, largest


def show(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: InputPerturbation,
    *,
    seed: int,
    batch_size: int,
) -> Shown:
    """Attack images in eval mode; neither the model nor torch's generator changes by a bit.

    Args:
        model: where the images are.
        x: ``[N, C, H, W]`` in [0, 1].
        y: labels ``[N]``.
        attack: on them.
        seed: of its random start.
        batch_size: images at a time.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    with evaluating(model), buffers_kept(model), torch.no_grad():
        attacked = [
            attack(model, some, labels, generator=generator)
            for some, labels in zip(x.split(batch_size), y.split(batch_size), strict=True)
        ]
        found = [
            torch.cat([model(part).argmax(1) for part in parts]).cpu()
            for parts in (x.split(batch_size), attacked)
        ]
    return Shown(
        x=x.cpu(),
        x_adv=torch.cat(attacked).cpu(),
        y=y.cpu(),
        clean=found[0],
        attacked=found[1],
    )
