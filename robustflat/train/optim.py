"""Optimizers by name, and the learning rate as a pure function of progress."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from robustflat.bounds import BelowOne, Inside, NonNegative, Positive, Share
from robustflat.config.schema import OptimizerSection
from robustflat.errors import UserError, reason

# From epochs done (fractions included), all epochs, and the length of a step in epochs to the
# factor, in [0, 1], of the base learning rate.
Schedule = Callable[[float, float, float], float]


def sgd(
    params: Iterable[Any],
    lr: Positive = 0.1,
    momentum: Share = 0.9,
    nesterov: bool = False,
    weight_decay: NonNegative = 5e-4,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """Stochastic gradient descent, with what robust training usually takes.

    Source: torch.optim.SGD.

    Raises:
        ValueError: if Nesterov's momentum is asked for without momentum.
    """
    if nesterov and momentum == 0:
        raise ValueError("nesterov needs momentum above 0. Set momentum, or nesterov: false")
    return torch.optim.SGD(
        params,
        lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        foreach=foreach,
        fused=fused,
    )


def adamw(
    params: Iterable[Any],
    lr: Positive = 1e-3,
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999),
    weight_decay: NonNegative = 0.01,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay.

    Source: torch.optim.AdamW.
    """
    return torch.optim.AdamW(
        params, lr, betas=betas, weight_decay=weight_decay, foreach=foreach, fused=fused
    )


def _of_torch() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """Every optimizer of torch.optim that steps without a closure and takes dense gradients."""
    left_out = (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
    found = (getattr(torch.optim, name) for name in dir(torch.optim))
    return {
        c.__name__.lower(): c
        for c in found
        if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer) and c not in left_out
    }


OPTIMIZERS = {**_of_torch(), "sgd": sgd, "adamw": adamw}


def build_optimizer(config: OptimizerSection, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all trainable parameters.

    Args:
        config: with ``decay_all: false``, biases and normalisation parameters (those of at most
            one dimension) are exempt from weight decay.
        model: holds the parameters.

    Raises:
        UserError: if the optimizer cannot work on them.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if config.decay_all or p.ndim > 1]},
        {
            "params": [p for p in parameters if not (config.decay_all or p.ndim > 1)],
            "weight_decay": 0.0,
        },
    ]
    try:
        optimizer: torch.optim.Optimizer = config.build(params=[g for g in groups if g["params"]])
    except ValueError as error:
        raise UserError(f"The optimizer {config.name} cannot train this model: {error}") from None
    if config.fused:
        _check_fused(config, parameters[0])
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(
            f"The optimizer {config.name} evaluates the loss by itself, and a step here does so at "
            "the perturbed weights. Use one that steps from gradients, such as sgd or adamw."
        )
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # what the schedule multiplies
    return optimizer


def _check_fused(config: OptimizerSection, parameter: nn.Parameter) -> None:
    """Step a stand-in once: torch tells only then what it cannot do."""
    stand_in = nn.Parameter(parameter.new_zeros(1))
    stand_in.grad = torch.zeros_like(stand_in)
    try:
        config.build(params=[stand_in]).step()
    except (RuntimeError, UserError) as error:
        raise UserError(
            f"optimizer.fused: torch has no fused {config.name} of {parameter.dtype} on "
            f"{parameter.device}: {reason(error)}. Leave it out."
        ) from None


def constant(warmup_epochs: NonNegative = 0.0) -> Schedule:
    """The base learning rate throughout."""
    return lambda epoch, epochs, step: _warm_up(warmup_epochs, epoch, step)


def piecewise(
    milestones: tuple[Share, ...] = (0.5, 0.75),
    factor: Share = 0.1,
    warmup_epochs: NonNegative = 0.0,
) -> Schedule:
    """Multiplied by ``factor`` at each milestone, given as a share of the epochs."""

    def now(epoch: float, epochs: float, step: float) -> float:
        if epoch < warmup_epochs:
            return _warm_up(warmup_epochs, epoch, step)
        return factor ** sum(epoch >= milestone * epochs for milestone in milestones)

    return now


def cosine(final: Share = 0.0, warmup_epochs: NonNegative = 0.0) -> Schedule:
    """Half a cosine from the base learning rate to ``final`` times it."""
    return _falling(lambda done: (1 + math.cos(math.pi * done)) / 2, final, warmup_epochs)


def linear(final: Share = 0.0, warmup_epochs: NonNegative = 0.0) -> Schedule:
    """A line from the base learning rate to ``final`` times it."""
    return _falling(lambda done: 1 - done, final, warmup_epochs)


def one_cycle(
    peak: Inside = 0.4,
    initial: Share = 0.0,
    final: Share = 0.0,
    shape: Literal["linear", "cosine"] = "linear",
) -> Schedule:
    """Up to the base learning rate at ``peak`` (share of the epochs), then down to ``final``.

    In lines, or in halves of a cosine as torch's OneCycleLR does (peak 0.3, initial 1/25). Each
    step has the rate of its end, so that the first is not lost to a rate of 0.
    """

    def now(epoch: float, epochs: float, step: float) -> float:
        done = min((epoch + step) / epochs, 1.0)
        lowest, share = (initial, done / peak) if done < peak else (final, (1 - done) / (1 - peak))
        if shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return lowest + (1 - lowest) * share

    return now


def _falling(shape: Callable[[float], float], final: float, warmup_epochs: float) -> Schedule:
    def now(epoch: float, epochs: float, step: float) -> float:
        if epoch < warmup_epochs:
            return _warm_up(warmup_epochs, epoch, step)
        done = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
        return final + (1 - final) * shape(done)

    return now


def _warm_up(warmup_epochs: float, epoch: float, step: float) -> float:
    """A line that reaches 1 with the last step of the warm-up; its first step moves too."""
    return min((epoch + step) / warmup_epochs, 1.0) if warmup_epochs else 1.0


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "piecewise": piecewise,
    "cosine": cosine,
    "linear": linear,
    "one_cycle": one_cycle,
}
