"""Adversarial perturbations of the weights: AWP, its global variant, AMP and RWP."""

from __future__ import annotations

from torch import Tensor

from robustflat.bounds import Count, NonNegative, checked
from robustflat.perturb import scales
from robustflat.perturb.ascent import Ascent
from robustflat.perturb.ball import Ball, Group
from robustflat.perturb.memory import Trail
from robustflat.perturb.weights import Statistics, WeightPerturbation


def awp(
    gamma: NonNegative = 5e-3,
    steps: Count = 1,
    *,
    parameters: str = "matrices",
    statistics: Statistics = "perturbed",
) -> WeightPerturbation:
    """Adversarial weight perturbation (AWP): every layer moves by gamma times its norm.

    v_l = gamma * ||w_l|| * g_l / ||g_l|| for every tensor l of more than one dimension, in
    ``steps`` steps of gamma / steps, norms taken at the centre. Agrees with the released code,
    which adds 1e-20 to the denominator; its order of step and restore is ``backward(step=...)``.

    Passes: steps + 1.
    Source: Wu, Xia & Wang 2020, eq. 8 to 10; code csdongxian/AWP (gamma 0.01 for AT, 0.005 for
    TRADES; paper 0.005).

    Args:
        gamma: radius relative to each tensor's norm.
        steps: ascent steps.
        parameters: which are moved.
        statistics: which outer passes update BatchNorm.
    """
    check_steps("awp", steps)
    return WeightPerturbation(
        name="awp",
        ball=Ball(2, gamma, "tensor"),
        ascent=Ascent(steps, 1 / steps),
        scale=scales.tensor_norm,
        parameters=parameters,
        statistics=statistics,
    )


def awp_global(
    gamma: NonNegative = 5e-3,
    *,
    parameters: str = "all",
    statistics: Statistics = "both",
) -> WeightPerturbation:
    """AWP with one ratio for all parameters, which the MAIR framework calls AWP.

    v = gamma * ||w|| * g / ||g||, both norms over all selected parameters, biases and BatchNorm
    included. MAIR also attacks anew at the perturbed weights; here the attack is made once.

    Passes: 2.
    Source: Kim et al. 2023, code Harry24k/MAIR.

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
    epsilon: NonNegative,
    inner_lr: NonNegative = 1.0,
    steps: Count = 1,
    group: Group = "tensor",
    *,
    parameters: str = "all",
    statistics: Statistics = "both",
) -> WeightPerturbation:
    """Adversarial model perturbation (AMP): plain gradient steps, projected onto a ball.

    delta <- delta + inner_lr * g, then projected onto the L2 ball; the gradient is not
    normalised. The released code has a ball for every tensor (``group="tensor"``), the paper one
    for all (``group="global"``). The released script also clips every gradient to norm 50.

    Passes: steps + 1.
    Source: Zheng, Zhang & Mao 2021, algorithm 1; code hiyouga/AMP-Regularizer (epsilon 0.5 and
    inner_lr 1 for PreActResNet-18 on CIFAR-10).

    Args:
        epsilon: radius, in the units of the weights.
        inner_lr: zeta, multiplies the gradient.
        steps: ascent steps.
        group: "tensor" or "global".
        parameters: which are moved.
        statistics: which outer passes update BatchNorm.
    """
    check_steps("amp", steps)
    return WeightPerturbation(
        name="amp",
        ball=Ball(2, epsilon, group),
        ascent=Ascent(steps, inner_lr, direction="raw"),
        parameters=parameters,
        statistics=statistics,
    )


@checked
def rwp(
    gamma: NonNegative = 0.01,
    threshold: NonNegative = 1.7,
    steps: Count = 10,
    inner_lr: NonNegative = 0.01,
    *,
    parameters: str = "matrices",
    statistics: Statistics = "perturbed",
) -> WeightPerturbation:
    """Robust weight perturbation (RWP): climb only the examples whose loss is below a threshold.

    ``steps`` times: d <- d + inner_lr * grad (1/N) sum_i 1[loss_i < threshold] loss_i at w + v,
    then v = gamma ||w|| d / ||d||, both norms over all chosen tensors together. The indicator is
    made anew at every v; the sum is divided by the batch. Descends the mean of all losses at w + v.
    Only the direction of d counts, so that inner_lr cancels but for rounding. The closure returns
    one loss a row. The released code's optimizer steps at the perturbed weights
    (``backward(step=...)``). MLCAT-WP is the same with threshold 1.5. threshold = inf, one step:
    AWP with one ratio over the matrices.

    Passes: steps + 1.
    Source: Yu et al. 2022, "Robust weight perturbation for adversarial training"; code
    ChaojianYu/Robust-Weight-Perturbation (gamma 0.01, threshold 1.7 for CIFAR-10 and SVHN, 4.0 for
    CIFAR-100).

    Args:
        gamma: radius relative to the norm of the chosen weights together.
        threshold: examples of a smaller loss are climbed.
        steps: ascent steps.
        inner_lr: length of a step before v is drawn to the sphere.
        parameters: which are moved.
        statistics: which outer passes update BatchNorm.
    """
    check_steps("rwp", steps)

    def easy(rows: Tensor, trail: Trail) -> Tensor:
        return (rows * (rows.detach() < threshold)).mean()

    return WeightPerturbation(
        name="rwp",
        ball=Ball(2, gamma, "global"),
        ascent=Ascent(steps, inner_lr, direction="raw", onto="sphere"),
        scale=scales.global_norm,
        parameters=parameters,
        statistics=statistics,
        climbed=easy,
    )


def check_steps(name: str, steps: int) -> None:
    """Refuse an ascent of no step.

    Raises:
        ValueError: if ``steps`` is below 1.
    """
    if steps < 1:
        raise ValueError(
            f"{name} needs steps >= 1, got {steps}: without an ascent step it perturbs nothing. "
            "Use no_perturbation() to switch it off."
        )
