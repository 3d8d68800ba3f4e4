"""Owns the small models: a convolutional network and a multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.errors import UserError


def positive(model: str, option: str, value: object) -> int:
    """Check that an option is a positive whole number.

    Args:
        model: The model's name, for the message.
        option: The option's name, for the message.
        value: What was given.

    Returns:
        The number.

    Raises:
        UserError: If it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(
            f"{model}: the option {option} must be a whole number of at least 1, got {value!r}."
        )
    return value


class SmallCNN(nn.Module):
    """A small convolutional network for digits, MNIST and quick experiments.

    `depth` 3x3 convolutions, each but the first halving the image and doubling the width. The
    features are averaged over a 2x2 grid, so coarse positions survive; images must be at least
    5x5. Takes normalised images.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        width: Channels after the first convolution.
        depth: Number of convolutions, 2 or 3.
        batch_norm: Whether a BatchNorm follows each convolution.

    Raises:
        UserError: If an option is out of range.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        width: int = 32,
        depth: int = 3,
        batch_norm: bool = True,
    ) -> None:
        if isinstance(depth, bool) or depth not in (2, 3):
            raise UserError(f"small_cnn: the option depth must be 2 or 3, got {depth!r}.")
        if not isinstance(batch_norm, bool):
            raise UserError(
                f"small_cnn: the option batch_norm must be true or false, got {batch_norm!r}."
            )
        positive("small_cnn", "width", width)
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for level in range(depth):
            out = width * 2**level
            layers.append(
                nn.Conv2d(channels, out, 3, 1 if level == 0 else 2, 1, bias=not batch_norm)
            )
            if batch_norm:
                layers.append(nn.BatchNorm2d(out))
            layers.append(nn.ReLU(inplace=True))
            channels = out
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(4 * channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify a batch.

        Args:
            x: Images, [N, C, H, W].

        Returns:
            Logits, [N, classes].
        """
        h = self.features(x)
        # Adaptive pooling to 2x2 written as average pooling with overlap: the same numbers for
        # every size, but its backward pass is deterministic on CUDA, the adaptive one's is not.
        (rows, cols) = h.shape[-2:]
        stride = (max(rows // 2, 1), max(cols // 2, 1))
        h = F.avg_pool2d(h, (rows - rows // 2, cols - cols // 2), stride)
        logits: Tensor = self.linear(h.flatten(1))
        return logits


def mlp(
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    hidden: Sequence[int] | int = (256, 256),
) -> nn.Module:
    """A multi-layer perceptron with ReLU on the flattened image.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Height and width of the images.
        hidden: Width of each hidden layer; none for a linear model.

    Returns:
        The model; takes normalised images.

    Raises:
        UserError: If an option is out of range.
    """
    widths = [hidden] if isinstance(hidden, int) else list(hidden)
    features = in_channels * image_size[0] * image_size[1]
    layers: list[nn.Module] = [nn.Flatten()]
    for width in widths:
        layers += [nn.Linear(features, positive("mlp", "hidden", width)), nn.ReLU(inplace=True)]
        features = width
    layers.append(nn.Linear(features, num_classes))
    return nn.Sequential(*layers)
