"""Tiny networks and data for the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 3


def conv_bn(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Convolution, BatchNorm, ReLU, linear; for images of 1x4x4. In train mode."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, CLASSES),
    )
    return net.to(dtype).train()


def group_layer(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """GroupNorm and LayerNorm inside a Sequential, so that no name says "norm"; images of 1x4x4."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Sequential(nn.LayerNorm(64), nn.Linear(64, CLASSES)),
    )
    for p in net.parameters():
        if p.dim() == 1:  # Neither all ones nor all zeros.
            nn.init.uniform_(p, 0.5, 1.5)
    return net.to(dtype).train()


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two linear layers without normalisation, for images of 1x4x4."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return net.to(dtype).train()


def images(
    n: int = 6, seed: int = 1, dtype: torch.dtype = torch.float64, margin: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``n`` images in [margin, 1 - margin] and labels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 4, 4, generator=g, dtype=torch.float64) * (1 - 2 * margin) + margin
    y = torch.randint(CLASSES, (n,), generator=g)
    return x.to(dtype), y


class Unweighted(nn.Module):
    """No parameter's name contains "weight"."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.kernel = nn.Parameter(torch.randn(CLASSES, 16, generator=g) / 4)
        self.offset = nn.Parameter(torch.randn(CLASSES, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.kernel, self.offset)


class Odd(nn.Module):
    """Tied, frozen and unused parameters, a zero layer, and a buffer that every forward moves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 16, bias=False)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.first.weight
        self.frozen = nn.Linear(16, 16)
        self.zero = nn.Linear(16, 16, bias=False)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(16, CLASSES)
        nn.init.zeros_(self.zero.weight)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.again(torch.tanh(self.first(x.flatten(1)))))
        h = torch.tanh(self.frozen(h)) + self.zero(h)
        return self.head(h)
