"""Averages of the weights over training: EMA and SWA, evaluated beside the raw weights."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from robustflat.bounds import BelowOne, Count, Whole
from robustflat.train.parallel import Processes


@dataclass(frozen=True)
class ema:  # noqa: N801 - named as in YAML
    """Exponential moving average of the weights, after every step.

    Args:
        decay: of the average.
        start_epoch: epochs before it begins.
        warmup: let the n-th update decay by at most (1 + n) / (10 + n), as TensorFlow's
            ExponentialMovingAverage does: without it the average of a short run is still that of
            its first weights.
    """

    decay: BelowOne = 0.995
    start_epoch: Whole = 0
    warmup: bool = True


@dataclass(frozen=True)
class swa:  # noqa: N801
    """Equal average of the weights at the end of each epoch.

    Source: Izmailov et al. 2018.

    Args:
        start_epoch: epochs before it begins.
        every: epochs from one to the next.
    """

    start_epoch: Whole
    every: Count = 1


AVERAGES = {"ema": ema, "swa": swa}


class Average:
    """A running average of a model's weights.

    The exponential one averages buffers too (BatchNorm's statistics), after every step; the
    equal one (Izmailov et al. 2018, section 3.1) averages weights at the end of an epoch, and
    BatchNorm's statistics must be computed anew before it is used, see :meth:`refresh`.

    Args:
        config: which average.
        model: the model; its weights are copied at once.
    """

    def __init__(self, config: ema | swa, model: nn.Module) -> None:
        self.config = config
        self.model = deepcopy(model).eval().requires_grad_(False)
        """The model with averaged weights, in eval mode."""
        self._count = 0  # not on the device: counting there would wait for it
        self._fresh = True

    @property
    def started(self) -> bool:
        """Whether anything has been averaged yet."""
        return self._count > 0

    @property
    def needs_refresh(self) -> bool:
        """Whether BatchNorm's statistics must be computed anew before use."""
        return self.started and not self._fresh

    @property
    def usable(self) -> bool:
        """Whether there is an average, and it can be used as it stands."""
        return self.started and self._fresh

    def after_step(self, model: nn.Module, epoch: int) -> None:
        """Average after an optimizer step of ``epoch`` (counted from 0)."""
        config = self.config
        if isinstance(config, ema) and epoch >= config.start_epoch:
            n = self._count
            decay = min(config.decay, (1 + n) / (10 + n)) if config.warmup else config.decay
            self._update(model, 1 - decay)

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """Average at the end of ``epoch`` (counted from 0)."""
        config = self.config
        if isinstance(config, ema) or epoch < config.start_epoch:
            return
        if (epoch - config.start_epoch) % config.every == 0:
            self._update(model, 1 / (self._count + 1))
            self._fresh = not any(isinstance(m, _BatchNorm) for m in self.model.modules())

    @torch.no_grad()
    def _update(self, model: nn.Module, weight: float) -> None:
        """Move ``weight`` of the way to the model; the first time, all of it."""
        pairs: list[tuple[Tensor, Tensor]] = []
        pairs += zip(self.model.parameters(), model.parameters(), strict=True)
        for a, b in zip(self.model.buffers(), model.buffers(), strict=True):
            if isinstance(self.config, ema) and a.is_floating_point():
                pairs.append((a, b))
            else:
                a.copy_(b)
        ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
        if self._count:
            torch._foreach_lerp_(ours, theirs, weight)
        else:
            torch._foreach_copy_(ours, theirs)
        self._count += 1

    def refresh(self, inputs: Iterable[Tensor], processes: Processes) -> None:
        """Compute BatchNorm's statistics anew, as the mean of those of batches in train mode.

        Args:
            inputs: batches of images, equally many in every process.
            processes: those that share the batches.
        """
        update_bn(inputs, self.model)
        with torch.no_grad():
            for buffer in self.model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(processes.mean(buffer))
        self._fresh = True

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on."""
        return {"model": self.model.state_dict(), "count": self._count, "fresh": self._fresh}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.model.load_state_dict(state["model"])
        self._count, self._fresh = state["count"], state["fresh"]
