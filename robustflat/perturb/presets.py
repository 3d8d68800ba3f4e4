"""The weight perturbations of the literature: choices of ball, ascent, scale and selection."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from robustflat.perturb import scales
from robustflat.perturb.ascent import Ascent
from robustflat.perturb.ball import Ball, Group, parse_norm
from robustflat.perturb.weights import Statistics, WeightPerturbation

_RELATIVE = {"row": scales.row_norm, "tensor": scales.tensor_norm, "global": scales.global_norm}


def no_perturbation() -> WeightPerturbation:
    """Leave the weights where they are: ``backward`` is an ordinary backward pass."""
    return WeightPerturbation(name="none", ball=Ball(2, 0.0, "global"), ascent=Ascent(0))


def awp(
    gamma: float = 5e-3,
    steps: int = 1,
    *,
    parameters: str = "matrices",
    statistics: Statistics = "perturbed",
) -> WeightPerturbation:
    """Adversarial weight perturbation (Wu et al. 2020, eq. 8 to 10).

    v_l = gamma * ||w_l|| * g_l / ||g_l|| for every tensor l of more than one dimension, in
    ``steps`` steps of gamma / steps, norms taken at the centre. Agrees with the released code,
    which adds 1e-20 to the denominator; its order of step and restore is ``backward(step=...)``.

    Args:
        gamma: radius relative to each tensor's norm (the released code: 0.01 for AT, 0.005 for
            TRADES).
        steps: ascent steps.
        parameters: which are moved.
        statistics: which outer passes update BatchNorm.
    """
    _check_steps("awp", steps)
    return WeightPerturbation(
        name="awp",
        ball=Ball(2, gamma, "tensor"),
        ascent=Ascent(steps, 1 / steps),
        scale=scales.tensor_norm,
        parameters=parameters,
        statistics=statistics,
    )


def awp_global(
    gamma: float = 5e-3,
    *,
    parameters: str = "all",
    statistics: Statistics = "both",
) -> WeightPerturbation:
    """The variant with one ratio for all parameters, which the MAIR framework calls AWP.

    v = gamma * ||w|| * g / ||g||, both norms over all selected parameters, biases and BatchNorm
    included. MAIR also attacks anew at the perturbed weights; here the attack is made once.

    Args:
        gamma: radius relative to the norm of all weights.
        parameters: which are moved.
        statistics: which outer passes update BatchNorm.
    """
    return WeightPerturbation(
        name="awp_global",
        ball=Ball(2, gamma, "global"),
        ascent=Ascent(1),
        scale=scales.global_norm,
        parameters=parameters,
        statistics=statistics,
    )


def amp(
    epsilon: float,
    inner_lr: float = 1.0,
    steps: int = 1,
    group: Group = "tensor",
    *,
    parameters: str = "all",
    statistics: Statistics = "both",
) -> WeightPerturbation:
    """Adversarial model perturbation (Zheng et al. 2021, algorithm 1).

    delta <- delta + inner_lr * g, then projected onto the L2 ball; the gradient is not
    normalised. The released code has a ball for every tensor (``group="tensor"``), the paper one
    for all (``group="global"``). The released script also clips every gradient to norm 50.

    Args:
        epsilon: radius, in the units of the weights.
        inner_lr: zeta, multiplies the gradient.
        steps: ascent steps.
        group: "tensor" or "global".
        parameters: which are moved.
        statistics: which outer passes update BatchNorm.
    """
    _check_steps("amp", steps)
    return WeightPerturbation(
        name="amp",
        ball=Ball(2, epsilon, group),
        ascent=Ascent(steps, inner_lr, direction="raw"),
        parameters=parameters,
        statistics=statistics,
    )


def sam(
    rho: float = 0.05,
    norm: str | float = "l2",
    steps: int = 1,
    *,
    parameters: str = "all",
    statistics: Statistics = "centre",
) -> WeightPerturbation:
    """Sharpness-aware minimisation (Foret et al. 2021, eq. 2 and 3).

    v = rho * sign(g) |g|^(q-1) / ||g||_q^(q/p), 1/p + 1/q = 1, over all parameters together; in
    ``steps`` steps of rho / steps. For p = 2 that is rho * g / ||g||.

    Args:
        rho: radius, in the units of the weights.
        norm: "l2", "linf", "l1" or p in [1, inf].
        steps: ascent steps.
        parameters: which are moved.
        statistics: which outer passes update BatchNorm; the paper's code keeps those of the first.
    """
    _check_steps("sam", steps)
    return WeightPerturbation(
        name="sam",
        ball=Ball(parse_norm(norm), rho, "global"),
        ascent=Ascent(steps, 1 / steps),
        parameters=parameters,
        statistics=statistics,
    )


def asam(
    rho: float = 0.5,
    eta: float = 0.01,
    *,
    parameters: str = "all",
    statistics: Statistics = "both",
) -> WeightPerturbation:
    """Adaptive SAM (Kwon et al. 2021, eq. 7 and 8).

    v = rho * T^2 g / ||T g||, T = |w| + eta on parameters named "weight" (BatchNorm's included, as
    in the released code) and 1 on the others.

    Args:
        rho: radius of the ball of u = v / T.
        eta: added to |w|, so that a zero weight can move.
        parameters: which are moved.
        statistics: which outer passes update BatchNorm.

    Raises:
        ValueError: if ``eta`` is negative.
    """
    if not eta >= 0:
        raise ValueError(f"asam's eta must be >= 0, got {eta}: it is added to |w|.")
    return WeightPerturbation(
        name="asam",
        ball=Ball(2, rho, "global"),
        ascent=Ascent(1),
        scale=scales.asam(eta),
        parameters=parameters,
        statistics=statistics,
    )


def gsam(
    rho: float = 0.05,
    alpha: float = 0.4,
    *,
    parameters: str = "all",
    statistics: Statistics = "centre",
) -> WeightPerturbation:
    """Surrogate gap guided SAM (Zhuang et al. 2022, algorithm 1).

    Descends g_p - alpha * g_perp: g_p is the gradient at SAM's perturbed weights, g_perp the part
    of the gradient at the centre orthogonal to g_p. The paper lets rho follow the learning rate;
    ``dataclasses.replace`` the ball for that, or use the trainer's radius schedule.

    Args:
        rho: radius, in the units of the weights.
        alpha: weight of the surrogate gap; 0 is SAM.
        parameters: which are moved.
        statistics: which outer passes update BatchNorm.

    Raises:
        ValueError: if ``alpha`` is negative.
    """
    if not alpha >= 0:
        raise ValueError(f"gsam's alpha must be >= 0, got {alpha}: it weighs the surrogate gap.")
    return replace(
        sam(rho, parameters=parameters, statistics=statistics),
        name="gsam",
        combine=partial(_descend_surrogate_gap, alpha=alpha) if alpha else None,
    )


def random_weights(
    gamma: float,
    group: Group = "tensor",
    *,
    parameters: str = "matrices",
    statistics: Statistics = "perturbed",
) -> WeightPerturbation:
    """A random direction instead of the worst (Andriushchenko & Flammarion 2022, section 3).

    v = gamma * ||w|| * r / ||r||, r standard normal, for every filter ("row"), tensor or all
    weights: the same size as AWP's, so that the two differ in direction alone. No extra pass.

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


def nsam(inner: WeightPerturbation, batches: int) -> WeightPerturbation:
    """n-SAM: climb the mean loss of many batches, descend that of one.

    Andriushchenko & Flammarion 2022, section 3: with all of the training set (n batches) the
    benefit of SAM is lost. ``backward``'s closure takes the index of a batch, ``loss(i)``; batch 0
    is descended.

    Args:
        inner: the perturbation, such as ``sam(rho)``.
        batches: how many batches are climbed together; 1 is ``inner`` itself.
    """
    return replace(inner, name=f"nsam-{inner.name}", batches=batches)


def _descend_surrogate_gap(
    centre: list[Tensor], perturbed: list[Tensor], *, alpha: float
) -> list[Tensor]:
    along = sum((c * p).sum() for c, p in zip(centre, perturbed, strict=True))
    norms = torch.stack(torch._foreach_norm(perturbed, 2))
    tiny = torch.finfo(norms.dtype).tiny
    ratio = along / (norms.square().sum()).clamp_min(tiny)
    # g_p - alpha (g - ratio g_p)
    combined = torch._foreach_mul(perturbed, 1 + alpha * ratio)
    torch._foreach_add_(combined, centre, alpha=-alpha)
    return list(combined)


def _check_steps(name: str, steps: int) -> None:
    if steps < 1:
        raise ValueError(
            f"{name} needs steps >= 1, got {steps}: without an ascent step it perturbs nothing. "
            "Use no_perturbation() to switch it off."
        )
