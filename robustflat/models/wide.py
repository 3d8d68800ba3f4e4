"""Owns WideResNet, with ReLU or SiLU, named as in public code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.models.resnet import conv3x3
from robustflat.models.small import positive


class WideBlock(nn.Module):
    """The basic wide block (Zagoruyko & Komodakis 2016), with dropout between convolutions.

    Args:
        channels: Input channels.
        out: Output channels.
        stride: Stride of the first convolution.
        dropout: Probability that an activation is dropped.
        silu: As Gowal et al. 2020: with SiLU in place of ReLU, and padding on the right and below
            only where the stride is 2, as JAX's "SAME" does.
    """

    def __init__(self, channels: int, out: int, stride: int, dropout: float, silu: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv3x3(channels, out, stride)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = conv3x3(out, out)
        self.dropout = dropout
        self.silu = silu
        self.pad_after = silu and stride == 2
        if self.pad_after:
            self.conv1.padding = (0, 0)
        self.convShortcut: nn.Module | None = None
        if channels != out:
            self.convShortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: Features, [N, channels, H, W].

        Returns:
            Features, [N, out, H / stride, W / stride].
        """
        h = _activated(self.bn1(x), self.silu)
        short: Tensor = x if self.convShortcut is None else self.convShortcut(h)
        if self.pad_after:
            h = F.pad(h, (0, 1, 0, 1))
        h = _activated(self.bn2(self.conv1(h)), self.silu)
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        out: Tensor = self.conv2(h) + short
        return out


class WideGroup(nn.Module):
    """A stage of wide blocks, under the name `layer` that public state dicts use.

    Args:
        blocks: The blocks in order.
    """

    def __init__(self, blocks: Sequence[WideBlock]) -> None:
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks.

        Args:
            x: Features, [N, channels, H, W].

        Returns:
            Features, [N, out, H / stride, W / stride].
        """
        h: Tensor = self.layer(x)
        return h


class WideResNet(nn.Module):
    """WideResNet-depth-widen for small images.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        blocks: Blocks in each of the three stages.
        widen: Factor on the widths 16, 32, 64.
        dropout: Probability that an activation inside a block is dropped.
        silu: See `WideBlock`.
    """

    # TRADES' released network registers a copy of its first stage that it never runs, so the
    # public checkpoints made with that code carry these keys.
    unused_keys = ("sub_block1.",)
    # The names of Gowal et al. 2020 and of all that build on their network, and ours.
    public_keys = (
        ("init_conv.", "conv1."),
        ("layer.0.block.", "block1.layer."),
        ("layer.1.block.", "block2.layer."),
        ("layer.2.block.", "block3.layer."),
        ("batchnorm_0.", "bn1."),
        ("batchnorm_1.", "bn2."),
        ("conv_0.", "conv1."),
        ("conv_1.", "conv2."),
        (".shortcut.", ".convShortcut."),
        ("batchnorm.", "bn1."),
        ("logits.", "fc."),
    )

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        blocks: int,
        widen: int,
        dropout: float = 0.0,
        silu: bool = False,
    ) -> None:
        super().__init__()
        self.silu = silu
        widths = [16, 16 * widen, 32 * widen, 64 * widen]

        def group(stage: int, stride: int) -> WideGroup:
            kind = (dropout, silu)
            first = WideBlock(widths[stage - 1], widths[stage], stride, *kind)
            rest = [WideBlock(widths[stage], widths[stage], 1, *kind) for _ in range(blocks - 1)]
            return WideGroup([first, *rest])

        self.conv1 = conv3x3(in_channels, widths[0])
        self.block1 = group(1, 1)
        self.block2 = group(2, 2)
        self.block3 = group(3, 2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Classify a batch.

        Args:
            x: Images, [N, C, H, W].

        Returns:
            Logits, [N, classes].
        """
        h = self.block3(self.block2(self.block1(self.conv1(x))))
        h = _activated(self.bn1(h), self.silu)
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(h, 1).flatten(1))
        return logits


def _activated(h: Tensor, silu: bool) -> Tensor:
    return F.silu(h) if silu else F.relu(h, inplace=True)


def wide_resnet(
    *,
    num_classes: int,
    in_channels: int,
    depth: int = 34,
    widen: int = 10,
    dropout: float = 0.0,
) -> nn.Module:
    """WideResNet-depth-widen; WRN-34-10 by default (46,160,474 parameters at 10 classes).

    Takes the state dicts of TRADES, MART, Rice et al. and Wu et al. Also called `wrn-34-10`, or
    `wrn-DEPTH-WIDEN` in general.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        depth: Number of layers, 6 n + 4.
        widen: Factor on the widths 16, 32, 64.
        dropout: Probability that an activation inside a block is dropped, in [0, 1).

    Returns:
        The model; takes normalised images.

    Raises:
        UserError: If an option is out of range.
    """
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise UserError(
            f"wide_resnet: the option dropout must be at least 0 and below 1, got {dropout!r}."
        )
    return WideResNet(
        num_classes=num_classes,
        in_channels=in_channels,
        blocks=_blocks("wide_resnet", depth),
        widen=positive("wide_resnet", "widen", widen),
        dropout=float(dropout),
    )


def wide_resnet_silu(
    *, num_classes: int, in_channels: int, depth: int = 28, widen: int = 10
) -> nn.Module:
    """The WideResNet of Gowal et al. 2020; WRN-28-10 by default (36,479,194 parameters).

    With SiLU; with padding on the right and below where the stride is 2; with BatchNorm whose
    running statistics move by 0.01 a step. Takes the state dicts of Gowal et al. 2020, Rebuffi et
    al. 2021, Wang et al. 2023 and their successors. Also called `wrn-28-10-silu`, or
    `wrn-DEPTH-WIDEN-silu` in general.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        depth: Number of layers, 6 n + 4.
        widen: Factor on the widths 16, 32, 64.

    Returns:
        The model; takes normalised images.

    Raises:
        UserError: If an option is out of range.
    """
    model = WideResNet(
        num_classes=num_classes,
        in_channels=in_channels,
        blocks=_blocks("wide_resnet_silu", depth),
        widen=positive("wide_resnet_silu", "widen", widen),
        silu=True,
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.01
    return model


def _blocks(name: str, depth: int) -> int:
    """Blocks in each of three stages of a network of this depth."""
    positive(name, "depth", depth)
    if depth < 10 or (depth - 4) % 6:
        raise UserError(
            f"{name}: the option depth must be 6 n + 4 (10, 16, 22, 28, 34, ...), got {depth}."
        )
    return (depth - 4) // 6
