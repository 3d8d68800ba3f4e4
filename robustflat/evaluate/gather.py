"""Owns what is evaluated: data as checked float32 tensors, the subset and the shard of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from robustflat.data import balanced
from robustflat.errors import UserError

Examples = Any  # a pair (x, y), an iterable of such pairs, or a split with .tensors()


def tensors(data: Examples) -> tuple[Tensor, Tensor]:
    """Data as tensors that attacks can work on.

    Args:
        data: `(x, y)`, a loader of such batches, a TensorDataset, or a split of a
            data set (`data.test`).

    Returns:
        Images, float32 [N, C, H, W], contiguous, in [0, 1]; labels int64 [N]; both on the CPU.

    Raises:
        UserError: If they are not images in [0, 1] with one class each.
    """
    if hasattr(data, "tensors"):
        # A method of the package's splits, a tuple in torch's TensorDataset.
        data = data.tensors() if callable(data.tensors) else data.tensors
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


def _collected(loader: Examples) -> tuple[Tensor, Tensor]:
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
    # A copy, also because it may have been made in inference mode.
    return x.clone(memory_format=torch.contiguous_format)


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


def prepared(
    data: Examples, samples: int | None, shard: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The examples to evaluate; of a split of a data set, only these are read.

    Args:
        data: As for `tensors`.
        samples: As for `chosen`.
        shard: As for `chosen`.

    Returns:
        Images and labels as from `tensors`, and the labels of all examples, chosen or not.

    Raises:
        UserError: If the data cannot be used, or not so many.
    """
    if callable(getattr(data, "subset", None)) and isinstance(data.labels, Tensor):
        labels = _labels(data.labels, len(data))
        x, y = tensors(data.subset(chosen(labels, samples, shard)))
        return x, y, labels
    x, labels = tensors(data)
    indices = chosen(labels, samples, shard)
    return x[indices], labels[indices], labels


def chosen(labels: Tensor, samples: int | None, shard: str | None) -> Tensor:
    """Positions of the examples to evaluate.

    `samples` takes `robustflat.data.balanced(labels, samples, seed=0)`: equally many of every
    class, always the same ones, in ascending order. The shard "i/n" takes every n-th of them,
    beginning with the i-th.

    Args:
        labels: All labels, int64 [N].
        samples: How many, or None for all.
        shard: "i/n" with 1 <= i <= n, or None for all.

    Returns:
        int64 [M], ascending.

    Raises:
        UserError: If there are not that many, or the shard is not one.
    """
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
