"""Owns how the examples of a measurement are read: once, into tensors, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from robustflat.errors import UserError

Data = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]


def read_examples(data: Data, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """The images and labels of ``data``, in its order.

    Args:
        data: images ``[N, ...]`` and labels, or a loader of such batches whose order and images
            are the same each time that it is read.
        limit: take only the first so many.

    Returns:
        Images, floating; labels, int64 ``[N]`` or soft ``[N, C]``.

    Raises:
        UserError: if there are no examples, they do not fit together, or the loader shuffles,
            augments or can be read only once.
    """
    if limit is not None and limit < 1:
        raise UserError(f"A measurement needs examples >= 1, got {limit}.")
    x, y = _pair(data) or _read_loader(data, limit)
    x, y = x[:limit].detach(), y[:limit].detach()
    if len(x) == 0 or len(x) != len(y):
        raise UserError(
            f"A measurement needs as many labels as images and at least one of each, got {len(x)} "
            f"images and {len(y)} labels."
        )
    if not x.is_floating_point():
        raise UserError(
            f"Images must be floating-point numbers in [0, 1], got {x.dtype}. Convert them, for "
            "bytes by x.float() / 255."
        )
    return x, y if y.is_floating_point() else y.long()


def _pair(data: Any) -> tuple[Tensor, Tensor] | None:
    """Tensors of images and labels, if ``data`` is that; a list may hold two batches instead."""
    if isinstance(data, tuple | list) and len(data) == 2:
        x, y = data
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x, y
    return None


def _read_loader(data: Any, limit: int | None) -> tuple[Tensor, Tensor]:
    if isinstance(data, Iterator):
        raise UserError(
            "The data is an iterator, which can be read only once: the order and the images of a "
            "second measurement could not be the same. Pass tensors (x, y), a list of batches or "
            "a loader."
        )
    try:
        first = next(iter(data), None)
    except TypeError:
        raise UserError(
            f"The data must be tensors (x, y) or a loader of such batches, got "
            f"{type(data).__name__}."
        ) from None
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in data:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise UserError(
                "Every batch of the loader must be a pair of images and labels, got "
                f"{type(batch).__name__}."
            )
        if not images:
            _check_same(first, batch)
        images.append(batch[0])
        labels.append(batch[1])
        if limit is not None and sum(map(len, images)) >= limit:
            break
    if not images:
        raise UserError("The loader is empty: a measurement needs at least one example.")
    return torch.cat(images), torch.cat(labels)


def _check_same(first: Any, again: Any) -> None:
    """Refuse a loader whose first batch differs between two readings."""
    if all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
        return
    raise UserError(
        "The loader gave two different first batches when read twice: it shuffles or augments. "
        "Flatness is measured on fixed images, or two models could not be compared. Use "
        "shuffle=False and no random augmentation."
    )
