"""Owns the watch at the edge of stability: the curvature beside what the steps can bear."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustflat.evaluate.team import Team
from robustflat.flatness.curvature import hessian_of
from robustflat.flatness.examples import read_examples
from robustflat.flatness.mechanism import gradient_of
from robustflat.flatness.options import Options
from robustflat.flatness.spectrum import extreme
from robustflat.flatness.subject import LossKind, Subject
from robustflat.flatness.undisturbed import undisturbed
from robustflat.perturb import InputPerturbation, Perturbation, WeightPerturbation, pgd
from robustflat.perturb.scales import one
from robustflat.perturb.watch import cosine

# Of eigenvalues, relative: what is compared to them is a bound, not a figure.
TOLERANCE = 1e-3


class Edge:
    """The largest Hessian eigenvalue beside the edges of stability, and the gradient's direction.

    Of the mean loss over fixed training images in eval mode, with an attack at adversarial images
    made once at the present weights. No bit of the training changes. Looked at again, Lanczos
    starts from the eigenvector of the time before, which it then mostly confirms.

    A look costs at most 2 gradients, ``max_hvps`` Hessian-vector products and the attack: in
    forward passes over ``images`` 6 + 9 ``max_hvps`` + 2 for each step of the attack. ``edge/
    products`` and ``edge/seconds`` tell what it did cost.

    =========================  =================================================================
    ``edge/lambda_1``          the largest eigenvalue
    ``edge/2_over_lr``         above it, gradient descent grows along the top eigenvector (Cohen
                               et al. 2021)
    ``edge/optimizer``         the same for SGD's momentum and weight decay; of no other optimizer
    ``edge/sam``               and under SAM's perturbation: ||g|| / (2 rho) (sqrt(1 + 4 rho s /
                               ||g||) - 1), s the optimizer's edge (Long & Bartlett 2024, eq. 1,
                               where s = 2 / lr); of no other perturbation
    ``edge/reached``           ``lambda_1`` as a share of the edge of the steps that are taken:
                               SAM's under SAM, else the optimizer's, where it is known
    ``edge/gradient_norm``     ||g||
    ``edge/alignment``         |cos| of the gradient and the top eigenvector
    ``edge/products``          Hessian-vector products spent
    ``edge/converged``         1 if the eigenvalue was found to 0.1 %, else 0: a lower bound
    ``edge/seconds``           spent
    =========================  =================================================================

    Args:
        images: ``[N, C, H, W]`` and labels.
        count: how many of them.
        attack: of the training, with the monitor's steps; None for the clean loss.
        batch_size: of a pass.
        seed: of the attack's start and of Lanczos'.
        max_hvps: most products of a look.
    """

    def __init__(
        self,
        images: tuple[Tensor, Tensor],
        count: int,
        attack: InputPerturbation | None,
        batch_size: int,
        seed: int,
        max_hvps: int,
    ) -> None:
        self._x, self._y, _ = read_examples(images, count)
        self._attack, self._batch_size, self._seed = attack, batch_size, seed
        self._max_hvps = max_hvps
        self._near: Tensor | None = None

    def __call__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, weights: Perturbation
    ) -> dict[str, float]:
        """Look at the present weights, and at the settings of the step to come."""
        began = time.monotonic()
        with undisturbed(model):
            subject = Subject(
                model, self._x, self._y, batch_size=self._batch_size, seed=self._seed, team=Team()
            )
            options = Options(attack=self._attack or pgd("linf", 0.0))
            loss: LossKind = "clean" if self._attack is None else "robust"
            hessian = hessian_of(subject, options, loss)
            gradient = gradient_of(subject, options, loss)
            pairs = extreme(
                hessian,
                1,
                tolerance=TOLERANCE,
                max_hvps=self._max_hvps,
                generator=subject.generator("edge"),
                near=self._near,
            )
            self._near = pairs.vectors[0]
            norm = math.hypot(*(float(g.norm()) for g in gradient))
            found = {
                "lambda_1": float(pairs.values[0]),
                "gradient_norm": norm,
                "alignment": abs(float(cosine(gradient, hessian.split(self._near)))),
                "products": float(pairs.products),
                "converged": float(pairs.converged),
            }
        lr = float(optimizer.param_groups[0]["lr"])
        if lr > 0:
            found["2_over_lr"] = 2 / lr
            edge = stable(optimizer)
            if edge is not None:
                found["optimizer"] = edge
                rho = radius_of_sam(weights)
                if rho is not None and norm > 0 and edge > 0:
                    found["sam"] = edge = sam_edge(edge, rho, norm)
                if edge > 0:
                    found["reached"] = found["lambda_1"] / edge
        found["seconds"] = time.monotonic() - began
        return {f"edge/{name}": value for name, value in found.items()}


def stable(optimizer: torch.optim.Optimizer) -> float | None:
    """The largest eigenvalue of the loss along which SGD does not grow; None for others.

    On a quadratic, with momentum m, dampening d and weight decay w: 2 (1 + m) / (lr (1 - d)) - w,
    with Nesterov's momentum 2 (1 + m) / (lr (1 + 2 m)) - w (Cohen et al. 2021, appendix B).
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return None
    group = optimizer.param_groups[0]
    momentum = group["momentum"]
    reach = 1 + 2 * momentum if group["nesterov"] else 1 - (momentum > 0) * group["dampening"]
    return float(2 * (1 + momentum) / (group["lr"] * reach) - group["weight_decay"])


def sam_edge(edge: float, rho: float, norm: float) -> float:
    """Where lambda (1 + rho lambda / norm) = edge: the descent gradient of SAM on a quadratic."""
    return norm / (2 * rho) * (math.sqrt(1 + 4 * rho * edge / norm) - 1)


def radius_of_sam(weights: Perturbation) -> float | None:
    """rho, if the perturbation is rho g / ||g|| over all weights; else None."""
    if not isinstance(weights, WeightPerturbation) or weights.is_off:
        return None
    rules: tuple[Callable[..., object] | None, ...] = (
        weights.direction, weights.combine, weights.climbed, weights.descended,
    )  # fmt: skip
    ball = weights.ball
    plain = (ball.norm, ball.group, weights.scale, weights.parameters) == (2, "global", one, "all")
    single = weights.ascent.steps == 1 and weights.ascent.start == "zero" and weights.every == 1
    return ball.radius if plain and single and rules == (None,) * 4 and ball.radius > 0 else None
