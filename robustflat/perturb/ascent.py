"""The only ascent loop of the package: maximise a function over a ball of inputs or weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from robustflat.perturb.ball import Ball, drawn

Start = Literal["zero", "uniform", "sphere", "normal", "gaussian"]
Direction = Literal["steepest", "raw", "given"]
Keep = Literal["last", "best"]
Onto = Literal["ball", "sphere"]
ValueAndGrad = Callable[[list[Tensor]], tuple[Tensor, list[Tensor]]]
Constrain = Callable[[list[Tensor]], list[Tensor]]

_NORMAL_STD = 1e-3


@dataclass(frozen=True)
class Ascent:
    """How a ball is searched.

    Args:
        steps: gradient steps, at least 0 (0 leaves the start).
        step_size: in radii of the ball; with ``direction="raw"`` the learning rate that multiplies
            the gradient itself (AMP's zeta).
        start: "zero"; "uniform" in the ball; "sphere", uniform on its surface; "normal", 0.001
            times a standard normal in the units of ``u`` and not projected (TRADES, MART);
            "gaussian", a standard normal in radii for every entry, not projected (noise).
        direction: "steepest" step of the ball's norm, the "raw" gradient, or what the function
            returns in its place as it is "given", in radii.
        keep: the "last" iterate, or the "best" over all iterates, start and end included (per row
            where the value has one number a row); "best" costs one more evaluation.
        onto: every iterate is projected onto the "ball"; or, from start="zero" in an l2 ball, it is
            the sum of all steps drawn to the "sphere", zero while that sum is zero (RWP).
        spread: size of a "uniform" or "sphere" start, in radii.
    """

    steps: int
    step_size: float = 1.0
    start: Start = "zero"
    direction: Direction = "steepest"
    keep: Keep = "last"
    onto: Onto = "ball"
    spread: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"An ascent needs steps >= 0, got {self.steps}.")
        if not (0 <= self.step_size < math.inf):
            raise ValueError(
                f"An ascent's step_size must be finite and >= 0, got {self.step_size}."
            )
        if not 0 <= self.spread <= 1:
            raise ValueError(f"An ascent's spread must be in [0, 1], got {self.spread}.")
        for field, allowed in (
            ("start", get_args(Start)),
            ("direction", get_args(Direction)),
            ("keep", get_args(Keep)),
            ("onto", get_args(Onto)),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"An ascent's {field} must be one of {allowed}, got {getattr(self, field)!r}."
                )

    @property
    def stays_inside(self) -> bool:
        """Whether the steps cannot leave the ball, by the triangle inequality."""
        reach = self.steps * self.step_size
        return self.start == "zero" and self.direction == "steepest" and reach <= 1 + 1e-9


def check_projection(ball: Ball, ascent: Ascent) -> None:
    """Refuse an ascent that may leave a ball onto which nothing can be projected.

    Raises:
        ValueError: if so.
    """
    if ascent.onto == "sphere" and (ball.norm != 2 or ascent.start != "zero"):
        raise ValueError(
            "onto='sphere' draws the sum of all steps to the sphere of an l2 ball, from "
            f"start='zero'; got norm p = {ball.norm} and start={ascent.start!r}. Use these, or "
            "onto='ball'."
        )
    if ball.norm not in (1, 2, math.inf) and ball.radius > 0 and not ascent.stays_inside:
        raise ValueError(
            f"This ascent can leave its ball of norm p = {ball.norm}, and projection onto an lp "
            "ball has no closed form except for p = 1, 2 and inf. Use one of these, or steps from "
            "start='zero' whose sizes add up to at most one radius."
        )


def maximise(
    value_and_grad: ValueAndGrad,
    ball: Ball,
    ascent: Ascent,
    like: list[Tensor],
    generator: torch.Generator | None = None,
    *,
    initial: list[Tensor] | None = None,
    constrain: Constrain | None = None,
) -> list[Tensor]:
    """Search ``ball`` for the ``u`` at which a function is largest, by projected gradient ascent.

    Args:
        value_and_grad: maps ``u`` to its value (one number, or ``[N]`` with one a row) and its
            gradient. It knows the model, labels and layers; this loop does not. It must not keep
            ``u``, which is changed in place.
        ball: the feasible set.
        ascent: steps, step size, start, direction and what to keep.
        like: tensors that give shapes, dtypes and devices of ``u``.
        generator: source of randomness for the start, on the same device.
        initial: a start to use instead of drawing one; made feasible like every iterate, unless
            ``ascent.start`` is "normal", whose starts are taken as they are.
        constrain: a further constraint, applied after each projection (the image box).

    Returns:
        ``u``, a list of new tensors without gradient.
    """
    feasible = _feasible_set(ball, constrain, ascent.stays_inside and initial is None)
    if initial is None:
        u = _start(ascent, ball, like, generator)
    else:
        u = [t.detach().clone() for t in initial]
    # TRADES' normal start is neither projected nor clipped before the first step.
    if ascent.start not in ("normal", "gaussian") and initial is not None:
        u = feasible(u)
    elif ascent.start in ("uniform", "sphere") and constrain is not None:
        u = constrain(u)
    best = _Best() if ascent.keep == "best" else None
    length = ascent.step_size * (1.0 if ascent.direction == "raw" else ball.radius)
    total = [t.clone() for t in u] if ascent.onto == "sphere" else []
    for _ in range(ascent.steps):
        value, gradient = value_and_grad(u)
        if best is not None:
            best.offer(value, u)
        step = ball.steepest(gradient) if ascent.direction == "steepest" else gradient
        if total:
            torch._foreach_add_(total, step, alpha=length)
            u = list(torch._foreach_mul(ball.steepest(total), ball.radius))
        else:
            torch._foreach_add_(u, step, alpha=length)
            u = feasible(u)
    if best is None:
        return u
    best.offer(value_and_grad(u)[0], u)
    return best.u


def _feasible_set(ball: Ball, constrain: Constrain | None, inside: bool) -> Constrain:
    def feasible(u: list[Tensor]) -> list[Tensor]:
        u = u if inside else ball.project(u)
        return u if constrain is None else constrain(u)

    return feasible


def _start(
    ascent: Ascent, ball: Ball, like: list[Tensor], generator: torch.Generator | None
) -> list[Tensor]:
    start = ascent.start
    if start == "zero":
        return [torch.zeros_like(t) for t in like]
    if start == "normal":
        return [drawn(t, lambda e: e.normal_(0, _NORMAL_STD, generator=generator)) for t in like]
    if start == "gaussian":
        return [drawn(t, lambda e: e.normal_(0, ball.radius, generator=generator)) for t in like]
    within = replace(ball, radius=ball.radius * ascent.spread)
    return within.sample(like, generator, surface=start == "sphere")


class _Best:
    """The best iterate so far: for every row where values come by row, else as a whole."""

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.u: list[Tensor] = []

    def offer(self, value: Tensor, u: list[Tensor]) -> None:
        value = value.detach()
        if self.value is None:
            self.value, self.u = value.clone(), [t.clone() for t in u]
            return
        better = (value > self.value) | self.value.isnan()
        self.value = torch.where(better, value, self.value)
        self.u = [
            torch.where(better.view(better.shape + (1,) * (t.ndim - better.ndim)), t, kept)
            for t, kept in zip(u, self.u, strict=True)
        ]
