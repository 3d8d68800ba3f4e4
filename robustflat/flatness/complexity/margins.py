"""Owns the measures of the outputs: margins, boundary thickness, divergence, Lipschitz constant.

"robust" is at the attack's images, made once at the present weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from robustflat.errors import UserError
from robustflat.flatness.closure import Closure
from robustflat.flatness.decorator import FIXED, measure
from robustflat.flatness.figure import Figure, Passes, mean_and_error
from robustflat.flatness.options import Options
from robustflat.flatness.subject import LossKind, Subject
from robustflat.perturb import Ascent, maximise

PERCENTILES = (10, 25, 50, 75, 90)
# Points of a segment at which the boundary is looked for, each in the middle of its share.
SEGMENT = 32
ALPHA, BETA = 0.0, 0.75
LIPSCHITZ = Ascent(10, 0.25, "uniform", keep="best")


@measure("logit_margin", loss=FIXED, cost=Passes(forward=1), uses=())
def logit_margin(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The mean of z_y - max_{j != y} z_j; negative where misclassified.

    Elsayed et al. 2018; Kim et al. 2023. Details: ``percentiles`` over the examples.
    """
    return _mean(_margins(subject, options, loss, name))


@measure("probability_margin", loss=FIXED, cost=Passes(forward=1), uses=())
def probability_margin(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The mean of p_y - max_{j != y} p_j, p the softmax. Details: ``percentiles``."""
    return _mean(_margins(subject, options, loss, name, softmax=True))


@measure("logit_margin_p10", loss=FIXED, cost=Passes(forward=1), uses=())
def logit_margin_p10(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The 10th percentile of the logit margin (Jiang et al. 2020, "inverse margin")."""
    values = _margins(subject, options, loss, name)
    return Figure(value=_percentiles(values)["10"])


@measure("kl_robust", loss="robust_fixed", cost=Passes(forward=2), uses=())
def kl_robust(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The mean of KL(p(x_adv) || p(x)), which TRADES and MART penalise (Kim et al. 2023)."""

    def divergences(closure: Closure, x: Tensor, x_adv: Tensor) -> Tensor:
        clean, moved = _logits(closure, x), _logits(closure, x_adv)
        p, log_p, log_q = moved.softmax(1), moved.log_softmax(1), clean.log_softmax(1)
        return (p * (log_p - log_q)).sum(1)

    return _mean(subject.part(name, lambda: _of_both(subject, options, 2, divergences)))


@measure("boundary_thickness", loss="robust_fixed", cost=Passes(forward=2 + SEGMENT), uses=())
def boundary_thickness(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The mean length of the segment from x to x_adv on which the decision is open.

    ||x - x_adv||_2 int_0^1 1[alpha < p_i(x(t)) - p_j(x(t)) < beta] dt, i the class predicted at x,
    j that at x_adv, alpha = 0, beta = 0.75 (Yang et al. 2020, "Boundary thickness and robustness in
    learning models"), over the examples whose class the attack changes; their share is in
    ``changed``. NaN if it changes none. The integral is over 32 midpoints.
    """

    def lengths(closure: Closure, x: Tensor, moved: Tensor) -> Tensor:
        i, j = (_logits(closure, at).argmax(1) for at in (x, moved))
        inside = torch.zeros(len(x), device=x.device, dtype=torch.float64)
        for k in range(SEGMENT):
            t = (k + 0.5) / SEGMENT
            p = _logits(closure, (1 - t) * x + t * moved).softmax(1)
            lead = p.gather(1, i[:, None]) - p.gather(1, j[:, None])
            inside += ((lead > ALPHA) & (lead < BETA)).squeeze(1)
        length = (moved - x).flatten(1).double().norm(dim=1) * inside / SEGMENT
        return torch.where(i == j, -1.0, length)

    def compute() -> list[float]:
        return _of_both(subject, options, 2 + SEGMENT, lengths)

    everything = subject.part(name, compute)
    changed = [v for v in everything if v >= 0]
    share = {"changed": len(changed) / len(everything)}
    if not changed:
        return Figure(value=math.nan, details=share)
    figure = _mean(changed)
    return replace(figure, details={**figure.details, **share})


_LIPSCHITZ_COST = Passes(forward=1, input_gradient=LIPSCHITZ.steps + 2)


@measure("local_lipschitz", cost=_LIPSCHITZ_COST, uses=("attack",))
def local_lipschitz(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The mean of max ||z(x + d) - z(x)||_1 / ||d||, d in the attack's ball and norm.

    Yang et al. 2020 ("A closer look at accuracy vs. robustness"), searched by 10 ascent steps on
    the numerator from a uniform start, the best ratio kept: a lower bound. The image box is not
    imposed.
    """
    closure = subject.closure(options, "clean")
    ball = options.attack.ball
    if ball.radius == 0:
        raise UserError(f"{name} is a maximum over the attack's ball, whose eps is 0. Set eps.")

    def compute() -> list[float]:
        start = subject.draw(ball.sample, [closure.x], "lipschitz")[0]

        def ratios(rows: slice, x: Tensor, y: Tensor) -> Tensor:
            ratio = partial(_ratio, closure, x, _logits(closure, x), ball.norm)
            u = maximise(ratio, ball, LIPSCHITZ, [x], initial=[start[rows].to(x)])
            return ratio(u)[0]

        return closure.per_example(ratios, **vars(_LIPSCHITZ_COST))

    return _mean(subject.part(name, compute))


def _ratio(
    closure: Closure, x: Tensor, at: Tensor, norm: float, u: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    with torch.enable_grad():
        d = u[0].detach().requires_grad_()
        size = torch.linalg.vector_norm(d.flatten(1), norm, dim=1)
        change = (closure.model(x + d) - at).abs().sum(1)
        (slope,) = torch.autograd.grad(change.sum(), d)
    return (change / size.clamp_min(1e-12)).detach(), [slope]


def _margins(
    subject: Subject,
    options: Options,
    loss: LossKind,
    name: str,
    *,
    softmax: bool = False,
) -> list[float]:
    closure = subject.derived(options, loss)

    def margins(rows: slice, x: Tensor, y: Tensor) -> Tensor:
        z = _logits(closure, x)
        z = z.softmax(1) if softmax else z
        labels = (y.argmax(1) if y.is_floating_point() else y)[:, None]
        others = z.scatter(1, labels, -torch.inf).amax(1)
        return z.gather(1, labels).squeeze(1) - others

    return subject.part(name, lambda: closure.per_example(margins, forward=1))


def _of_both(
    subject: Subject,
    options: Options,
    forwards: int,
    work: Callable[[Closure, Tensor, Tensor], Tensor],
) -> list[float]:
    """A number of every example, from its image and the attack's."""
    clean, robust = subject.closure(options, "clean"), subject.closure(options, "robust_fixed")
    return clean.per_example(
        lambda rows, x, y: work(clean, x, robust.x[rows].to(x)), forward=forwards
    )


@torch.no_grad()
def _logits(closure: Closure, x: Tensor) -> Tensor:
    logits: Tensor = closure.model(x)
    return logits


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = torch.tensor(values, dtype=torch.float64)
    return {str(p): float(ordered.quantile(p / 100)) for p in PERCENTILES}


def _mean(values: list[float]) -> Figure:
    mean, error = mean_and_error(values)
    return Figure(value=mean, standard_error=error, details={"percentiles": _percentiles(values)})
