"""Owns the input side's counterparts of sharpness: the input gradient and local linearity."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from robustflat.flatness.closure import Closure
from robustflat.flatness.figure import Figure, Passes, mean_and_error
from robustflat.flatness.options import Options
from robustflat.flatness.subject import LossKind, Subject
from robustflat.perturb import Ascent, maximise

_ASCENT = Ascent(10, 0.25, "uniform", keep="best")


def input_gradient_norm(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The mean over examples of ||grad_x loss|| in the norm dual to the attack's.

    The radius of the attack times this is the rise of the loss to first order. Its standard error
    is that of a mean over examples. Details: the mean ``l1`` and ``l2`` norms.
    """
    closure = subject.closure(options, "clean")
    p = options.attack.ball.norm
    dual = 1.0 if p == math.inf else math.inf if p == 1 else p / (p - 1)

    def compute() -> dict[str, float]:
        norms: dict[str, list[Tensor]] = {"dual": [], "l1": [], "l2": []}
        for _, x, y in closure.input_batches():
            _, gradient = _loss_and_slope(closure, x, y)
            rows = gradient.flatten(1)
            for key, exponent in (("dual", dual), ("l1", 1.0), ("l2", 2.0)):
                norms[key].append(torch.linalg.vector_norm(rows, exponent, dim=1).cpu().double())
        values = {key: torch.cat(parts) for key, parts in norms.items()}
        _, error = mean_and_error(values["dual"].tolist())
        return {**{k: float(v.mean()) for k, v in values.items()}, "error": error or 0.0}

    found = subject.part(name, compute)
    return Figure(
        value=found["dual"],
        standard_error=found["error"] if len(closure) > 1 else None,
        details={"dual_norm": dual, "l1": found["l1"], "l2": found["l2"]},
    )


def local_linearity(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The mean over examples of max |l(x + d) - l(x) - <d, grad l(x)>| over the attack's ball.

    The local linearity error of Qin et al. 2019 (eq. 5), searched by 10 ascent steps; 0 for a
    locally linear loss, large where gradients mislead. The image box is not imposed. Its standard
    error is that of a mean over examples.
    """
    closure = subject.closure(options, "clean")

    def compute() -> dict[str, float]:
        start = subject.draw(options.attack.ball.sample, [closure.x], "linearity")[0]
        errors: list[Tensor] = []
        for rows, x, y in closure.input_batches():
            loss_at, slope = _loss_and_slope(closure, x, y)
            misfit = partial(_misfit, closure, x, y, loss_at, slope)
            u = maximise(
                misfit,
                options.attack.ball,
                _ASCENT,
                [x],
                initial=[start[rows].to(x)],
            )
            errors.append(misfit(u)[0].cpu().double())
        mean, error = mean_and_error(torch.cat(errors).tolist())
        return {"mean": mean, "error": error or 0.0}

    found = subject.part(name, compute)
    return Figure(
        value=found["mean"],
        standard_error=found["error"] if len(closure) > 1 else None,
        details={"radius": options.attack.ball.radius},
    )


def slope_passes(options: Options, loss: LossKind) -> Passes:
    """What an input gradient costs."""
    return Passes(input_gradient=1)


def linearity_passes(options: Options, loss: LossKind) -> Passes:
    """What local linearity costs."""
    return Passes(input_gradient=_ASCENT.steps + 3)


def _loss_and_slope(closure: Closure, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's loss and its gradient by the image."""
    closure.count("input_gradient", len(x))
    with torch.enable_grad():
        images = x.detach().requires_grad_()
        losses = closure.example_losses(images, y)
        (slope,) = torch.autograd.grad(losses.sum(), images)
    return losses.detach(), slope


def _misfit(
    closure: Closure, x: Tensor, y: Tensor, loss_at: Tensor, slope: Tensor, u: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    losses, moved_slope = _loss_and_slope(closure, x + u[0], y)
    misfit = losses - loss_at - (u[0] * slope).flatten(1).sum(1)
    sign = misfit.sign().view(-1, *[1] * (x.ndim - 1))
    return misfit.abs(), [sign * (moved_slope - slope)]
