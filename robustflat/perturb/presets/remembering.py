"""SAM's kin that carry something from step to step; an object serves one model."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from robustflat.bounds import BelowOne, Count, NonNegative, Share, Whole, checked
from robustflat.perturb.ascent import Ascent
from robustflat.perturb.ball import Ball
from robustflat.perturb.memory import Trail
from robustflat.perturb.presets.sharpness import dot, sam, unit
from robustflat.perturb.weights import Statistics, WeightPerturbation


@checked
def fsam(
    rho: NonNegative = 0.1,
    sigma: NonNegative = 1.0,
    lmbda: Share = 0.6,
    *,
    parameters: str = "all",
    statistics: Statistics = "centre",
) -> WeightPerturbation:
    """Friendly SAM (F-SAM): climb the part of the gradient that the last steps did not have.

    d = g - sigma m, v = rho d / ||d||, and then m <- lmbda m + (1 - lmbda) g: the average is
    brought up to date after its use. In the first step d = g and m becomes g. sigma = 0 is SAM. The
    paper's order (m first) is another method; the released code's is this one.

    Passes: 2. Memory: one copy of the weights.
    Source: Li et al. 2024, "Friendly sharpness-aware minimization"; code nblt/F-SAM (class: rho
    0.05, lmbda 0.9; command line: rho 0.1, lmbda 0.95).

    Args:
        rho: radius, in the units of the weights.
        sigma: how much of the average is taken away.
        lmbda: decay of the average.
        parameters: which are moved.
        statistics: which outer passes update BatchNorm.
    """

    def batch_specific(trail: Trail) -> list[Tensor]:
        g = trail.gradients[-1]
        return g if trail.memory is None else list(torch._foreach_sub(g, trail.memory, alpha=sigma))

    def average(trail: Trail) -> list[Tensor]:
        return _mean(trail.memory, trail.gradients[0], 1 - lmbda)

    return replace(
        sam(rho, parameters=parameters, statistics=statistics),
        name="fsam",
        direction=batch_specific,
        remember=average,
    )


@checked
def vasso(
    rho: NonNegative = 0.05,
    theta: Share = 0.9,
    *,
    parameters: str = "all",
    statistics: Statistics = "both",
) -> WeightPerturbation:
    """Variance-suppressed SAM (VaSSO): climb an average of the gradients.

    m <- (1 - theta) m + theta g *first*, then v = rho m / ||m||. The first step's m is g.
    theta = 1 is SAM.

    Passes: 2. Memory: one copy of the weights.
    Source: Li & Giannakis 2023, "Enhancing sharpness-aware optimization through variance
    suppression"; code BingcongLi/VaSSO (rho 0.05 and 0.2, theta 0.9; 1e-7 added to the norm).

    Args:
        rho: radius, in the units of the weights.
        theta: weight of the newest gradient.
        parameters: which are moved.
        statistics: which outer passes update BatchNorm.
    """

    def average(trail: Trail) -> list[Tensor]:
        return _mean(trail.memory, trail.gradients[0], theta)

    return replace(
        sam(rho, parameters=parameters, statistics=statistics),
        name="vasso",
        direction=average,
        remember=average,
    )


@checked
def momentum_sam(
    rho: NonNegative = 0.3,
    momentum: BelowOne = 0.9,
    *,
    parameters: str = "all",
) -> WeightPerturbation:
    """Momentum-SAM (MSAM): perturb against the momentum, without a pass of its own.

    b <- momentum b + g(w + v), g(w + v) the descended gradient, and v = -rho b / ||b|| in the next
    step: minus, towards where momentum carries the weights. The first step has v = 0. The released
    code leaves the weights perturbed between steps and decays the weights at w + v, so with weight
    decay its b differs; here they are restored. Not mSAM, which is :class:`robustflat.msam`.

    Passes: 1. Memory: one copy of the weights.
    Source: Becker et al. 2024, "Momentum-SAM"; code MarlonBecker/MSAM (momentum 0.9, rho 0.3 to 3).

    Args:
        rho: radius, in the units of the weights.
        momentum: decay of the sum of gradients.
        parameters: which are moved.
    """

    def against(trail: Trail) -> list[Tensor]:
        return [] if trail.memory is None else list(torch._foreach_neg(trail.memory))

    def add_up(trail: Trail) -> list[Tensor]:
        g = trail.gradients[-1]
        return g if trail.memory is None else _sum(trail.memory, momentum, g)

    return WeightPerturbation(
        name="momentum_sam",
        ball=Ball(2, rho, "global"),
        ascent=Ascent(1),
        parameters=parameters,
        direction=against,
        blind=True,
        remember=add_up,
    )


@checked
def looksam(
    rho: NonNegative = 0.1,
    alpha: NonNegative = 0.7,
    every: Count = 5,
    *,
    parameters: str = "all",
    statistics: Statistics = "centre",
) -> WeightPerturbation:
    """LookSAM: SAM in every k-th step, its direction reused in between.

    In steps 0, k, 2k, ...: v = rho g / ||g||, descends g(w + v) and keeps the unit vector u along
    g(w + v) - <g(w + v), g> / ||g||^2 g. In the others no ascent: descends g + alpha ||g|| u.
    every = 1 is SAM.

    Passes: 2 in every k-th step, 1 in the others. Memory: one copy of the weights.
    Source: Liu et al. 2022, "Towards efficient and scalable sharpness-aware minimization",
    algorithm 1 (every 5, alpha 0.7); no code by its authors.

    Args:
        rho: radius, in the units of the weights.
        alpha: weight of the direction in between.
        every: k.
        parameters: which are moved.
        statistics: which outer passes update BatchNorm.
    """

    def descend(trail: Trail) -> list[Tensor]:
        g = trail.gradients[-1]
        if len(trail.gradients) > 1 or trail.memory is None:
            return g
        # A unit vector by itself; the mean of several processes' is shorter.
        along = unit(trail.memory, alpha * dot(g, g).sqrt())
        return list(torch._foreach_add(g, along))

    def across(trail: Trail) -> list[Tensor]:
        if len(trail.gradients) == 1:
            return trail.memory or []
        g, perturbed = trail.gradients
        along = unit(g, 1.0)
        return unit(_sum(along, -dot(perturbed, along), perturbed), 1.0)

    return replace(
        sam(rho, parameters=parameters, statistics=statistics),
        name="looksam",
        combine=descend,
        remember=across,
        every=every,
    )


@checked
def lesam(
    rho: NonNegative = 0.3,
    sigma: NonNegative = 0.35,
    steps: Count | None = None,
    *,
    warmup: Whole = 0,
    hold: Whole = 0,
    parameters: str = "all",
    statistics: Statistics = "both",
) -> WeightPerturbation:
    """LE-SAM: a radius that shrinks as the gradient grows, and over the training.

    v = min(sigma_t / ||g||, rho) g / ||g||. sigma_t rises on a line to ``sigma`` in the first
    ``warmup`` steps, stays there until step ``hold``, and falls on half a cosine to 0 in the last
    of ``steps``; with ``steps`` None it stays. sigma = inf is SAM.

    Passes: 2.
    Source: "LE-SAM" 2026 (arXiv 2605.10183); code smithgun2005/LE-SAM-ICML2026 (sigma 0.35, rho
    0.3, warm-up 10 and hold 160 of 200 epochs; there sigma changes between epochs, here between
    steps).

    Args:
        rho: largest radius, in the units of the weights.
        sigma: radius times the gradient's norm.
        steps: of the training; None never lowers sigma.
        warmup: steps on the way up.
        hold: the step at which sigma begins to fall.
        parameters: which are moved.
        statistics: which outer passes update BatchNorm.
    """

    def bounded(trail: Trail) -> list[Tensor]:
        g = trail.gradients[-1]
        sigma_now = sigma * _share(trail.step, steps, warmup, hold)
        norm = dot(g, g).sqrt().clamp_min(torch.finfo(g[0].dtype).tiny)
        return unit(g, (sigma_now / norm / rho).clamp_max(1.0))

    return WeightPerturbation(
        name="lesam",
        ball=Ball(2, rho, "global"),
        ascent=Ascent(1, direction="given"),
        parameters=parameters,
        statistics=statistics,
        direction=bounded,
        counts=True,
    )


def _share(step: int, steps: int | None, warmup: int, hold: int) -> float:
    """What multiplies sigma in step ``step``, counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    if steps is None or step < hold:
        return 1.0
    done = min((step - hold) / max(steps - 1 - hold, 1), 1.0)
    return (1 + math.cos(math.pi * done)) / 2


def _mean(memory: list[Tensor] | None, g: list[Tensor], share: float) -> list[Tensor]:
    """(1 - share) of the memory and ``share`` of ``g``; ``g`` where there is no memory yet."""
    if memory is None:
        return g
    return list(torch._foreach_add(torch._foreach_mul(memory, 1 - share), g, alpha=share))


def _sum(a: list[Tensor], factor: float | Tensor, b: list[Tensor]) -> list[Tensor]:
    """``factor`` times ``a`` plus ``b``."""
    return list(torch._foreach_add(torch._foreach_mul(a, factor), b))
