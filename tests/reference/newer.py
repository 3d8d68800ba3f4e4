"""The newer sharpness methods, as their released codes compute them: one whole step each.

Every class keeps its memory between steps and has ``step(model, optimizer, loss, ...)``, where
``loss(m)`` is the mean loss of the batch and ``loss(m, rows=True)`` one loss a row. Each pass runs
on a copy of the model; ``statistics`` says which passes move BatchNorm's running statistics, those
at the "centre", those "perturbed", or "both", and its default is what the released code does.
Weights are restored before the optimizer steps, and weight decay is the optimizer's alone.
Constants of 1e-12 and less in norms are left out; a larger one is ``floor``. A direction of length
0 stays 0.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Loss = Callable[..., Tensor]
Optimizer = torch.optim.Optimizer

NORMALISATION = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def chosen(model: nn.Module, parameters: str) -> set[str]:
    """Names of "all", of those of normalisation layers ("norm") or of the others ("no_norm")."""
    everything = {n for n, _ in model.named_parameters()}
    normal = {
        f"{prefix}.{n}" if prefix else n
        for prefix, module in model.named_modules()
        if isinstance(module, NORMALISATION)
        for n, _ in module.named_parameters(recurse=False)
    }
    return {"all": everything, "norm": normal, "no_norm": everything - normal}[parameters]


def weights(model: nn.Module) -> Tensors:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def length(d: Tensors) -> Tensor:
    return torch.sqrt(sum((t * t).sum() for t in d.values()))  # type: ignore[arg-type]


def inner(a: Tensors, b: Tensors) -> Tensor:
    return sum((a[n] * b[n]).sum() for n in a)  # type: ignore[return-value]


def times(c: float | Tensor, d: Tensors) -> Tensors:
    return {n: c * t for n, t in d.items()}


def plus(a: Tensors, b: Tensors) -> Tensors:
    """The sum, in which an absent tensor is zero."""
    return {n: a.get(n, 0) + b.get(n, 0) for n in [*a, *(n for n in b if n not in a)]}


def unit(d: Tensors, floor: float = 0.0) -> Tensors:
    if not d or float(length(d)) == 0:
        return d
    return times(1 / (length(d) + floor), d)


def gradient(
    model: nn.Module, value: Callable[[nn.Module], Tensor], v: Tensors, moves: bool
) -> Tensors:
    """Gradient of ``value`` at w + v; the running statistics of that pass are kept if ``moves``."""
    proxy = copy.deepcopy(model)
    for n, p in proxy.named_parameters():
        p.grad = None
        if n in v:
            p.data.add_(v[n])
    value(proxy).backward()
    if moves:
        for mine, theirs in zip(model.buffers(), proxy.buffers(), strict=True):
            mine.data.copy_(theirs)
    return {n: p.grad for n, p in proxy.named_parameters() if p.grad is not None}


def descend(model: nn.Module, optimizer: Optimizer, g: Tensors) -> None:
    for n, p in model.named_parameters():
        p.grad = g[n].clone() if n in g else None
    optimizer.step()


@dataclass
class Method:
    """What all share: which passes move the running statistics, and the two kinds of pass."""

    statistics: str = field(default="both", kw_only=True)

    def centre(self, model: nn.Module, loss: Loss) -> Tensors:
        return gradient(model, loss, {}, self.statistics in ("centre", "both"))

    def perturbed(self, model: nn.Module, loss: Loss, v: Tensors) -> Tensors:
        return gradient(model, loss, v, self.statistics in ("perturbed", "both"))


@dataclass
class Sam(Method):
    """SAM-ON (Mueller 2023): v = rho g / ||g|| over the chosen tensors together, 0 elsewhere."""

    rho: float
    parameters: str = "all"

    def step(self, model: nn.Module, optimizer: Optimizer, loss: Loss) -> None:
        g = self.centre(model, loss)
        part = {n: g[n] for n in g if n in chosen(model, self.parameters)}
        v = times(self.rho, unit(part))
        descend(model, optimizer, self.perturbed(model, loss, v))


@dataclass
class Asam(Method):
    """ASAM-ON: v = rho T^2 g / ||T g||, T = |w| + eta on names with "weight", 1 on the others."""

    rho: float
    eta: float
    parameters: str = "all"

    def step(self, model: nn.Module, optimizer: Optimizer, loss: Loss) -> None:
        g, w = self.centre(model, loss), weights(model)
        names = chosen(model, self.parameters)
        scale = {
            n: w[n].abs() + self.eta if "weight" in n else torch.ones_like(w[n]) for n in names
        }
        u = unit({n: scale[n] * g[n] for n in names})
        v = {n: self.rho * scale[n] * u[n] for n in names}
        descend(model, optimizer, self.perturbed(model, loss, v))


@dataclass
class Gnp(Method):
    """Zhao 2022, with norm_perturbations off: (1 - alpha) g + alpha g(rho g / ||g||)."""

    rho: float
    alpha: float
    statistics: str = field(default="centre", kw_only=True)

    def step(self, model: nn.Module, optimizer: Optimizer, loss: Loss) -> None:
        g = self.centre(model, loss)
        there = self.perturbed(model, loss, times(self.rho, unit(g)))
        descend(model, optimizer, plus(times(1 - self.alpha, g), times(self.alpha, there)))


@dataclass
class Fsam(Method):
    """Friendly-SAM (Li 2024): climb along g - sigma m; m takes g in after it has been used."""

    rho: float
    sigma: float = 1.0
    lmbda: float = 0.6
    statistics: str = field(default="centre", kw_only=True)
    m: Tensors | None = None

    def step(self, model: nn.Module, optimizer: Optimizer, loss: Loss) -> None:
        g = self.centre(model, loss)
        if self.m is None:
            d, self.m = g, g
        else:
            d = plus(g, times(-self.sigma, self.m))
            self.m = plus(times(self.lmbda, self.m), times(1 - self.lmbda, g))
        descend(model, optimizer, self.perturbed(model, loss, times(self.rho, unit(d))))


@dataclass
class Vasso(Method):
    """VaSSO (Li and Giannakis 2023): m takes g in first, then the step climbs along m."""

    rho: float
    theta: float
    floor: float = 1e-7
    m: Tensors | None = None

    def step(self, model: nn.Module, optimizer: Optimizer, loss: Loss) -> None:
        g = self.centre(model, loss)
        if self.m is None:
            self.m = g
        else:
            self.m = plus(times(1 - self.theta, self.m), times(self.theta, g))
        v = times(self.rho, unit(self.m, self.floor))
        descend(model, optimizer, self.perturbed(model, loss, v))


@dataclass
class MomentumSam(Method):
    """Becker 2024: one pass, at w - rho b / ||b||; b is the decayed sum of those gradients.

    The released code keeps the weights perturbed between steps and puts the weight decay at
    w + v into b; here the decay is the optimizer's, at w, and b is free of it.
    """

    rho: float
    momentum: float = 0.9
    statistics: str = field(default="perturbed", kw_only=True)
    b: Tensors = field(default_factory=dict)

    def step(self, model: nn.Module, optimizer: Optimizer, loss: Loss) -> None:
        g = self.perturbed(model, loss, times(-self.rho, unit(self.b)))
        self.b = plus(times(self.momentum, self.b), g)
        descend(model, optimizer, g)


@dataclass
class LookSam(Method):
    """Liu 2022: SAM on steps 0, k, 2k ...; between them its part orthogonal to g is used again."""

    rho: float
    alpha: float
    every: int = 5
    statistics: str = field(default="centre", kw_only=True)
    taken: int = 0
    u: Tensors = field(default_factory=dict)

    def step(self, model: nn.Module, optimizer: Optimizer, loss: Loss) -> None:
        if self.taken % self.every == 0:
            g = self.centre(model, loss)
            there = self.perturbed(model, loss, times(self.rho, unit(g)))
            along = unit(g)
            self.u = unit(plus(there, times(-inner(there, along), along)))
            descend(model, optimizer, there)
        else:
            g = gradient(model, loss, {}, True)
            descend(model, optimizer, plus(g, times(self.alpha * length(g), self.u)))
        self.taken += 1


@dataclass
class RwpMix(Method):
    """m-RWP (Li 2024): (1 - alpha) g + alpha g(noise), noise N(0, (gamma ||w_f||)^2) an element.

    f is the output filter of a tensor of more than one dimension, and all of a bias or of
    BatchNorm's vectors. ``draws`` are standard normal, shaped as the weights. As released, the
    two gradients come from two batches; here, as in the formula, from one.
    """

    gamma: float
    alpha: float
    statistics: str = field(default="centre", kw_only=True)

    def step(self, model: nn.Module, optimizer: Optimizer, loss: Loss, draws: Tensors) -> None:
        noise = {}
        for n, w in weights(model).items():
            parts = list(w) if w.dim() > 1 else [w]
            rows = list(draws[n]) if w.dim() > 1 else [draws[n]]
            made = [self.gamma * a.norm() * r for a, r in zip(parts, rows, strict=True)]
            noise[n] = torch.stack(made) if w.dim() > 1 else made[0]
        g = self.centre(model, loss)
        there = self.perturbed(model, loss, noise)
        descend(model, optimizer, plus(times(1 - self.alpha, g), times(self.alpha, there)))


@dataclass
class Gam(Method):
    """Gradient-norm-aware minimization (Zhang 2023), the accelerated form of its code: 4 passes."""

    rho: float
    norm_rho: float
    beta0: float
    beta1: float
    gamma: float
    statistics: str = field(default="centre", kw_only=True)

    def gradients(self, model: nn.Module, loss: Loss) -> tuple[Tensors, Tensors, Tensors, Tensors]:
        g0 = self.centre(model, loss)
        g1 = self.perturbed(model, loss, times(self.rho, unit(g0)))
        e1 = times(self.norm_rho, unit(plus(g1, times(-1.0, g0))))
        g2 = self.perturbed(model, loss, e1)
        g3 = self.perturbed(model, loss, plus(e1, times(self.rho, unit(g2))))
        return g0, g1, g2, g3

    def step(self, model: nn.Module, optimizer: Optimizer, loss: Loss) -> None:
        g0, g1, g2, g3 = self.gradients(model, loss)
        ahead = plus(times(self.beta1, g1), times(1 - self.beta1, g3))
        behind = plus(g0, times(1 - self.beta0, g2))
        n = unit(ahead)
        across = plus(behind, times(-inner(behind, n), n))
        descend(model, optimizer, plus(ahead, times(-self.gamma, across)))


def lesam_sigma(
    epoch: int,
    sigma: float,
    epochs: int,
    warmup: int = 10,
    decay_start: int = 160,
    sigma_min: float = 0.0,
) -> float:
    """LE-SAM's budget in an epoch: from 0 straight up, level, then a half cosine to sigma_min."""
    if epoch < warmup:
        return sigma if warmup == 1 else sigma * epoch / (warmup - 1)
    start = max(decay_start, warmup)
    if epoch < start:
        return sigma
    if epochs - start <= 1:
        return sigma_min
    t = min(1.0, (epoch - start) / (epochs - start - 1))
    return sigma_min + (sigma - sigma_min) * (1 + math.cos(math.pi * t)) / 2


@dataclass
class Lesam(Method):
    """Loss-equated SAM (Wang 2026): the radius at which the loss rises by sigma, linearly.

    v = min(sigma / ||g||, rho_max) g / ||g||; ``floor`` is added under the root of the norm.
    rho_max None, or 0 or less, is no cap.
    """

    rho_max: float | None = None
    floor: float = 1e-12

    def step(self, model: nn.Module, optimizer: Optimizer, loss: Loss, sigma: float) -> None:
        g = self.centre(model, loss)
        size = math.sqrt(float(length(g)) ** 2 + self.floor)
        radius = sigma / size
        if self.rho_max is not None and self.rho_max > 0:
            radius = min(radius, self.rho_max)
        descend(model, optimizer, self.perturbed(model, loss, times(radius / size, g)))
