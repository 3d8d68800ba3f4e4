"""Owns sharpness: how much the loss rises in the worst, the ascent and an average direction.

Each is a statistic of L(w + v) - L(w) over the displacements v of a ball around the weights. Of the
robust loss, "robust" remakes the adversarial examples at w and at every w + v from the same random
starts (common random numbers: the difference is not noise of the attack), so the worst direction is
a joint ascent over weights and inputs; "robust_fixed" keeps those made at w.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from robustflat.errors import UserError
from robustflat.evaluate.team import Team
from robustflat.flatness.closure import Closure, Kind, attack_cost
from robustflat.flatness.decorator import SHARPNESS, measure
from robustflat.flatness.figure import Figure, Passes, mean_and_error
from robustflat.flatness.options import AVERAGE_RADIUS, MOVED, WORST_RADIUS, Options
from robustflat.flatness.subject import Draw, LossKind, Subject, normal
from robustflat.perturb import Ascent, Ball, displaced, maximise
from robustflat.perturb.displace import Move
from robustflat.perturb.scales import Scale

Part = dict[str, float]
# Draws in the shapes of the weights, on the CPU.
Drawn = Callable[[Draw], list[Tensor]]
_BALL = ("parameters", "ball", "weight_norm", "radius", "m", "normalise_logits")


class Neighbourhood:
    """The loss around the present weights: what an ascent climbs and where it is compared to."""

    def __init__(
        self,
        closure: Closure,
        named: Mapping[str, Tensor],
        ball: Ball,
        scale: Scale,
        move: Move,
    ) -> None:
        self._closure = closure
        self._parameters = list(named.values())
        self._move = move
        self._reference: Tensor | None = None
        self.like = [p.detach() for p in self._parameters]
        self.ball = ball
        self._scale = scale(list(named), self.like)
        self._best: tuple[float, Tensor] | None = None

    @property
    def reference(self) -> Tensor:
        """The loss of every example at the centre."""
        if self._reference is None:
            self._move(self._displacement([torch.zeros_like(t) for t in self.like]))
            self._reference = self._closure.losses()
        return self._reference

    def value_and_grad(self, u: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The mean loss at u and its gradient, for :func:`maximise`; notes the best so far."""
        self._move(self._displacement(u))
        losses, gradient = self._closure.value_and_grad(self._parameters)
        value = losses.mean()
        if not math.isfinite(value):  # above all that is finite
            losses = torch.full_like(losses, math.inf)
        if self._best is None or float(losses.mean()) > self._best[0]:
            self._best = (float(losses.mean()), losses)
        return value.to(self.like[0].device, self.like[0].dtype), self._displacement(gradient)

    def rise(self, losses: Tensor) -> Part:
        """What is kept of losses at some weights, compared with those at the centre."""
        difference = losses - self.reference
        error = difference.std(correction=1) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
        return {
            "increase": float(difference.mean()),
            "example_standard_error": float(error),
            "reference": float(self.reference.mean()),
        }

    def rise_at(self, u: list[Tensor]) -> Part:
        """The same at a given u."""
        self._move(self._displacement(u))
        return self.rise(self._closure.losses())

    def climbed(self, climb: Callable[[], object]) -> Part:
        """The same at the best weights that ``climb`` visits; infinite if the loss overflows."""
        self._best = None
        climb()
        return self.rise(self._best[1]) if self._best is not None else self.rise(self.reference)

    def _displacement(self, u: list[Tensor]) -> list[Tensor]:
        return u if self._scale is None else list(torch._foreach_mul(u, self._scale))


def worst_passes(options: Options, loss: LossKind) -> Passes:
    """What :func:`worst` costs."""
    gradients = options.restarts * (options.steps + 1) + 1
    return _passes(options, loss, gradients=gradients, forwards=1)


def _passes(options: Options, loss: LossKind, *, gradients: int, forwards: int) -> Passes:
    own = Passes(gradient=gradients, forward=forwards)
    if loss != "robust":
        return own
    return own + Passes(**attack_cost(options.attack)).times(gradients + forwards)


@measure(
    "worst",
    loss=SHARPNESS,
    cost=worst_passes,
    uses=(*_BALL, "steps", "step_size", "restarts"),
)
def worst(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """Worst-direction sharpness: max L(w + v) - L(w) in the ball, by projected ascent.

    The first restart begins where the ascent direction ends, the others uniformly in the ball; the
    best of all weights visited counts, the centre included: at least 0, and a lower bound of the
    true maximum. Where one of them has a loss that is not finite, so is the figure.
    Details: ``restarts``, the rise that each found.
    """
    ascent = Ascent(options.steps, options.step_size, "uniform", keep="best")
    radius, dtype = options.radius_or(WORST_RADIUS), next(subject.model.parameters()).dtype
    if radius > (most := torch.finfo(dtype).max ** 0.4):
        raise UserError(
            f"{name} is sought in a ball, and lengths overflow {dtype} in one of radius "
            f"{radius:g}. Take at most {most:.0e}."
        )

    def restart(near: Neighbourhood, index: int, draw: Drawn) -> Part:
        def climb() -> None:
            start = _ascent_end(near) if index == 0 else draw(near.ball.sample)
            maximise(near.value_and_grad, near.ball, ascent, near.like, initial=start)

        return near.climbed(climb)

    def summarise(parts: list[Part]) -> Part:
        best = max(parts, key=lambda part: part["increase"])
        return {**best, "increase": max(best["increase"], 0.0)}

    return _measure(
        subject, options, loss, name, WORST_RADIUS, options.restarts, restart, summarise, "restarts"
    )


@measure(
    "ascent", loss=SHARPNESS, cost=lambda o, loss: _passes(o, loss, gradients=1, forwards=2),
    uses=_BALL,
)  # fmt: skip
def ascent(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """Ascent-direction sharpness: L(w + v) - L(w), v one steepest step of a radius (AWP, SAM).

    Can be negative where the loss is not locally convex along v.
    """

    def once(near: Neighbourhood, index: int, draw: Drawn) -> Part:
        return near.rise_at(_ascent_end(near))

    return _measure(subject, options, loss, name, WORST_RADIUS, 1, once, lambda parts: parts[0])


@measure(
    "average",
    loss=SHARPNESS,
    cost=lambda o, loss: _passes(o, loss, gradients=0, forwards=o.samples + 1),
    uses=(*_BALL, "samples", "distribution"),
)
def average(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """Average-direction sharpness: the mean over random directions of L(w + v) - L(w).

    Its standard error is that over directions. Details: ``samples``, the rise along each.
    """

    def sample(near: Neighbourhood, index: int, draw: Drawn) -> Part:
        if options.distribution == "normal":
            lengths = [near.ball.radius * d for d in options.deviations(near.like)]
            return near.rise_at(list(torch._foreach_mul(draw(normal), lengths)))
        surface = options.distribution == "sphere"
        return near.rise_at(draw(partial(near.ball.sample, surface=surface)))

    def summarise(parts: list[Part]) -> Part:
        mean = {key: mean_and_error([part[key] for part in parts])[0] for key in parts[0]}
        _, error = mean_and_error([part["increase"] for part in parts])
        return mean if error is None else {**mean, "standard_error": error}

    return _measure(
        subject, options, loss, name, AVERAGE_RADIUS, options.samples, sample, summarise, "samples"
    )


def _drawn(subject: Subject, like: list[Tensor], *purpose: object) -> Drawn:
    return lambda draw: subject.draw(draw, like, *purpose)


def _nothing(near: Neighbourhood, index: int, draw: Drawn) -> Part:
    return near.rise(near.reference)


def _ascent_end(near: Neighbourhood) -> list[Tensor]:
    return maximise(near.value_and_grad, near.ball, Ascent(1), near.like)


def _measure(
    subject: Subject,
    options: Options,
    loss: LossKind,
    name: str,
    default_radius: float,
    repeats: int,
    compute: Callable[[Neighbourhood, int, Drawn], Part],
    summarise: Callable[[list[Part]], Part],
    detail: str | None = None,
) -> Figure:
    """Repeat a part for every chunk of m examples, and average over the chunks."""
    closure = subject.closure(options, loss)
    size = options.m or len(subject)
    chunks = range(0, len(subject), size)
    # Of many chunks each process takes whole ones; the passes are told when they are joined.
    apart = len(chunks) > 1

    def measured(chunk: int) -> tuple[list[Part], list[tuple[Kind, int]]]:
        rows = slice(chunks[chunk], min(chunks[chunk] + size, len(subject)))
        told: list[tuple[Kind, int]] = []
        of_rows = closure.part(rows)
        if apart:
            of_rows = replace(of_rows, team=Team(), count=lambda *passes: told.append(passes))
        named = dict(subject.parameters(options, MOVED))
        with displaced(named.values()) as move:
            ball = options.weight_ball(default_radius)
            near = Neighbourhood(of_rows, named, ball, options.scale, move)
            parts = [
                subject.part(
                    f"{name}/{chunk}/{i}",
                    partial(
                        compute if near.ball.radius > 0 else _nothing,
                        near,
                        i,
                        _drawn(subject, near.like, name, chunk, i),
                    ),
                )
                for i in range(repeats)
            ]
        return parts, told

    team = subject.team if apart else Team()
    every: list[list[Part]] = []
    for results in team.each(measured, range(len(chunks))):
        for parts, told in results:
            for i, part in enumerate(parts):  # what another process found is kept, too
                subject.keep(f"{name}/{len(every)}/{i}", part)
            for passes in told:
                closure.count(*passes)
            every.append(parts)
    summaries = [summarise(parts) for parts in every]
    weights = [min(size, len(subject) - start) for start in chunks]
    repeated = [[part["increase"] for part in parts] for parts in every]
    shares = [weight / len(subject) for weight in weights]
    total = {
        key: sum(share * part[key] for share, part in zip(shares, summaries, strict=True))
        for key in ("increase", "reference")
    }
    # Chunks share no random number and no example, so their errors add in quadrature.
    error = {
        key: math.hypot(*(w * part[key] for w, part in zip(shares, summaries, strict=True)))
        for key in ("example_standard_error", "standard_error")
        if key in summaries[0]
    }
    details: dict[str, object] = {
        "loss": loss,
        "ball": options.ball,
        "weight_norm": options.weight_norm,
        "radius": options.radius_or(default_radius),
        "parameters": options.parameters or MOVED,
        "reference_loss": total["reference"],
        "perturbed_loss": total["reference"] + total["increase"],
        "example_standard_error": error["example_standard_error"],
        "m": options.m,
    }
    if detail is not None:
        details[detail] = repeated[0] if len(repeated) == 1 else repeated
    return Figure(
        value=total["increase"], standard_error=error.get("standard_error"), details=details
    )
