"""Owns augmentation of a batch of images: random crop, flip and cutout, without a loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustflat.bounds import Whole
from robustflat.data.images import moved
from robustflat.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Crop, flip and cutout, drawn for each image on its own.

    Attributes:
        crop: The image is padded by this many zeros on every side and a window of the original
            size cut out; each of the (2 crop + 1)^2 offsets is equally likely.
        flip: Whether an image is mirrored left to right with probability 1/2.
        cutout: Side of a square set to zero (black); its centre is uniform over the pixels and
            the part beyond the border is lost (DeVries & Taylor 2017). An odd side is exact; an
            even one reaches one pixel further to the top left.
    """

    crop: Whole = 0
    flip: bool = False
    cutout: Whole = 0

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch.

        Args:
            x: Images of any dtype, [N, C, H, W]. Not changed.
            generator: Where the choices come from; it may live on another device than x.

        Returns:
            The augmented images, of the same shape, dtype and device.

        Raises:
            UserError: If the cutout square is larger than the image.
        """
        (n, _, height, width) = x.shape
        if self.cutout > min(height, width):
            raise UserError(
                f"augment.cutout is {self.cutout} but the images are {height}x{width}: the square "
                "must fit into the image."
            )

        def draw(high: int) -> Tensor:
            drawn = torch.randint(high, (n,), generator=generator, device=generator.device)
            return moved(drawn, x.device)

        if self.crop:
            (top, left) = (draw(2 * self.crop + 1), draw(2 * self.crop + 1))
            windows = F.pad(x, (self.crop,) * 4).unfold(2, height, 1).unfold(3, width, 1)
            x = windows[torch.arange(n, device=x.device), :, top, left]
        if self.flip:
            x = torch.where(draw(2).view(n, 1, 1, 1) == 1, x.flip(-1), x)
        if self.cutout:
            rows = _inside(height, draw(height), self.cutout)
            cols = _inside(width, draw(width), self.cutout)
            x = x.masked_fill((rows[:, :, None] & cols[:, None, :])[:, None], 0)
        return x


def _inside(size: int, centre: Tensor, side: int) -> Tensor:
    """Which of `size` positions lie within an interval of length `side`, [N, size]."""
    offset = torch.arange(size, device=centre.device) - centre[:, None] + side // 2
    return (offset >= 0) & (offset < side)
