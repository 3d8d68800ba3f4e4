"""The newer methods that choose: of the examples (rwp, esam) or of the gradient (zsharp, esam).

In the form of ``newer``, whose docstring says what holds for all.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from reference.newer import (
    Loss,
    Method,
    Optimizer,
    Tensors,
    descend,
    gradient,
    length,
    times,
    unit,
    weights,
)


@dataclass
class Rwp(Method):
    """Robust weight perturbation (Yu 2022) and MLCAT-WP: climb on the examples of small loss.

    As released the optimizer steps at w + v (``released_order``), and v is then taken off.
    """

    gamma: float
    threshold: float = 1.7
    steps: int = 10
    inner_lr: float = 0.01
    released_order: bool = False
    statistics: str = field(default="perturbed", kw_only=True)

    def perturbation(self, model: nn.Module, loss: Loss) -> Tensors:
        def small(m: nn.Module) -> Tensor:
            rows = loss(m, rows=True)
            return torch.where(rows.detach() < self.threshold, rows, 0 * rows).sum() / len(rows)

        w = {n: t for n, t in weights(model).items() if t.dim() > 1 and "weight" in n}
        d: Tensors = {n: torch.zeros_like(t) for n, t in w.items()}
        v = d
        for _ in range(self.steps):
            g = gradient(model, small, v, False)
            d = {n: d[n] + self.inner_lr * g[n] for n in d}
            v = times(self.gamma * length(w), unit(d))
        return v

    def step(self, model: nn.Module, optimizer: Optimizer, loss: Loss) -> None:
        v = self.perturbation(model, loss)
        # Where the pass at the centre is wanted for the statistics alone, it is one more.
        if self.statistics != "perturbed":
            self.centre(model, loss)
        g = self.perturbed(model, loss, v)
        parameters = dict(model.named_parameters())
        if self.released_order:
            for n in v:
                parameters[n].data.add_(v[n])
        descend(model, optimizer, g)
        if self.released_order:
            for n in v:
                parameters[n].data.sub_(v[n])


@dataclass
class ZSharp(Method):
    """Yun 2025: of each matrix only the gradients of large z-score climb, each to length rho.

    Tensors of one dimension climb by rho g over the norm of the whole, unfiltered gradient; so
    does a matrix of which nothing is kept.
    """

    rho: float
    quantile: float = 0.95

    def kept(self, g: Tensor) -> Tensor:
        """The gradient with all but its large entries, strictly above the quantile, set to 0."""
        mean = g.sum() / g.numel()
        spread = torch.sqrt(((g - mean) ** 2).sum() / (g.numel() - 1))
        z = ((g - mean) / spread).abs()
        ordered = sorted(z.flatten().tolist())
        place = self.quantile * (len(ordered) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        cut = ordered[below] + (place - below) * (ordered[above] - ordered[below])
        return torch.where(z > cut, g, torch.zeros_like(g))

    def perturbation(self, g: Tensors) -> Tensors:
        v = {}
        for n, t in g.items():
            few = self.kept(t) if t.dim() > 1 else torch.zeros_like(t)
            size = few.norm()
            v[n] = self.rho * few / size if size > 0 else self.rho * t / length(g)
        return v

    def step(self, model: nn.Module, optimizer: Optimizer, loss: Loss) -> None:
        v = self.perturbation(self.centre(model, loss))
        descend(model, optimizer, self.perturbed(model, loss, v))


@dataclass
class Esam(Method):
    """Du 2022: climb with some tensors only, descend on the examples whose loss rises most.

    ``kept`` names the tensors that climb in this step, None for all (so in the first, and with
    beta 1); every tensor descends. Strictly more than the k-th largest rise: k - 1 examples. The
    descended rows are taken out of a pass of the whole batch; the released code sends them
    through the model alone, which differs where BatchNorm normalises by the batch.
    """

    rho: float
    beta: float
    gamma: float
    floor: float = 1e-7

    def step(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Loss,
        kept: Collection[str] | None = None,
    ) -> None:
        before: list[Tensor] = []

        def first(m: nn.Module) -> Tensor:
            rows = loss(m, rows=True)
            before.append(rows.detach())
            return rows.sum() / len(rows)

        def second(m: nn.Module) -> Tensor:
            rows = loss(m, rows=True)
            take = self.taken(rows.detach() - before[0])
            return sum(rows[i] for i in take) / len(take)

        g = self.centre(model, first)
        part = {n: t for n, t in g.items() if kept is None or n in kept}
        v = times(self.rho / self.beta, unit(part, self.floor))
        descend(model, optimizer, self.perturbed(model, second, v))

    def taken(self, rise: Tensor) -> list[int]:
        """Which rows descend.

        Where none is left (k is 0 or 1, or all rise alike, as they do when no tensor climbs) the
        released code stops or takes the mean of nothing; here all descend.
        """
        k = int(len(rise) * self.gamma)
        if self.gamma >= 0.99 or k == 0:
            return list(range(len(rise)))
        kth = sorted(rise.tolist(), reverse=True)[k - 1]
        take = [i for i in range(len(rise)) if float(rise[i]) > kth]
        return take or list(range(len(rise)))
