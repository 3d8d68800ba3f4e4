"""Tiny models whose flatness is known in closed form or by brute force."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian


class Binary(nn.Module):
    """Logits (w . x, 0): for label 0 the loss is softplus(-w . x), for one example monotone."""

    def __init__(self, weight: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1) @ self.weight.T
        return torch.cat([z, torch.zeros_like(z)], 1)


def mlp(sizes: tuple[int, ...] = (6, 8, 4), seed: int = 0, *, relu: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU() if relu else nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double().eval()


def conv_net(seed: int = 0) -> nn.Module:
    """With everything that a careless measurement disturbs: BatchNorm, dropout, tied weights."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(48, 3),
    )
    net.train()
    with torch.no_grad():
        for _ in range(5):
            net(torch.rand(16, 1, 4, 4))
    return net.eval()


def examples(n: int, shape: tuple[int, ...], classes: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


def full_hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The Hessian of the mean cross-entropy by torch.func, all parameters in order."""
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, sizes)
        values = {k: v.view(p.shape) for (k, p), v in zip(named.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(model, values, (x,)), y)

    return hessian(loss)(torch.cat([p.detach().flatten() for p in named.values()]))


def flat_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
