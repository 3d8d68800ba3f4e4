"""Owns mixup and cutmix: convex mixtures of images and of their labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor

from robustflat.data.images import moved


def mixup(
    x: Tensor,
    y: Tensor,
    *,
    alpha: float,
    num_classes: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Mix each image with another one (Zhang et al. 2018, "mixup", equation 1).

    `x' = lam x + (1 - lam) x[p]` and likewise for the labels, with one `lam ~ Beta(alpha, alpha)`
    and one permutation p per batch, as in the released code.

    Args:
        x: Images, floating, [N, C, H, W].
        y: Labels, int64 [N], or soft labels, float [N, num_classes].
        alpha: Strength, positive; near 0 mixes little, 1 uniformly.
        num_classes: Number of classes.
        generator: A CPU generator.

    Returns:
        The mixtures, [N, C, H, W], and their soft labels, float [N, num_classes].
    """
    lam = _share(alpha, generator)
    partner = moved(torch.randperm(len(x), generator=generator), x.device)
    soft = _soft(y, num_classes, x.dtype)
    return lam * x + (1 - lam) * x[partner], lam * soft + (1 - lam) * soft[partner]


def cutmix(
    x: Tensor,
    y: Tensor,
    *,
    alpha: float,
    num_classes: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Paste a box of another image into each one (Yun et al. 2019, "CutMix", section 3.1).

    With `lam ~ Beta(alpha, alpha)` the box has sides `sqrt(1 - lam)` of the image's and a centre
    uniform over the pixels, and is clipped at the border; the labels are then mixed by the area
    that was really pasted. One box and one permutation per batch, as in the released code.

    Args:
        x: Images, [N, C, H, W].
        y: Labels, int64 [N], or soft labels, float [N, num_classes].
        alpha: Shape of the Beta distribution, positive.
        num_classes: Number of classes.
        generator: A CPU generator.

    Returns:
        The images, [N, C, H, W], and their soft labels, float [N, num_classes].
    """
    side = (1 - _share(alpha, generator)) ** 0.5
    partner = moved(torch.randperm(len(x), generator=generator), x.device)
    spans = []
    for size in x.shape[-2:]:
        cut = int(size * side)
        start = int(torch.randint(size, (), generator=generator)) - cut // 2
        spans.append((max(start, 0), min(start + cut, size)))
    (top, bottom), (left, right) = spans
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x[partner, :, top:bottom, left:right]
    lam = 1 - (bottom - top) * (right - left) / (x.shape[-2] * x.shape[-1])
    soft = _soft(y, num_classes, torch.float32)
    return mixed, lam * soft + (1 - lam) * soft[partner]


def _share(alpha: float, generator: torch.Generator) -> float:
    """One draw from Beta(alpha, alpha), by inversion: torch's own Beta takes no generator."""
    uniform = float(torch.rand((), dtype=torch.float64, generator=generator))
    return float(betaincinv(alpha, alpha, uniform))


def _soft(y: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Labels as distributions over the classes."""
    if y.is_floating_point():
        return y
    return F.one_hot(y, num_classes).to(dtype)
