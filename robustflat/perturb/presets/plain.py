"""No perturbation, random ones, and one's own spelled out in full."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustflat.bounds import NonNegative, Share, Whole, checked
from robustflat.perturb import scales
from robustflat.perturb.ascent import Ascent, Keep, Onto, Start
from robustflat.perturb.ball import Ball, Group, Norm, parse_norm
from robustflat.perturb.memory import Rule, Trail
from robustflat.perturb.weights import Statistics, WeightPerturbation

_RELATIVE = {"row": scales.row_norm, "tensor": scales.tensor_norm, "global": scales.global_norm}


def no_perturbation() -> WeightPerturbation:
    """Leave the weights where they are: ``backward`` is an ordinary backward pass.

    Passes: 1.
    Source: the baseline of all others.
    """
    return WeightPerturbation(name="none", ball=Ball(2, 0.0, "global"), ascent=Ascent(0))


def random_weights(
    gamma: NonNegative,
    group: Group = "tensor",
    *,
    parameters: str = "matrices",
    statistics: Statistics = "perturbed",
) -> WeightPerturbation:
    """Random weights: a random direction in place of the worst, of the same size.

    v = gamma * ||w|| * r / ||r||, r standard normal, for every filter ("row"), tensor or all
    weights: the same size as AWP's, so that the two differ in direction alone.

    Passes: 1.
    Source: Andriushchenko & Flammarion 2022, section 3.

    Args:
        gamma: size relative to the norm of each group.
        group: "row", "tensor" or "global".
        parameters: which are moved.
        statistics: "perturbed" is the only possible value: no pass is made at the centre.
    """
    return WeightPerturbation(
        name="random",
        ball=Ball(2, gamma, group),
        ascent=Ascent(0, start="sphere"),
        scale=_RELATIVE[group],
        parameters=parameters,
        statistics=statistics,
    )


@checked
def rwp_mix(
    gamma: NonNegative = 0.015,
    alpha: Share = 0.5,
    *,
    parameters: str = "all",
    statistics: Statistics = "centre",
) -> WeightPerturbation:
    """Mixed random weight perturbation (m-RWP): descend at the centre and under noise together.

    Noise e ~ N(0, (gamma ||w_f||)^2) for every entry of filter f (of the whole vector for biases
    and normalisation), so that ||e_f|| is about gamma ||w_f|| sqrt(size of f); descends
    (1 - alpha) g(w) + alpha g(w + e). alpha = 0 descends g alone. The released code takes the two
    gradients from two batches in turn; here both are of one.

    Passes: 2, independent of each other.
    Source: Li et al. 2024, "Revisiting random weight perturbation"; code nblt/mARWP (gamma 0.015,
    alpha 0.5).

    Args:
        gamma: standard deviation of the noise relative to each filter's norm.
        alpha: weight of the gradient under noise.
        parameters: which are moved.
        statistics: which outer passes update BatchNorm.
    """
    return WeightPerturbation(
        name="rwp_mix",
        ball=Ball(2, gamma, "row"),
        ascent=Ascent(0, start="gaussian"),
        scale=scales.row_norm,
        parameters=parameters,
        statistics=statistics,
        combine=mixing(alpha),
    )


def mixing(alpha: float) -> Rule:
    """(1 - alpha) times the gradient at the centre plus alpha times that at the perturbed weights.

    Raises:
        ValueError: if ``alpha`` is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha mixes two gradients and must be in [0, 1], got {alpha}.")

    def mix(trail: Trail) -> list[Tensor]:
        scaled = torch._foreach_mul(trail.gradients[0], 1 - alpha)
        torch._foreach_add_(scaled, trail.gradients[-1], alpha=alpha)
        return list(scaled)

    return mix


def custom(
    radius: NonNegative,
    group: Group = "tensor",
    norm: Norm = "l2",
    *,
    scale: str = "one",
    steps: Whole = 1,
    step_size: NonNegative = 1.0,
    start: Start = "zero",
    direction: Literal["steepest", "raw"] = "steepest",
    keep: Keep = "last",
    onto: Onto = "ball",
    parameters: str = "all",
    statistics: Statistics = "perturbed",
) -> WeightPerturbation:
    """A perturbation of one's own: ball, scale T, selection and ascent spelled out.

    delta = T * u, u searched in the ball as :class:`robustflat.Ascent` says.

    Passes: steps + 1; one more with keep="best".
    Source: yours.

    Args:
        radius: of the ball of u.
        group: "row", "tensor" or "global".
        norm: "linf", "l2", "l1" or p in [1, inf].
        scale: T: "one", "tensor_norm", "row_norm", "global_norm", "magnitude" or "asam".
        steps: ascent steps.
        step_size: in radii; the learning rate with direction="raw".
        start: where the ascent begins.
        direction: "steepest" or "raw".
        keep: the "last" iterate or the "best".
        onto: "ball" or "sphere".
        parameters: which are moved: "all", "matrices" (AWP's), "norm", "no_norm", "re:PATTERN".
        statistics: which outer passes update BatchNorm.

    Raises:
        ValueError: if a value cannot work.
    """
    if scale not in scales.SCALES:
        raise ValueError(f"scale must be one of {', '.join(scales.SCALES)}, got {scale!r}")
    return WeightPerturbation(
        name="custom",
        ball=Ball(parse_norm(norm), radius, group),
        ascent=Ascent(steps, step_size, start, direction, keep, onto),
        scale=scales.SCALES[scale],
        parameters=parameters,
        statistics=statistics,
    )
