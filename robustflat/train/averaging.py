"""Averages of the weights over training: EMA and SWA, evaluated beside the raw weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from robustflat.bounds import BelowOne, Count, Whole


@dataclass(frozen=True)
class ema:  # noqa: N801 - named as in YAML
    """Exponential moving average of the weights, after every step.

    Args:
        decay: of the average.
        start_epoch: epochs before it begins.
    """

    decay: BelowOne = 0.995
    start_epoch: Whole = 0


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
    equal one (Izmailov et al. 2018, section 3.1) averages weights at the end of an epoch and
    needs its BatchNorm statistics computed anew before it is used, see :meth:`refresh`.

    Args:
        config: which average.
        model: the model; its weights are copied at once.
    """

    def __init__(self, config: ema | swa, model: nn.Module) -> None:
        self.config = config
        if isinstance(config, ema):
            update = get_ema_multi_avg_fn(config.decay)
            self._model = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
        else:
            self._model = AveragedModel(model)
        self._model.eval().requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The model with averaged weights, in eval mode."""
        return self._model.module

    @property
    def started(self) -> bool:
        """Whether anything has been averaged yet."""
        return int(self._model.n_averaged) > 0

    def after_step(self, model: nn.Module, epoch: int) -> None:
        """Average after an optimizer step of ``epoch`` (counted from 0)."""
        if isinstance(self.config, ema) and epoch >= self.config.start_epoch:
            self._model.update_parameters(model)

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """Average at the end of ``epoch`` (counted from 0)."""
        config = self.config
        if isinstance(config, ema) or epoch < config.start_epoch:
            return
        if (epoch - config.start_epoch) % config.every == 0:
            self._model.update_parameters(model)

    @property
    def needs_refresh(self) -> bool:
        """Whether BatchNorm's statistics must be computed anew before use."""
        return isinstance(self.config, swa) and self.started

    def refresh(self, inputs: Iterable[Tensor]) -> None:
        """Compute BatchNorm's statistics from ``inputs`` (batches of images), in train mode."""
        update_bn(inputs, self.model)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on."""
        return self._model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._model.load_state_dict(state)
