"""Published networks for small images, written out with functions of their public state dicts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def norm(p: State, name: str, h: Tensor) -> Tensor:
    """BatchNorm in eval mode, from its definition."""
    mean, var, w, b = (
        p[f"{name}.{key}"][:, None, None]
        for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (h - mean) / (var + 1e-5).sqrt() * w + b


def head(p: State, name: str, h: Tensor) -> Tensor:
    return h.mean((2, 3)) @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def resnet(p: State, x: Tensor, blocks: tuple[int, ...], convolutions: int) -> Tensor:
    """He et al. 2016, with the 3x3 stem of small images; two or three convolutions a block."""
    h = norm(p, "bn1", F.conv2d(x, p["conv1.weight"], padding=1)).relu()
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            at = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            side = h
            if f"{at}.shortcut.0.weight" in p:
                side = F.conv2d(h, p[f"{at}.shortcut.0.weight"], stride=stride)
                side = norm(p, f"{at}.shortcut.1", side)
            # The stride is that of the block's first 3x3 convolution.
            strides = {2: (stride, 1), 3: (1, stride, 1)}[convolutions]
            for i, step in enumerate(strides, 1):
                weight = p[f"{at}.conv{i}.weight"]
                h = F.conv2d(h, weight, stride=step, padding=weight.shape[-1] // 2)
                h = norm(p, f"{at}.bn{i}", h)
                h = h.relu() if i < convolutions else (h + side).relu()
    return head(p, "linear", h)


def gowal_preact(p: State, x: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Gowal et al. 2020: SiLU, shortcuts of 3x3, padding after where the stride is 2."""

    def silu(h: Tensor) -> Tensor:
        return h * torch.sigmoid(h)

    h = F.conv2d(x, p["conv_2d.weight"], padding=1)
    for stage, count in enumerate(blocks):
        for block in range(count):
            at = f"layer_{stage}.{block}"
            stride = 2 if stage and not block else 1
            around = (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1)
            side = h
            if f"{at}.shortcut.weight" in p:
                side = F.conv2d(F.pad(h, around), p[f"{at}.shortcut.weight"], stride=stride)
            a = F.pad(silu(norm(p, f"{at}.batchnorm_0", h)), around)
            a = silu(norm(p, f"{at}.batchnorm_1", F.conv2d(a, p[f"{at}.conv_2d_1.weight"],
                                                           stride=stride)))  # fmt: skip
            h = F.conv2d(a, p[f"{at}.conv_2d_2.weight"], padding=1) + side
    return head(p, "logits", silu(norm(p, "batchnorm", h)))


def _norm(channels: int, generator: torch.Generator) -> State:
    draw = {key: torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5
            for key in ("weight", "bias", "running_mean", "running_var")}  # fmt: skip
    return draw | {"num_batches_tracked": torch.tensor(3)}


class Drawn:
    """A state dict whose entries are drawn in the order in which they are asked for."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.state: State = {}

    def norm(self, name: str, channels: int) -> None:
        draw = _norm(channels, self.generator)
        self.state |= {f"{name}.{key}": value for key, value in draw.items()}

    def weight(self, name: str, *shape: int) -> None:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        self.state[f"{name}.weight"] = drawn / drawn[0].numel() ** 0.5

    def linear(self, name: str, classes: int, channels: int) -> None:
        self.weight(name, classes, channels)
        self.state[f"{name}.bias"] = torch.zeros(classes, dtype=torch.float64)


def resnet_state(width: int, blocks: tuple[int, ...], convolutions: int, classes: int) -> State:
    """A state dict of `resnet` with public names."""
    drawn = Drawn(0)
    drawn.weight("conv1", width, 3, 3, 3)
    drawn.norm("bn1", width)
    channels = width
    for stage, count in enumerate(blocks, 1):
        inside = width * 2 ** (stage - 1)
        out = inside * (1 if convolutions == 2 else 4)
        for block in range(count):
            at = f"layer{stage}.{block}"
            shapes = {
                2: [(inside, channels, 3), (inside, inside, 3)],
                3: [(inside, channels, 1), (inside, inside, 3), (out, inside, 1)],
            }[convolutions]
            for i, (o, c, side) in enumerate(shapes, 1):
                drawn.weight(f"{at}.conv{i}", o, c, side, side)
                drawn.norm(f"{at}.bn{i}", o)
            if channels != out or (stage > 1 and block == 0):
                drawn.weight(f"{at}.shortcut.0", out, channels, 1, 1)
                drawn.norm(f"{at}.shortcut.1", out)
            channels = out
    drawn.linear("linear", classes, channels)
    return drawn.state


def gowal_preact_state(width: int, blocks: tuple[int, ...], classes: int) -> State:
    """A state dict of `gowal_preact` with public names."""
    drawn = Drawn(1)
    drawn.weight("conv_2d", width, 3, 3, 3)
    channels = width
    for stage, count in enumerate(blocks):
        out = width * 2**stage
        for block in range(count):
            at = f"layer_{stage}.{block}"
            drawn.norm(f"{at}.batchnorm_0", channels)
            drawn.weight(f"{at}.conv_2d_1", out, channels, 3, 3)
            drawn.norm(f"{at}.batchnorm_1", out)
            drawn.weight(f"{at}.conv_2d_2", out, out, 3, 3)
            if channels != out:
                drawn.weight(f"{at}.shortcut", out, channels, 3, 3)
            channels = out
    drawn.norm("batchnorm", channels)
    drawn.linear("logits", classes, channels)
    return drawn.state
