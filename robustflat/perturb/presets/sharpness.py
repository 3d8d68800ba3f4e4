"""SAM and those of its kin that look at one step alone."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from robustflat.bounds import Count, NonNegative, Share, checked
from robustflat.perturb import scales
from robustflat.perturb.ascent import Ascent
from robustflat.perturb.ball import Ball, Norm, parse_norm
from robustflat.perturb.memory import Trail
from robustflat.perturb.presets.adversarial import check_steps
from robustflat.perturb.presets.plain import mixing
from robustflat.perturb.weights import Statistics, WeightPerturbation


def sam(
    rho: NonNegative = 0.05,
    norm: Norm = "l2",
    steps: Count = 1,
    *,
    parameters: str = "all",
    statistics: Statistics = "centre",
) -> WeightPerturbation:
    """Sharpness-aware minimisation (SAM): the worst weights of a ball around all parameters.

    v = rho * sign(g) |g|^(q-1) / ||g||_q^(q/p), 1/p + 1/q = 1, over all parameters together; in
    ``steps`` steps of rho / steps. For p = 2 that is rho * g / ||g||. ``parameters="norm"`` is
    SAM-ON (Mueller et al. 2023): only normalisation layers are moved, one norm over them, and rho
    is about ten times SAM's; "no_norm" is its complement.

    Passes: steps + 1.
    Source: Foret et al. 2021, eq. 2 and 3; code google-research/sam (rho 0.05 on CIFAR-10, 0.1 on
    CIFAR-100). SAM-ON: mueller-mp/SAM-ON (rho 0.5).

    Args:
        rho: radius, in the units of the weights.
        norm: "l2", "linf", "l1" or p in [1, inf].
        steps: ascent steps.
        parameters: which are moved.
        statistics: which outer passes update BatchNorm; the paper's code keeps those of the first.
    """
    check_steps("sam", steps)
    return WeightPerturbation(
        name="sam",
        ball=Ball(parse_norm(norm), rho, "global"),
        ascent=Ascent(steps, 1 / steps),
        parameters=parameters,
        statistics=statistics,
    )


def asam(
    rho: NonNegative = 0.5,
    eta: NonNegative = 0.01,
    *,
    parameters: str = "all",
    statistics: Statistics = "both",
) -> WeightPerturbation:
    """Adaptive SAM (ASAM): the ball scales with every single weight.

    v = rho * T^2 g / ||T g||, T = |w| + eta on parameters named "weight" (BatchNorm's included, as
    in the released code) and 1 on the others. ``parameters="norm"`` is ASAM-ON. T = 1 is SAM.

    Passes: 2.
    Source: Kwon et al. 2021, eq. 7 and 8; code SamsungLabs/ASAM (rho 0.5, eta 0.01).

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
    return replace(
        sam(rho, parameters=parameters, statistics=statistics),
        name="asam",
        scale=scales.asam(eta),
    )


def gsam(
    rho: NonNegative = 0.05,
    alpha: NonNegative = 0.4,
    *,
    parameters: str = "all",
    statistics: Statistics = "centre",
) -> WeightPerturbation:
    """Surrogate gap guided SAM (GSAM): SAM's gradient less a part of the centre's.

    Descends g_p - alpha * g_perp: g_p is the gradient at SAM's perturbed weights, g_perp the part
    of the gradient at the centre orthogonal to g_p. alpha = 0 is SAM. The paper lets rho follow the
    learning rate: ``.scaled(factor)`` at every step, or the trainer's ``when: {radius: lr}``.

    Passes: 2.
    Source: Zhuang et al. 2022, algorithm 1; code google-research/big_vision (alpha 0.4 and more,
    rho 0.05 to 0.6 by model).

    Args:
        rho: radius, in the units of the weights.
        alpha: weight of the surrogate gap.
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


@checked
def gnp(
    rho: NonNegative = 0.1,
    alpha: Share = 0.8,
    *,
    parameters: str = "all",
    statistics: Statistics = "centre",
) -> WeightPerturbation:
    """Penalising the gradient's norm (GNP): SAM's gradient mixed with the plain one.

    v = rho g / ||g||; descends (1 - alpha) g(w) + alpha g(w + v): the gradient of
    L + lambda ||grad L|| to first order, lambda = alpha rho. alpha = 1 is SAM, alpha = 0 no
    perturbation. The released code's default mixes g / ||g|| instead of g, unlike its docstring.

    Passes: 2.
    Source: Zhao et al. 2022, "Penalizing gradient norm"; code zhaoyang-0204/gnp (rho 0.1, alpha 0.8
    on CIFAR).

    Args:
        rho: radius, in the units of the weights.
        alpha: weight of the gradient at the perturbed weights.
        parameters: which are moved.
        statistics: which outer passes update BatchNorm.
    """
    return replace(
        sam(rho, parameters=parameters, statistics=statistics),
        name="gnp",
        combine=mixing(alpha),
    )


@checked
def gam(
    rho: NonNegative = 0.02,
    norm_rho: NonNegative = 0.2,
    beta0: NonNegative = 0.5,
    beta1: Share = 0.6,
    gamma: NonNegative = 0.03,
    *,
    parameters: str = "all",
    statistics: Statistics = "centre",
) -> WeightPerturbation:
    """Gradient-norm-aware minimisation (GAM, accelerated): also flattens the gradient's norm.

    With n(x) = x / ||x||: e0 = rho n(g), g1 = g(e0), e1 = norm_rho n(g1 - g), g2 = g(e1),
    e2 = e1 + rho n(g2), g3 = g(e2); n = beta1 g1 + (1 - beta1) g3, p = g + |1 - beta0| g2; descends
    n - gamma (p - <p, n> / ||n||^2 n). gamma = 0 with beta1 = 1 is SAM of radius rho.

    Passes: 4.
    Source: Zhang et al. 2023, "Gradient norm aware minimization"; code xxgege/GAM (CIFAR-100: the
    defaults here; CIFAR-10: rho 0.03, beta0 0.1, beta1 0.1, gamma 0.05).

    Args:
        rho: radius of the zeroth-order ascent.
        norm_rho: radius of the ascent of the gradient's norm.
        beta0: weight of g2.
        beta1: share of g1 in what is descended.
        gamma: weight of the part orthogonal to it.
        parameters: which are moved.
        statistics: which outer passes update BatchNorm.
    """
    radius = rho + norm_rho

    def path(trail: Trail) -> list[Tensor]:
        """From w to e0, from there to e1, from there to e2; in radii of the ball that holds all."""
        first, here = trail.gradients[0], trail.gradients[-1]
        if len(trail.gradients) != 2:
            return unit(here, rho / radius)
        rise = list(torch._foreach_sub(here, first))
        back = unit(first, rho / radius)
        return list(torch._foreach_sub(unit(rise, norm_rho / radius), back))

    def combine(trail: Trail) -> list[Tensor]:
        g, g1, g2, g3 = trail.gradients
        n = [beta1 * a + (1 - beta1) * b for a, b in zip(g1, g3, strict=True)]
        p = [a + abs(1 - beta0) * b for a, b in zip(g, g2, strict=True)]
        share = dot(p, n) / dot(n, n).clamp_min(torch.finfo(n[0].dtype).tiny)
        return [b - gamma * (a - share * b) for a, b in zip(p, n, strict=True)]

    return WeightPerturbation(
        name="gam",
        ball=Ball(2, radius, "global"),
        ascent=Ascent(3, direction="given"),
        parameters=parameters,
        statistics=statistics,
        direction=path,
        combine=combine,
    )


@checked
def zsharp(
    rho: NonNegative = 0.05,
    quantile: Share = 0.95,
    *,
    parameters: str = "all",
    statistics: Statistics = "both",
) -> WeightPerturbation:
    """Z-score filtered SAM (ZSharp): only the entries of each layer whose gradient stands out.

    In tensors of more than one dimension g is kept where |z| exceeds the given quantile of |z|, z
    the z-score within the tensor (unbiased standard deviation), else 0; what is left is brought to
    length rho in *each tensor*. Others, and tensors in which nothing is left, move by
    rho g / ||g||, the norm over the whole unfiltered gradient. So the whole perturbation is about
    rho sqrt(tensors) long. quantile = 0 drops only the entries of the smallest |z|.

    Passes: 2.
    Source: code YUNBLAK/Sharpness-Aware-Minimization-with-Z-Score-Gradient-Filtering (rho 0.05,
    quantile 0.95).

    Args:
        rho: length of the perturbation in every filtered tensor.
        quantile: share of the entries that are dropped.
        parameters: which are moved.
        statistics: which outer passes update BatchNorm.
    """

    def stand_out(trail: Trail) -> list[Tensor]:
        g = trail.gradients[-1]
        found = unit(g, 1.0)
        for i, t in enumerate(g):
            if t.ndim > 1:
                kept = _outstanding(t, quantile)
                length = kept.norm()
                found[i] = torch.where(length > 0, kept / length, found[i])
        return found

    return WeightPerturbation(
        name="zsharp",
        ball=Ball(2, rho, "tensor"),
        ascent=Ascent(1, direction="given"),
        parameters=parameters,
        statistics=statistics,
        direction=stand_out,
    )


@checked
def esam(
    rho: NonNegative = 0.05,
    beta: Share = 0.6,
    gamma: Share = 0.5,
    *,
    parameters: str = "all",
    statistics: Statistics = "both",
) -> WeightPerturbation:
    """Efficient SAM (ESAM): some tensors are perturbed, and the examples that rose are descended.

    v = rho g / ||g|| / beta over the tensors kept; from the second step on each is dropped with
    probability 1 - beta. With rise_i = loss_i(w + v) - loss_i(w), descends the mean loss at w + v
    of the examples whose rise exceeds the k-th largest, k = int(gamma N): k - 1 of them, and all if
    gamma >= 0.99. Every tensor is descended. The closure returns one loss a row. The released code
    runs the chosen examples through the network once more by themselves, so with BatchNorm their
    batch statistics differ from ours, which are of the whole batch. beta = gamma = 1 is SAM.

    Passes: 2 (released: 2 and a forward pass, the last of which is of the chosen examples only).
    Source: Du et al. 2022, "Efficient sharpness-aware minimization"; code dydjw9/Efficient_SAM
    (rho 0.05, beta 0.6, gamma 0.5 on CIFAR; 1e-7 added to the norm).

    Args:
        rho: radius, in the units of the weights.
        beta: probability with which a tensor is kept, above 0.
        gamma: share of the examples that are descended.
        parameters: which are moved.
        statistics: which outer passes update BatchNorm.

    Raises:
        ValueError: if ``beta`` is 0.
    """
    if not 0 < beta <= 1:
        raise ValueError(f"esam keeps tensors with probability beta in (0, 1], got {beta}.")

    def keep_some(trail: Trail) -> list[Tensor]:
        g = trail.gradients[-1]
        if beta == 1 or trail.step == 0:
            return g
        drawn = torch.rand(len(g), generator=trail.generator, device=g[0].device)
        return list(torch._foreach_mul(g, list((drawn <= beta).to(g[0].dtype).unbind())))

    def that_rose(rows: Tensor, trail: Trail) -> Tensor:
        if gamma >= 0.99:
            return rows.mean()
        rise = trail.losses[-1] - trail.losses[0]
        threshold = rise.topk(max(int(gamma * len(rise)), 1)).values[-1]
        chosen = rise > threshold
        chosen = torch.where(chosen.any(), chosen, rise >= threshold)
        return (rows * chosen).sum() / chosen.sum()

    return replace(
        sam(rho / beta, parameters=parameters, statistics=statistics),
        name="esam",
        direction=keep_some,
        descended=that_rose,
        counts=True,
    )


def nsam(inner: WeightPerturbation, batches: Count) -> WeightPerturbation:
    """n-SAM: climb the mean loss of many batches, descend that of one.

    With all of the training set (n batches) the benefit of SAM is lost. ``backward``'s closure
    takes the index of a batch, ``loss(i)``; batch 0 is descended.

    Passes: batches times the ascent passes of ``inner``, and 1.
    Source: Andriushchenko & Flammarion 2022, section 3.

    Args:
        inner: the perturbation, such as ``sam(rho)``.
        batches: how many batches are climbed together; 1 is ``inner`` itself.

    Raises:
        ValueError: if ``inner`` is itself a wrapper.
    """
    if not isinstance(inner, WeightPerturbation) or inner.batches > 1:
        raise ValueError(
            f"nsam climbs several batches with one perturbation, and {inner.name} is a wrapper "
            "already: the two contradict each other. Wrap a method such as sam."
        )
    return replace(inner, name=f"nsam-{inner.name}", batches=batches)


def unit(g: list[Tensor], length: float | Tensor) -> list[Tensor]:
    """``g`` brought to a length over all tensors together; zeros stay zeros."""
    return list(torch._foreach_mul(Ball(2, 1.0, "global").steepest(g), length))


def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """The inner product over all tensors together."""
    return torch.stack([(s * t).sum() for s, t in zip(a, b, strict=True)]).sum()


def _outstanding(g: Tensor, quantile: float) -> Tensor:
    """``g`` where its |z-score| exceeds a quantile of them (linear interpolation), else 0."""
    if hasattr(g, "device_mesh"):
        raise ValueError(
            "zsharp sorts the entries of every tensor, of which fully_shard leaves each process a "
            "part. Use another method, or DistributedDataParallel."
        )
    z = ((g - g.mean()) / (g.std() + 1e-12)).abs().flatten()
    # torch.quantile refuses more than 16 million entries.
    position = quantile * (z.numel() - 1)
    below, above = (z.kthvalue(1 + k).values for k in (math.floor(position), math.ceil(position)))
    threshold = torch.lerp(below, above, position - math.floor(position))
    return g * (z > threshold).view_as(g)


def _descend_surrogate_gap(trail: Trail, *, alpha: float) -> list[Tensor]:
    centre, perturbed = trail.gradients[0], trail.gradients[-1]
    tiny = torch.finfo(perturbed[0].dtype).tiny
    ratio = dot(centre, perturbed) / dot(perturbed, perturbed).clamp_min(tiny)
    # g_p - alpha (g - ratio g_p)
    combined = torch._foreach_mul(perturbed, 1 + alpha * ratio)
    torch._foreach_add_(combined, centre, alpha=-alpha)
    return list(combined)
