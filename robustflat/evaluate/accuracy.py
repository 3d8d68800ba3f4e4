"""Owns accuracy and loss of a model on batches, clean or attacked, in eval mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.evaluate.frozen import device_of
from robustflat.perturb import InputPerturbation, buffers_kept, evaluating


@dataclass(frozen=True, kw_only=True, eq=False)
class Metrics:
    """What was measured on a set of examples.

    Attributes:
        loss: Mean cross-entropy; NaN or infinite if the model's outputs are.
        accuracy: Share classified correctly; an output that is NaN is not correct.
        count: Number of examples N.
        correct: bool [N], on the CPU, in the order of the batches.
        losses: float32 [N], likewise.
    """

    loss: float
    accuracy: float
    count: int
    correct: Tensor
    losses: Tensor


def measure(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attack: InputPerturbation | None = None,
    generator: torch.Generator | None = None,
    searched: nn.Module | None = None,
) -> Metrics:
    """Accuracy and cross-entropy over batches, at the attack's images if there is one.

    The model is measured in eval mode; its modes, buffers and gradients are as before afterwards,
    and torch's global generator is not used. With an attack, `correct` speaks of the attacked
    image alone: an image that the attack happens to correct counts as correct (`scores` and
    `evaluate` also ask for the clean one).

    Args:
        model: Takes images in [0, 1], returns logits [B, C].
        batches: Images [B, C, H, W] and labels int64 [B].
        attack: What to do to the images first.
        generator: The attack's randomness, on the model's device; seeded with 0 if None.
        searched: What the attack is given in place of the model: the same, compiled.

    Returns:
        The figures. Values are fetched from the device once, at the end.

    Raises:
        UserError: If there is no example.
    """
    correct, losses = [], []
    with evaluating(model), buffers_kept(model), torch.no_grad():
        for x, y in batches:
            device = device_of(model, x.device)
            x, y = x.to(device), y.to(device)
            if attack is not None:
                if generator is None:
                    generator = torch.Generator(device).manual_seed(0)
                x = attack(model if searched is None else searched, x, y, generator=generator)
            logits = model(x).float()
            losses.append(F.cross_entropy(logits, y, reduction="none"))
            correct.append(right(logits, y))
    if not losses:
        raise UserError("There is no example to measure: the batches are empty.")
    return _metrics(torch.cat(losses).cpu(), torch.cat(correct).cpu())


def joined(parts: Sequence[Metrics]) -> Metrics:
    """What :func:`measure` would have found on all batches at once.

    Args:
        parts: what it found on some of them each, in their order.

    Returns:
        The figures of all.
    """
    return _metrics(torch.cat([p.losses for p in parts]), torch.cat([p.correct for p in parts]))


def _metrics(losses: Tensor, correct: Tensor) -> Metrics:
    return Metrics(
        loss=float(losses.double().mean()),
        accuracy=float(correct.double().mean()),
        count=len(losses),
        correct=correct,
        losses=losses,
    )


def right(logits: Tensor, y: Tensor) -> Tensor:
    """Which rows of logits [N, C] are highest at their label [N]; those with a NaN are not."""
    return (logits.argmax(1) == y) & ~logits.isnan().any(1)
