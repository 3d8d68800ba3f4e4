"""Owns the directions of weight space along which a landscape is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.flatness.curvature import hessian_of, pairs_of
from robustflat.flatness.mechanism import gradient_of
from robustflat.flatness.options import BALLS, BallName, Options
from robustflat.flatness.subject import LossKind, Subject
from robustflat.perturb import SCALES, Ball

# Random ones, by the group of weights that they are normalised in.
RANDOM: dict[str, BallName] = {"filter": "row", "layer": "tensor", "global": "global_relative"}
# What each is called, and how far it is followed if nobody says, in norms of the weights.
DIRECTIONS = {
    "filter": ("filter-normalised random direction", 1.0),
    "layer": ("layer-normalised random direction", 1.0),
    "global": ("random direction", 1.0),
    "eigenvectors": ("eigenvector of the Hessian", 0.05),
    "gradient": ("gradient of the loss", 0.05),
}


class Random:
    """Uniformly random directions, whose every group has the norm that the weights now have.

    They depend on the generator and the shapes alone but for that norm, so that models of one
    architecture are seen along the same directions, and are drawn on the CPU, so that these are the
    same on every device.

    Args:
        named: the weights that are moved.
        normalised: "filter" (Li et al. 2018), "layer" (every tensor) or "global" (all together).
    """

    def __init__(self, named: Mapping[str, nn.Parameter], normalised: str) -> None:
        weights = [p.detach() for p in named.values()]
        group, name = BALLS[RANDOM[normalised]]
        self._ball = Ball(2.0, 1.0, group)
        self._like = [torch.empty_like(w, device="cpu") for w in weights]
        scale = SCALES[name](list(named), weights)
        assert scale is not None
        self._scale = scale

    def draw(self, generator: torch.Generator) -> list[Tensor]:
        """One direction, where the weights are; the generator is the CPU's."""
        u = self._ball.sample(self._like, generator, surface=True)
        return [t.to(s.device) * s for t, s in zip(u, self._scale, strict=True)]


def eigenvectors(
    subject: Subject, options: Options, loss: LossKind, named: Mapping[str, nn.Parameter]
) -> list[list[Tensor]]:
    """The Hessian's top eigenvectors, each as long as the weights that it moves.

    A coordinate is then a relative displacement, as it is for random directions. The sign is such
    that the largest entry is positive.

    Args:
        subject: the model on its images.
        options: say how many (``k``) and of which ``parameters``.
        loss: of its Hessian.
        named: these parameters.

    Raises:
        UserError: if one does not converge.
    """
    pairs = pairs_of(subject, options, loss, "top")
    if not pairs.converged or len(pairs.values) < options.k:
        raise UserError(
            f"The {options.k} first eigenvectors did not converge within {options.max_hvps} "
            "Hessian-vector products. Draw along another direction, or fewer."
        )
    hessian = hessian_of(subject, options, loss)
    return [
        _as_long_as(hessian.split(column * column[column.abs().argmax()].sign()), named)
        for column in pairs.vectors
    ]


def gradient(
    subject: Subject, options: Options, loss: LossKind, named: Mapping[str, nn.Parameter]
) -> list[Tensor]:
    """The direction of steepest ascent of the loss, as long as the weights that it moves."""
    return _as_long_as(gradient_of(subject, options, loss), named)


def _as_long_as(way: list[Tensor], named: Mapping[str, nn.Parameter]) -> list[Tensor]:
    mine, theirs = (
        torch.stack([t.detach().norm() for t in tensors]).norm()
        for tensors in (way, named.values())
    )
    return list(torch._foreach_mul(way, float(theirs / mine) if mine > 0 else 0.0))
