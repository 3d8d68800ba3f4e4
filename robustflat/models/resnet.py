"""Owns ResNet and PreActResNet for small images, named as in public code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


class PreActBlockSilu(PreActBlock):
    """The block of Gowal et al. 2020: SiLU, and a 3x3 convolution of the input as shortcut.

    Where the stride is 2, padding is on the right and below only, as JAX's "SAME" does.

    Args:
        channels: Input channels.
        out: Output channels.
        stride: Stride of the first convolution.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__(channels, out, stride)
        if self.shortcut is not None:
            self.shortcut = nn.Conv2d(channels, out, 3, stride, bias=False)
        self.conv1.padding = (0, 0)
        self.pad = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block; see `PreActBlock.forward`."""
        h = self.conv1(F.pad(F.silu(self.bn1(x)), self.pad))
        short: Tensor = x if self.shortcut is None else self.shortcut(F.pad(x, self.pad))
        out: Tensor = self.conv2(F.silu(self.bn2(h))) + short
        return out


class Block(nn.Module):
    """Convolution, BatchNorm, ReLU, beside a shortcut (He et al. 2016, "Deep residual learning").

    The shortcut is a 1x1 convolution and BatchNorm where shape changes, else the input.

    Args:
        channels: Input channels.
        width: Channels inside; `expansion` times as many come out.
        stride: Stride of the 3x3 convolution that has one.
    """

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = self.expansion * width
        for number, conv in enumerate(self.convolutions(channels, width, stride), 1):
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(conv.out_channels))
        self.count = number
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    @staticmethod
    def convolutions(channels: int, width: int, stride: int) -> list[nn.Conv2d]:
        """The convolutions in order."""
        return [conv3x3(channels, width, stride), conv3x3(width, width)]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block; see `PreActBlock.forward`."""
        h = x
        for number in range(1, self.count + 1):
            h = self.get_submodule(f"conv{number}")(h if number == 1 else F.relu(h))
            h = self.get_submodule(f"bn{number}")(h)
        short: Tensor = x if self.shortcut is None else self.shortcut(x)
        return F.relu(h + short)


class Bottleneck(Block):
    """A block whose 3x3 convolution is between two 1x1, four times as wide outside as inside.

    Args:
        channels: Input channels.
        width: Channels inside.
        stride: Stride of the 3x3 convolution.
    """

    expansion = 4

    @staticmethod
    def convolutions(channels: int, width: int, stride: int) -> list[nn.Conv2d]:
        """The convolutions in order."""
        return [
            nn.Conv2d(channels, width, 1, bias=False),
            conv3x3(width, width, stride),
            nn.Conv2d(width, 4 * width, 1, bias=False),
        ]


class PreActResNet(nn.Module):
    """PreActResNet for small images: 3x3 stem, stages of doubling width, mean over positions.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        width: Channels of the stem and of the first stage.
        blocks: Blocks per stage; each stage but the first halves the image.
        silu: With the blocks of Gowal et al. 2020.
    """

    # The names of Gowal et al. 2020, and ours.
    public_keys = (
        ("conv_2d_1.", "conv1."),
        ("conv_2d_2.", "conv2."),
        ("conv_2d.", "conv1."),
        *((f"layer_{i}.", f"layer{i + 1}.") for i in range(4)),
        ("batchnorm_0.", "bn1."),
        ("batchnorm_1.", "bn2."),
        ("batchnorm.", "bn."),
        ("logits.", "linear."),
    )

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        width: int,
        blocks: Sequence[int],
        silu: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width)
        kind = PreActBlockSilu if silu else PreActBlock
        self.stages, channels = _stages(self, kind, width, blocks)
        self.activation = F.silu if silu else F.relu
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
        h = self.activation(self.bn(h))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(h, 1).flatten(1))
        return logits


class ResNet(nn.Module):
    """ResNet for small images: 3x3 stem, stages of doubling width, mean over positions.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        width: Channels of the stem, and inside the blocks of the first stage.
        blocks: Blocks per stage; each stage but the first halves the image.
        bottleneck: Whether blocks are bottlenecks.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        width: int,
        blocks: Sequence[int],
        bottleneck: bool,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages, channels = _stages(self, Bottleneck if bottleneck else Block, width, blocks)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify a batch; see `PreActResNet.forward`."""
        h = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            h = self.get_submodule(name)(h)
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(h, 1).flatten(1))
        return logits


def _stages(
    net: nn.Module, kind: Callable[[int, int, int], nn.Module], width: int, blocks: Sequence[int]
) -> tuple[list[str], int]:
    """Add the stages layer1, layer2, ... to a network; their names, and the last one's channels."""
    names, channels = [], width
    expansion = getattr(kind, "expansion", 1)
    for i, count in enumerate(blocks):
        inside = width * 2**i
        out = expansion * inside
        first = kind(channels, inside, 1 if i == 0 else 2)
        names.append(f"layer{i + 1}")
        net.add_module(
            names[-1], nn.Sequential(first, *(kind(out, inside, 1) for _ in range(count - 1)))
        )
        channels = out
    return names, channels


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
    return PreActResNet(
        num_classes=num_classes, in_channels=in_channels, **_sizes("preact_resnet18", width, blocks)
    )


def preact_resnet18_silu(
    *,
    num_classes: int,
    in_channels: int,
    width: int = 64,
    blocks: Sequence[int] = (2, 2, 2, 2),
) -> nn.Module:
    """The PreActResNet-18 of Gowal et al. 2020, or a narrower or shallower one.

    With SiLU; with 3x3 convolutions as shortcuts; with padding on the right and below where the
    stride is 2. Takes the state dicts of Rebuffi et al. 2021, Rade and Moosavi-Dezfooli 2021 and
    their successors.

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
    sizes = _sizes("preact_resnet18_silu", width, blocks)
    return PreActResNet(num_classes=num_classes, in_channels=in_channels, silu=True, **sizes)


def resnet18(
    *,
    num_classes: int,
    in_channels: int,
    width: int = 64,
    blocks: Sequence[int] = (2, 2, 2, 2),
) -> nn.Module:
    """ResNet-18 for small images, or a narrower or shallower one.

    With the defaults this is the network of Madry et al., MAIR and RobustBench (11.17 million
    parameters at 10 classes), and takes their state dicts. ImageNet's is `timm:resnet18`.

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
    sizes = _sizes("resnet18", width, blocks)
    return ResNet(num_classes=num_classes, in_channels=in_channels, bottleneck=False, **sizes)


def resnet50(
    *,
    num_classes: int,
    in_channels: int,
    width: int = 64,
    blocks: Sequence[int] = (3, 4, 6, 3),
) -> nn.Module:
    """ResNet-50 for small images, or a narrower or shallower one.

    With the defaults this is the network of Madry et al. and RobustBench (23.52 million
    parameters at 10 classes), and takes their state dicts. ImageNet's is `timm:resnet50`.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        width: Channels inside the blocks of the first stage; each further stage doubles them.
        blocks: Blocks per stage.

    Returns:
        The model; takes normalised images.

    Raises:
        UserError: If an option is out of range.
    """
    sizes = _sizes("resnet50", width, blocks)
    return ResNet(num_classes=num_classes, in_channels=in_channels, bottleneck=True, **sizes)


def _sizes(name: str, width: object, blocks: object) -> dict[str, Any]:
    """The width and the blocks per stage, if they can be."""
    if not isinstance(blocks, Sequence) or isinstance(blocks, str) or not blocks:
        raise UserError(
            f"{name}: the option blocks must list the number of blocks per stage, such as "
            f"[2, 2, 2, 2], got {blocks!r}."
        )
    return {
        "width": positive(name, "width", width),
        "blocks": [positive(name, "blocks", n) for n in blocks],
    }
