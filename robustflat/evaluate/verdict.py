"""Owns the verdict on an adversarial example: in the ball, in the box, truly misclassified."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustflat.evaluate.accuracy import right

# An example may lie this much outside the ball, relative to its radius.
TOLERANCE = 1e-6
# Further out, up to here, it is float32 rounding: the example is pulled in and judged there.
SLACK = 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """The judge's finding on a batch.

    Attributes:
        broken: bool [N], on the CPU: a valid example that the model misclassifies.
        outside: bool [N], on the CPU: what the attack returned was no valid image of the ball.
        predictions: int64 [N], on the CPU: what the model takes the images judged for.
        x_adv: The images judged, [N, C, H, W]; the original where `outside`.
    """

    broken: Tensor
    outside: Tensor
    predictions: Tensor
    x_adv: Tensor


def judge(
    model: nn.Module, x: Tensor, candidate: Tensor, y: Tensor, *, norm: float, eps: float
) -> Verdict:
    """Judge what an attack returned, whatever the attack says about it.

    Distances are computed in float64. An example counts if it is within `eps` (1 + 1e-6) of its
    original, its pixels are in [0, 1], and the model misclassifies it, in float32. One that is
    further out by rounding (within 1e-3 relative, or 1e-6 beyond [0, 1]) is first pulled onto the
    ball and the box, rounding towards the original, and judged there. All others do not count.

    Args:
        model: The plain model, float32.
        x: Originals in [0, 1], float32 [N, C, H, W].
        candidate: The attack's images, of the same shape.
        y: Labels [N].
        norm: p of the ball: 1, 2 or inf.
        eps: Its radius.

    Returns:
        The verdict.
    """
    home = x.cpu()
    given = candidate.detach().to("cpu", torch.float32)
    if given.shape != home.shape:
        raise ValueError(
            f"An attack must return images of the shape it was given, {list(home.shape)}, "
            f"got {list(given.shape)}."
        )
    over_box = torch.maximum(given - 1, -given).flatten(1).amax(1)
    distance = size(given.double() - home.double(), norm)
    # Comparisons with NaN are false, so what is not finite is outside.
    valid = (over_box <= 1e-6) & (distance <= eps * (1 + SLACK))
    exact = valid & (over_box <= 0) & (distance <= eps * (1 + TOLERANCE))
    final = torch.where(_rows(valid, given), given, home)
    crooked = (valid & ~exact).nonzero().flatten()
    if len(crooked):
        final[crooked] = _pulled_in(home[crooked], given[crooked], norm, eps)
    final_on = final.to(x.device)
    with torch.no_grad():
        logits = model(final_on)
    return Verdict(
        broken=~right(logits, y).cpu() & valid,
        outside=~valid,
        predictions=logits.argmax(1).cpu(),
        x_adv=final_on,
    )


def size(delta: Tensor, norm: float) -> Tensor:
    """The p-norm of every row."""
    return torch.linalg.vector_norm(delta.flatten(1), ord=norm, dim=1)


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.ndim - 1))


def _pulled_in(x: Tensor, candidate: Tensor, norm: float, eps: float) -> Tensor:
    """A float32 image of ball and box next to `candidate`: no pixel moves away from `x`."""
    delta = candidate.double().clamp(0, 1) - x.double()
    if norm == float("inf"):
        delta = delta.clamp(-eps, eps)
    else:
        delta = delta * _rows((eps / size(delta, norm)).clamp(max=1), x)
    pulled = (x.double() + delta).float()
    # Rounding to float32 may have lengthened a pixel's step: take the next number towards x.
    longer = (pulled.double() - x.double()).abs() > delta.abs()
    return torch.where(longer, torch.nextafter(pulled, x), pulled)
