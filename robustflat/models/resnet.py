"""Owns PreActResNet, named as in public code."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.models.small import positive


def conv3x3(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size (up to its stride), without bias.

    Args:
        channels: Input channels.
        out: Output channels.
        stride: Stride.

    Returns:
        The layer.
    """
    return nn.Conv2d(channels, out, 3, stride, 1, bias=False)


class PreActBlock(nn.Module):
    """BatchNorm, ReLU, convolution, twice, beside a shortcut (He et al. 2016, "Identity mappings").

    The shortcut is a 1x1 convolution of the activated input where shape changes, else the input.

    Args:
        channels: Input channels.
        out: Output channels.
        stride: Stride of the first convolution.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv3x3(channels, out, stride)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = conv3x3(out, out)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: Features, [N, channels, H, W].

        Returns:
            Features, [N, out, H / stride, W / stride].
        """
        h = F.relu(self.bn1(x), inplace=True)
        short: Tensor = x if self.shortcut is None else self.shortcut(h)
        h = self.conv2(F.relu(self.bn2(self.conv1(h)), inplace=True))
        out: Tensor = h + short
        return out


class PreActResNet(nn.Module):
    """PreActResNet for small images: 3x3 stem, stages of doubling width, mean over positions.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        width: Channels of the stem and of the first stage.
        blocks: Blocks per stage; each stage but the first halves the image.
    """

    def __init__(
        self, *, num_classes: int, in_channels: int, width: int, blocks: Sequence[int]
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width)
        self.stages = [f"layer{i}" for i in range(1, len(blocks) + 1)]
        channels = width
        for i, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            out = width * 2**i
            first = PreActBlock(channels, out, 1 if i == 0 else 2)
            rest = [PreActBlock(out, out, 1) for _ in range(count - 1)]
            self.add_module(name, nn.Sequential(first, *rest))
            channels = out
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify a batch.

        Args:
            x: Images, [N, C, H, W].

        Returns:
            Logits, [N, classes].
        """
        h = self.conv1(x)
        for name in self.stages:
            h = self.get_submodule(name)(h)
        h = F.relu(self.bn(h), inplace=True)
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(h, 1).flatten(1))
        return logits


def preact_resnet18(
    *,
    num_classes: int,
    in_channels: int,
    width: int = 64,
    blocks: Sequence[int] = (2, 2, 2, 2),
) -> nn.Module:
    """PreActResNet-18, or a narrower or shallower one.

    With the defaults this is the network of Rice et al. 2020 and Wu et al. 2020 (11.17 million
    parameters at 10 classes), and takes their state dicts.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        width: Channels of the first stage; each further stage doubles them.
        blocks: Blocks per stage.

    Returns:
        The model; takes normalised images.

    Raises:
        UserError: If an option is out of range.
    """
    if isinstance(blocks, (int, str)) or not blocks:
        raise UserError(
            "preact_resnet18: the option blocks must list the number of blocks per stage, such as "
            f"[2, 2, 2, 2], got {blocks!r}."
        )
    return PreActResNet(
        num_classes=num_classes,
        in_channels=in_channels,
        width=positive("preact_resnet18", "width", width),
        blocks=[positive("preact_resnet18", "blocks", n) for n in blocks],
    )
