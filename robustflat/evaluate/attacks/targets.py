"""Owns the targets of targeted attacks: which wrong classes, and which first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustflat.errors import UserError

RANKINGS = ("logits", "malt")
# MALT looks at so many classes of the highest logits.
_CANDIDATES = 100


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The wrong classes that an attack tries, one after the other.

    "logits": those of the highest logits first, as AutoAttack does. "malt" (Melamed et al. 2024):
    those first whose boundary is nearest if the model were linear around the image, by
    (z_y - z_k) / |grad (z_y - z_k)|, the gradient in the dual norm of the threat, so that it is
    exact for a linear model; among the 100 classes of the highest logits.

    Attributes:
        ranking: "logits" or "malt".
        count: How many; no more than there are wrong classes.
    """

    ranking: Literal["logits", "malt"] = "logits"
    count: int = 9

    def __post_init__(self) -> None:
        if self.ranking not in RANKINGS:
            raise UserError(f"Targets are ranked by {' or '.join(RANKINGS)}, got {self.ranking!r}.")
        if not isinstance(self.count, int) or self.count < 1:
            raise UserError(f"The number of targets must be at least 1, got {self.count!r}.")

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Targets | None:
        """Those that "ranking" and "targets" in settings say, which are taken out; or None."""
        said = {"ranking": settings.pop("ranking", None), "count": settings.pop("targets", None)}
        said = {key: value for key, value in said.items() if value is not None}
        return cls(**said) if said else None

    def passes(self, classes: int) -> int:
        """Forward passes that the choice takes for an image, a gradient counted as one."""
        return 1 if self.ranking == "logits" else 2 + min(_CANDIDATES, classes - 1)

    def chosen(self, model: nn.Module, x: Tensor, y: Tensor, norm: float) -> Tensor:
        """The targets of each image, the first to be tried first.

        Args:
            model: Its logits are looked at; for "malt" also a gradient for every candidate.
            x: Images [N, C, H, W].
            y: Labels [N].
            norm: p of the threat.

        Returns:
            Classes, int64 [N, at most `count`].
        """
        with torch.no_grad():
            logits = model(x).detach().scatter(1, y[:, None], -torch.inf)
        order = logits.argsort(dim=1, descending=True)[:, : logits.shape[1] - 1]
        if self.ranking == "malt":
            order = order[:, :_CANDIDATES]
            order = order.gather(1, _distances(model, x, y, order, norm).argsort(dim=1))
        return order[:, : self.count]


def _distances(model: nn.Module, x: Tensor, y: Tensor, classes: Tensor, norm: float) -> Tensor:
    """How far the boundary to each of some classes [N, K] is in the linearised model, [N, K]."""
    dual = {1.0: torch.inf, 2.0: 2.0}.get(norm, 1.0)
    found = []
    with torch.enable_grad():
        moved = x.detach().clone().requires_grad_()
        logits = model(moved)
        ahead = logits.gather(1, y[:, None]) - logits.gather(1, classes)
        for column in ahead.unbind(1):
            (gradient,) = torch.autograd.grad(column.sum(), moved, retain_graph=True)
            size = torch.linalg.vector_norm(gradient.flatten(1), ord=dual, dim=1)
            found.append(column.detach() / size.clamp_min(1e-12))
    return torch.stack(found, 1)
