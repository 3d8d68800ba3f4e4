"""Owns what is evaluated: checked images and labels, the choice of them, read when needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robustflat.data import balanced
from robustflat.data.images import to_float
from robustflat.errors import UserError

Data = Any  # a pair (x, y), an iterable of such pairs, or a split with .tensors()


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Images and labels of which a few are asked for at a time.

    Attributes:
        labels: int64 [N].
        positions: Where each stands in the data, int64 [N].
        shape: Of an image: channels, height, width.
        all_labels: Also of the examples that were not chosen.
        read: From positions, int64 [M], to images as `images` gives them.
        samples: How many were asked for, before they were split; None: all.
        shard: Which part of those they are, "i/n"; None: the whole.
    """

    labels: Tensor
    positions: Tensor
    shape: tuple[int, int, int]
    all_labels: Tensor
    read: Callable[[Tensor], Tensor]
    samples: int | None = None
    shard: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, positions: Tensor) -> Tensor:
        """Images, float32 [M, C, H, W] in [0, 1], contiguous (AutoAttack asks for it), on the CPU.

        Args:
            positions: int64 [M].
        """
        return self.read(positions).contiguous(memory_format=torch.contiguous_format)

    def part(self, places: Tensor) -> Examples:
        """Those at some places, int64 [M]."""
        return replace(
            self,
            labels=self.labels[places],
            positions=self.positions[places],
            read=lambda positions: self.read(places[positions]),
        )


def choose(data: Data, samples: int | None = None, shard: str | None = None) -> Examples:
    """The examples to evaluate; of a split of a data set, images are read when they are needed.

    `samples` takes `robustflat.data.balanced(labels, samples, seed=0)`: equally many of every
    class, always the same ones, in ascending order. The shard "i/n" takes every n-th of them,
    beginning with the i-th.

    Args:
        data: `(x, y)`, a loader of such batches, a TensorDataset, or a split of a data set
            (`data.test`); what was chosen already stays as it is.
        samples: How many, or None for all.
        shard: "i/n" with 1 <= i <= n, or None for all.

    Raises:
        UserError: If they are not images in [0, 1] with one class each, or there are not so many.
    """
    if isinstance(data, Examples):
        return data
    if callable(getattr(data, "fetch", None)) and isinstance(data.labels, Tensor):
        labels, shape = _labels(data.labels, len(data)), data.shape

        def read(positions: Tensor) -> Tensor:
            return to_float(data.fetch(positions)).cpu()
    else:
        x, labels = _tensors(data)
        shape = x.shape[1:]

        def read(positions: Tensor) -> Tensor:
            return x[positions]

    at = _positions(labels, samples, shard)
    samples = None if samples == len(labels) else samples  # all of them are the whole
    return Examples(
        labels=labels[at],
        positions=at,
        shape=shape,
        all_labels=labels,
        read=lambda positions: read(at[positions]),
        samples=samples,
        shard=shard,
    )


def _tensors(data: Data) -> tuple[Tensor, Tensor]:
    """Images and labels, checked, on the CPU."""
    # A tuple in torch's TensorDataset.
    data = getattr(data, "tensors", data)
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor):
        x, y = data
    else:
        x, y = _collected(data)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise UserError(
            f"Data must be tensors of images and labels, got {type(x).__name__} and "
            f"{type(y).__name__}."
        )
    return _images(x), _labels(y, len(x))


def _collected(loader: Data) -> tuple[Tensor, Tensor]:
    if not isinstance(loader, Iterable):
        raise UserError(
            f"Data must be a pair (x, y) of tensors or a loader of such pairs, got "
            f"{type(loader).__name__}."
        )
    xs, ys = [], []
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise UserError(
                f"A loader must yield pairs (images, labels), this one yields "
                f"{type(batch).__name__}."
            )
        xs.append(torch.as_tensor(batch[0]).cpu())
        ys.append(torch.as_tensor(batch[1]).cpu())
    if not xs:
        raise UserError("There is nothing to evaluate: the loader is empty.")
    try:
        return torch.cat(xs), torch.cat(ys)
    except RuntimeError as error:
        raise UserError(f"The loader's batches do not fit together: {error}.") from error


def _images(x: Tensor) -> Tensor:
    if x.ndim != 4:
        raise UserError(
            f"Images must have four dimensions [N, C, H, W], got the shape {list(x.shape)}. "
            "Give vectors as [N, D, 1, 1]."
        )
    if not x.is_floating_point():
        raise UserError(
            f"Images must be floating point in [0, 1], got {x.dtype}. Divide bytes by 255."
        )
    if x.numel() == 0:
        raise UserError(f"There is nothing to evaluate: the images have the shape {list(x.shape)}.")
    x = x.detach().to("cpu", torch.float32)
    low, high = float(x.min()), float(x.max())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"Images must be in [0, 1], these are in [{low:.4g}, {high:.4g}]. Every eps is in "
            "image units: do not normalise the data, put the normalisation into the model "
            "(robustflat.models.Normalized)."
        )
    # A copy where it was made in inference mode, which lets no gradient pass.
    return x.clone() if x.is_inference() else x


def _labels(y: Tensor, count: int) -> Tensor:
    if y.shape != (count,):
        raise UserError(
            f"Labels must be one class per image, shape [{count}], got {list(y.shape)}."
        )
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise UserError(f"Labels must be whole numbers, got {y.dtype}.")
    y = y.detach().to("cpu", torch.int64).clone()
    if int(y.min()) < 0:
        raise UserError(f"Labels must not be negative, got {int(y.min())}.")
    return y


def _positions(labels: Tensor, samples: int | None, shard: str | None) -> Tensor:
    """Positions of the examples to evaluate, int64 [M], ascending."""
    if samples is None:
        indices = torch.arange(len(labels))
    elif not 1 <= samples <= len(labels):
        raise UserError(f"Asked for {samples} samples of {len(labels)}; choose from 1 to that.")
    else:
        indices = balanced(labels, samples, seed=0)
    if shard is None:
        return indices
    part, parts = parse_shard(shard)
    if parts > len(indices):
        raise UserError(f"{len(indices)} examples cannot be split into {parts} shards.")
    return indices[part - 1 :: parts]


def parse_shard(shard: str) -> tuple[int, int]:
    """The numbers i and n of a shard "i/n".

    Raises:
        UserError: If it is not written like that, or i is not from 1 to n.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"A shard is written i/n with i from 1 to n, such as 1/4, got {shard!r}.")
    return int(match[1]), int(match[2])
