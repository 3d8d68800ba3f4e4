"""How far BatchNorm's running statistics move from one epoch to the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Drift:
    """The drift of a model's running statistics, over all channels of all its BatchNorm layers.

    With mean m and variance v of a channel (v with the layer's eps), before and after:

    - ``mean``: root mean square of (m' - m) / sqrt(v), in the channel's standard deviations;
    - ``variance``: root mean square of log(v' / v); 0.1 is a change by a tenth.

    Statistics that keep moving while the weights hardly do are those of perturbed inputs or weights
    (:func:`robustflat.perturb.modes.attack_mode`, ``weights.statistics``), or of too small batches.

    Args:
        model: any; without such layers there is nothing to tell.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
        self._before = self._now()

    def __call__(self) -> dict[str, float] | None:
        """How far they moved since the last call, or since the beginning; None without any."""
        (mean, variance), now = self._before, self._now()
        self._before = now
        if not len(mean):
            return None
        moved = (now[0] - mean) / variance.sqrt(), (now[1] / variance).log()
        of_mean, of_variance = torch.stack([m.square().mean().sqrt() for m in moved]).tolist()
        return {"mean": of_mean, "variance": of_variance}

    def state_dict(self) -> dict[str, Tensor]:
        """What the next call compares with."""
        return dict(zip(("mean", "variance"), self._before, strict=True))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`."""
        mean = self._before[0]
        if state["mean"].shape != mean.shape:
            raise ValueError("it has other BatchNorm layers")
        self._before = state["mean"].to(mean.device), state["variance"].to(mean.device)

    def _now(self) -> tuple[Tensor, Tensor]:
        """Means, and variances with eps, of all channels in float64, each ``[C]``."""
        found = [
            (layer.running_mean.double(), layer.running_var.double() + layer.eps)
            for layer in self._layers
            if layer.running_mean is not None and layer.running_var is not None
        ]
        if not found:
            return torch.empty(0), torch.empty(0)
        means, variances = zip(*found, strict=True)
        return torch.cat(means), torch.cat(variances)
