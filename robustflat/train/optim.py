"""Optimizers from their configuration, and the learning rate as a pure function of progress."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from robustflat.config.schema import (
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    OneCycleConfig,
    PiecewiseConfig,
    SgdConfig,
)

ScheduleConfig = ConstantConfig | PiecewiseConfig | CosineConfig | LinearConfig | OneCycleConfig


def build_optimizer(config: SgdConfig | AdamWConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all trainable parameters.

    Args:
        config: with ``decay_all: false``, biases and normalisation parameters (those of at most
            one dimension) are exempt from weight decay.
        model: holds the parameters.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if config.decay_all or p.ndim > 1]},
        {
            "params": [p for p in parameters if not (config.decay_all or p.ndim > 1)],
            "weight_decay": 0.0,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if isinstance(config, AdamWConfig):
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def lr_factor(config: ScheduleConfig, epoch: float, epochs: int) -> float:
    """What multiplies the base learning rate.

    Args:
        config: the schedule.
        epoch: epochs done, fractions included, in [0, epochs).
        epochs: length of the training.

    Returns:
        The factor, in [0, 1].
    """
    if isinstance(config, OneCycleConfig):
        done = epoch / epochs
        if done < config.peak:
            return config.initial + (1 - config.initial) * done / config.peak
        return 1 - (1 - config.final) * (done - config.peak) / (1 - config.peak)
    if epoch < config.warmup_epochs:
        return epoch / config.warmup_epochs
    if isinstance(config, ConstantConfig):
        return 1.0
    if isinstance(config, PiecewiseConfig):
        passed = sum(epoch >= milestone * epochs for milestone in config.milestones)
        return config.factor**passed
    done = (epoch - config.warmup_epochs) / max(epochs - config.warmup_epochs, 1e-9)
    share = (1 + math.cos(math.pi * done)) / 2 if isinstance(config, CosineConfig) else 1 - done
    return config.final + (1 - config.final) * share
