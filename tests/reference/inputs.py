"""Input attacks and objectives, as their papers and released codes have them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _ce_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_(True)
    F.cross_entropy(model(x), y).backward()
    assert x.grad is not None
    return x.grad


def pgd_linf(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int, delta: Tensor
) -> Tensor:
    """Rice et al. 2020 / AWP: sign steps, ball then box after each; ``delta`` is the random start.

    The model is attacked in the mode in which it stands.
    """
    delta = torch.max(torch.min(delta, 1 - x), 0 - x)
    for _ in range(steps):
        g = _ce_gradient(model, x + delta, y)
        delta = torch.clamp(delta + alpha * torch.sign(g), -eps, eps)
        delta = torch.max(torch.min(delta, 1 - x), 0 - x)
    return x + delta


def pgd_l2(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    alpha: float,
    steps: int,
    delta: Tensor,
    floor: float = 1e-10,
) -> Tensor:
    """Rice et al. 2020: steps along g / (||g|| + 1e-10), ball then box after each."""
    delta = torch.max(torch.min(delta, 1 - x), 0 - x)
    for _ in range(steps):
        g = _ce_gradient(model, x + delta, y)
        moved = []
        for d_i, g_i in zip(delta, g, strict=True):
            d_i = d_i + alpha * g_i / (g_i.pow(2).sum().sqrt() + floor)
            length = d_i.pow(2).sum().sqrt()
            moved.append(d_i * eps / length if length > eps else d_i)
        delta = torch.max(torch.min(torch.stack(moved), 1 - x), 0 - x)
    return x + delta


def trades_attack(
    model: nn.Module, x: Tensor, eps: float, alpha: float, steps: int, noise: Tensor
) -> Tensor:
    """TRADES' inner loop, linf: KL(f(x) || f(x')) summed, from x + 0.001 * noise, unclipped."""
    model.eval()
    with torch.no_grad():
        p = F.softmax(model(x), dim=1)
    x_adv = x + 0.001 * noise
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_(True)
        q = F.log_softmax(model(x_adv), dim=1)
        (g,) = torch.autograd.grad((p * (p.log() - q)).sum(), x_adv)
        x_adv = x_adv.detach() + alpha * torch.sign(g)
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    model.train()
    return x_adv.detach()


def trades_loss(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """CE(clean) + beta / N * sum_i KL(p_i || q_i)."""
    clean = model(x)
    p, log_q = F.softmax(clean, 1), F.log_softmax(model(x_adv), 1)
    divergence = (p * (torch.log(p) - log_q)).sum()
    natural = -torch.log(p[torch.arange(len(y)), y]).mean()
    return natural + beta * divergence / len(y)


def mart_loss(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """Released MART: CE(adv) - log(1.0001 - p_wrong + 1e-12), KL weighted by 1.0000001 - p_y."""
    p, q = F.softmax(model(x), 1), F.softmax(model(x_adv), 1)
    total = q.new_zeros(())
    for i in range(len(y)):
        wrong = max(
            (q[i, j] for j in range(q.shape[1]) if j != y[i]), key=lambda t: float(t.detach())
        )
        total = total - torch.log(q[i, y[i]]) - torch.log(1.0001 - wrong + 1e-12)
        divergence = (p[i] * (torch.log(p[i]) - torch.log(q[i] + 1e-12))).sum()
        total = total + beta * divergence * (1.0000001 - p[i, y[i]])
    return total / len(y)


def nfgsm(model: nn.Module, x: Tensor, y: Tensor, noise: Tensor, alpha: float) -> Tensor:
    """de Jorge et al. 2022: the noise clipped to the box, one sign step there, clipped to the box.

    The model is attacked in the mode in which it stands.
    """
    eta = torch.max(torch.min(noise, 1 - x), 0 - x)
    g = _ce_gradient(model, x + eta, y)
    delta = eta + alpha * torch.sign(g)
    return x + torch.max(torch.min(delta, 1 - x), 0 - x)
