"""Owns the recomputing of BatchNorm's running statistics for weights that were never trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def recompute_statistics(model: nn.Module, x: Tensor, batch_size: int) -> None:
    """Set the running statistics to their averages over ``x`` at the present weights.

    Batches count by their examples. Everything else stays in eval mode, so dropout is off. The
    caller keeps the buffers and the modules' flags (a frozen layer is recomputed, too).

    Args:
        model: in eval mode.
        x: images ``[N, ...]``.
        batch_size: examples in a pass; should be large, as each layer sees its batch's statistics.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return
    place = next(model.parameters())
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.training = True
        for start in range(0, len(x), batch_size):
            batch = x[start : start + batch_size].to(place.device, place.dtype)
            for layer in layers:
                # A running mean over examples: the first batch replaces what was there.
                layer.momentum = len(batch) / (start + len(batch))
            model(batch)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.training, layer.momentum = False, momentum
