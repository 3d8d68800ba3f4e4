"""Newer objectives, written out example by example and class by class, for short trajectories."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def log_softmax(z: Tensor) -> Tensor:
    """Logarithms of the softmax of one row of logits ``[C]``."""
    return z - torch.logsumexp(z, 0)


def smooth_trades(
    model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, beta: float, smoothing: float
) -> Tensor:
    """Wang et al. 2023: (1-s) NLL(y) + s * mean over classes of NLL, + beta KL(clean || adv)."""
    clean, attacked = model(x), model(x_adv)
    total = clean.new_zeros(())
    for n, a, label in zip(clean, attacked, y, strict=True):
        log_n, log_a = log_softmax(n), log_softmax(a)
        total = total - (1 - smoothing) * log_n[label] - smoothing * log_n.mean()
        total = total + beta * (log_n.exp() * (log_n - log_a)).sum()
    return total / len(y)


def kl_improved(
    clean: Tensor, attacked: Tensor, y: Tensor, prior: Tensor, alpha: float, beta: float
) -> Tensor:
    """Cui et al. 2024, IKL: CE + beta/(4N) sum w_j w_k (dn - da)^2 + alpha CE(sg softmax n, a)."""
    total = clean.new_zeros(())
    for n, a, label in zip(clean, attacked, y, strict=True):
        w = prior[label]
        for j in range(len(n)):
            for k in range(len(n)):
                difference = (n[j] - n[k]) - (a[j] - a[k])
                total = total + beta / 4 * w[j] * w[k] * difference**2
        total = total - log_softmax(n)[label]
        total = total - alpha * (log_softmax(n).exp().detach() * log_softmax(a)).sum()
    return total / len(y)


def kl_general(
    clean: Tensor,
    attacked: Tensor,
    y: Tensor,
    prior: Tensor,
    alpha: float,
    beta: float,
    gamma: float,
) -> Tensor:
    """GKL as released: w = prior^gamma, squares over the sum of all w_j w_k of the batch."""
    squares, sizes, rest = clean.new_zeros(()), clean.new_zeros(()), clean.new_zeros(())
    for n, a, label in zip(clean, attacked, y, strict=True):
        w = prior[label] ** gamma
        for j in range(len(n)):
            for k in range(len(n)):
                difference = (n[j] - n[k]) - (a[j] - a[k])
                squares = squares + w[j] * w[k] * difference**2
                sizes = sizes + w[j] * w[k]
        rest = rest - log_softmax(n)[label]
        rest = rest - alpha * (log_softmax(n).exp().detach() * log_softmax(a)).sum()
    return rest / len(y) + beta / 4 * squares / sizes


class Priors:
    """The released code's WEIGHT: per class the sum of softened clean outputs, then rows to 1."""

    def __init__(self, classes: int, temperature: float) -> None:
        self.temperature = temperature
        self.prior = torch.full((classes, classes), 1 / classes, dtype=torch.float64)
        self.count = torch.zeros(classes, classes, dtype=torch.float64)

    def see(self, clean: Tensor, y: Tensor) -> None:
        """Add a batch of the running epoch."""
        for n, label in zip(clean.detach(), y, strict=True):
            self.count[label] += log_softmax(n / self.temperature).exp()

    def end_epoch(self) -> None:
        """Use the counts of the epoch that ended in the next."""
        self.prior = self.count / self.count.sum(1, keepdim=True)
        self.count = torch.zeros_like(self.count)


def rebat(
    model: nn.Module, averaged: nn.Module | None, x_adv: Tensor, y: Tensor, beta: float
) -> Tensor:
    """Wang et al. 2023, ReBAT: CE(adv) + beta KL(averaged || model), no gradient to averaged."""
    logits = model(x_adv)
    target = None if averaged is None else averaged(x_adv).detach()
    total = logits.new_zeros(())
    for i in range(len(y)):
        log_q = log_softmax(logits[i])
        total = total - log_q[y[i]]
        if target is not None:
            log_p = log_softmax(target[i])
            total = total + beta * (log_p.exp() * (log_p - log_q)).sum()
    return total / len(y)


def average_into(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """w_avg <- decay w_avg + (1 - decay) w, BatchNorm's statistics likewise."""
    theirs = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for name, value in [*averaged.named_parameters(), *averaged.named_buffers()]:
            if value.is_floating_point():
                value.copy_(decay * value + (1 - decay) * theirs[name])


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode."""
    return copy.deepcopy(model).eval()


def mlcat(model: nn.Module, x_adv: Tensor, y: Tensor, threshold: float, *, hold: bool) -> Tensor:
    """Yu et al. 2022: losses below the threshold are multiplied by threshold / loss."""
    total = x_adv.new_zeros(())
    for z, label in zip(model(x_adv), y, strict=True):
        loss = -log_softmax(z)[label]
        if float(loss.detach()) < threshold:
            factor = threshold / loss
            loss = loss * (factor.detach() if hold else factor)
        total = total + loss
    return total / len(y)
