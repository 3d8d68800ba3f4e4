"""Owns the input side's counterparts of sharpness: the input gradient and local linearity."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from robustflat.flatness.closure import Closure
from robustflat.flatness.decorator import measure
from robustflat.flatness.figure import Figure, Passes, mean_and_error
from robustflat.flatness.options import Options
from robustflat.flatness.subject import LossKind, Subject
from robustflat.perturb import Ascent, maximise

_ASCENT = Ascent(10, 0.25, "uniform", keep="best")


_SLOPE = Passes(input_gradient=1)
_LINEARITY = Passes(input_gradient=_ASCENT.steps + 3)


@measure("input_gradient_norm", cost=_SLOPE, uses=("attack", "normalise_logits"))
def input_gradient_norm(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The mean over examples of ||grad_x loss|| in the norm dual to the attack's.

    The radius of the attack times this is the rise of the loss to first order. Its standard error
    is that of a mean over examples. Details: the mean ``l1`` and ``l2`` norms.
    """
    closure = subject.closure(options, "clean")
    p = options.attack.ball.norm
    dual = 1.0 if p == math.inf else math.inf if p == 1 else p / (p - 1)

    def norms(rows: slice, x: Tensor, y: Tensor) -> list[Tensor]:
        slopes = _loss_and_slope(closure, x, y)[1].flatten(1)
        return [torch.linalg.vector_norm(slopes, q, dim=1) for q in (dual, 1.0, 2.0)]

    def compute() -> dict[str, float]:
        batches = zip(*closure.each(norms, **vars(_SLOPE)), strict=True)
        values = [torch.cat(parts).cpu().double() for parts in batches]
        means = dict(zip(("dual", "l1", "l2"), (float(v.mean()) for v in values), strict=True))
        _, error = mean_and_error(values[0].tolist())
        return {**means, "error": error or 0.0}

    found = subject.part(name, compute)
    return Figure(
        value=found["dual"],
        standard_error=found["error"] if len(closure) > 1 else None,
        details={"dual_norm": dual, "l1": found["l1"], "l2": found["l2"]},
    )


@measure("local_linearity", cost=_LINEARITY, uses=("attack", "normalise_logits"))
def local_linearity(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The mean over examples of max |l(x + d) - l(x) - <d, grad l(x)>| over the attack's ball.

    The local linearity error of Qin et al. 2019 (eq. 5), searched by 10 ascent steps from one
    start: a lower bound. It is 0 for a locally linear loss, large where gradients mislead. The
    image box is not imposed. Its standard error is that of a mean over examples.
    """
    closure = subject.closure(options, "clean")

    def compute() -> dict[str, float]:
        start = subject.draw(options.attack.ball.sample, [closure.x], "linearity")[0]

        def misfits(rows: slice, x: Tensor, y: Tensor) -> Tensor:
            misfit = partial(_misfit, closure, x, y, *_loss_and_slope(closure, x, y))
            at = [start[rows].to(x)]
            u = maximise(misfit, options.attack.ball, _ASCENT, [x], initial=at)
            return misfit(u)[0]

        errors = closure.per_example(misfits, **vars(_LINEARITY))
        mean, error = mean_and_error(errors)
        return {"mean": mean, "error": error or 0.0}

    found = subject.part(name, compute)
    return Figure(
        value=found["mean"],
        standard_error=found["error"] if len(closure) > 1 else None,
        details={"radius": options.attack.ball.radius},
    )


def _loss_and_slope(closure: Closure, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's loss and its gradient by the image."""
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
