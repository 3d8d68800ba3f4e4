"""Owns input normalisation as the first layer, so that every model takes images in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustflat.errors import UserError


class Normalize(nn.Module):
    """`(x - mean) / std` per channel, with the statistics in buffers.

    The result has the dtype of the buffers, so `model.to(dtype)` is enough for inputs of any
    floating type, and under autocast the arithmetic stays in float32.

    Args:
        mean: One number per channel, in [0, 1] image units.
        std: One positive number per channel, in the same units.

    Raises:
        UserError: If the lengths differ, or a number is not finite, or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not mean or len(mean) != len(std):
            raise UserError(
                f"Normalisation needs one mean and one std per channel, got {len(mean)} means and "
                f"{len(std)} stds."
            )
        if not all(math.isfinite(m) for m in mean):
            raise UserError(f"Normalisation needs finite means, got {tuple(mean)}.")
        if not all(math.isfinite(s) and s > 0 for s in std):
            raise UserError(
                f"Normalisation divides by std, so each must be positive, got {tuple(std)}. "
                "Use 1.0 for a channel that never varies."
            )
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(tuple(std)).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a batch.

        Args:
            x: Images, [N, C, H, W], in [0, 1].

        Returns:
            The normalised images, [N, C, H, W], in the dtype of the buffers.
        """
        return ((x - self.mean) / self.std).to(self.mean.dtype)

    def extra_repr(self) -> str:
        """The number of channels (the values may be on a device, where printing would wait)."""
        return f"channels={self.mean.shape[0]}"


class Normalized(nn.Module):
    """A network behind its normalisation: takes images in [0, 1], returns logits.

    Args:
        net: The network, which takes normalised images.
        mean: One number per channel, in [0, 1] image units.
        std: One positive number per channel, in the same units.
    """

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Classify a batch.

        Args:
            x: Images, [N, C, H, W], in [0, 1].

        Returns:
            Logits, [N, classes].
        """
        logits: Tensor = self.net(self.normalize(x))
        return logits
