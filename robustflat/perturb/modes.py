"""Train and eval mode, and frozen parameters: switched one by one, and always switched back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Mode = Literal["eval", "batch"]
MODES: tuple[Mode, ...] = ("eval", "batch")


@contextmanager
def attack_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Hold ``model`` in the mode in which an attack sees it; every module's flags come back.

    Args:
        model: any module.
        mode: "eval" puts every module in eval mode. "batch" does too, except that BatchNorm layers
            in train mode go on normalising with the statistics of the batch, without updating
            their running ones (the released code of AT and AWP attacks in train mode, and lets
            the attack change those). A frozen BatchNorm layer stays frozen.

    Raises:
        ValueError: if ``mode`` is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"An attack mode must be one of {MODES}, got {mode!r}.")
    modules = list(model.modules())
    training = [module.training for module in modules]
    live = [
        module
        for module in modules
        if mode == "batch"
        and isinstance(module, _BatchNorm)
        and module.training
        and module.track_running_stats
    ]
    try:
        for module in modules:
            # Not module.eval(), which subclasses override and which descends into children.
            module.training = False
        for module in live:
            module.training, module.track_running_stats = True, False
        yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for module in live:
            module.track_running_stats = True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold every module of ``model`` in eval mode; every module's flag comes back on exit."""
    with attack_mode(model, "eval"):
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of ``model`` require a gradient; those that did do so again on exit."""
    thawed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in thawed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)
