"""Owns how the examples of a measurement are read: into tensors, the classes mixed evenly."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from robustflat.data import mixed
from robustflat.errors import UserError

_log = logging.getLogger("robustflat.flatness")
Data = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]


def read_examples(data: Data, limit: int | None = None) -> tuple[Tensor, Tensor, int]:
    """The images and labels of ``data`` in a fixed order that depends on the labels alone.

    In it every class keeps its share of the first so many examples and of every chunk, whatever
    the order of the data (see ``robustflat.data.mixed``).

    Args:
        data: images ``[N, ...]`` and labels, or a loader of such batches whose order and images
            are the same each time that it is read.
        limit: take only so many.

    Returns:
        Images, floating; labels, int64 ``[N]`` or soft ``[N, C]``; and how many images ``data``
        has in all.

    Raises:
        UserError: if there are no examples, they do not fit together, or the loader shuffles,
            augments or can be read only once.
    """
    if limit is not None and limit < 1:
        raise UserError(f"A measurement needs examples >= 1, got {limit}.")
    pair = _pair(data)
    y = _labels_of(data) if pair is None else pair[1]
    images = len(y) if pair is None else len(pair[0])
    if len(y) == 0 or len(y) != images:
        raise UserError(
            f"A measurement needs as many labels as images and at least one of each, got {images} "
            f"images and {len(y)} labels."
        )
    chosen = _order(y)[:limit]
    x = _images_of(data, y, chosen) if pair is None else pair[0][chosen.to(pair[0].device)]
    x, y = x.detach(), y[chosen.to(y.device)].detach()
    if not x.is_floating_point():
        raise UserError(
            f"Images must be floating-point numbers in [0, 1], got {x.dtype}. Convert them, for "
            "bytes by x.float() / 255."
        )
    low, high = float(x.min()), float(x.max())
    if low < 0 or high > 1:
        _log.warning(
            "The images are in [%.4g, %.4g]: every eps is in units of [0, 1], which attacks also "
            "clip to. Put the normalisation into the model (robustflat.models.Normalized).",
            low, high,
        )  # fmt: skip
    if y.is_floating_point() and y.ndim == 2:
        sums = y.double().sum(1)
        if y.min() < 0 or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
            raise UserError(
                "Soft labels must be probabilities that sum to 1 for every image, got sums from "
                f"{float(sums.min()):.4g} to {float(sums.max()):.4g} and a least entry of "
                f"{float(y.min()):.4g}."
            )
    return x, y if y.is_floating_point() else y.long(), images


def _pair(data: Any) -> tuple[Tensor, Tensor] | None:
    """Tensors of images and labels, if ``data`` is that; a list may hold two batches instead."""
    if isinstance(data, tuple | list) and len(data) == 2:
        x, y = data
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x, y
    return None


def _order(y: Tensor) -> Tensor:
    labels = y.detach().cpu()
    if labels.is_floating_point() or labels.ndim != 1:
        labels = labels.flatten(1).argmax(1) if labels.ndim > 1 else labels
    return mixed(labels, seed=0)


def _batches(data: Any) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(data, Iterator):
        raise UserError(
            "The data is an iterator, which can be read only once: the order and the images of a "
            "second measurement could not be the same. Pass tensors (x, y), a list of batches or "
            "a loader."
        )
    try:
        batches = iter(data)
    except TypeError:
        raise UserError(
            f"The data must be tensors (x, y) or a loader of such batches, got "
            f"{type(data).__name__}."
        ) from None
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise UserError(
                "Every batch of the loader must be a pair of images and labels, got "
                f"{type(batch).__name__}."
            )
        yield batch[0], batch[1]


def _labels_of(data: Any) -> Tensor:
    labels = [y for _, y in _batches(data)]
    if not labels:
        raise UserError("The loader is empty: a measurement needs at least one example.")
    return torch.cat(labels)


def _images_of(data: Any, labels: Tensor, chosen: Tensor) -> Tensor:
    """The images at some positions, read a second time: only they are held."""
    place = torch.full((len(labels),), -1)
    place[chosen] = torch.arange(len(chosen))
    found: list[tuple[Tensor, Tensor]] = []
    first = next(_batches(data))
    start = 0
    for x, y in _batches(data):
        same = torch.equal(y, labels[start : start + len(y)])
        if not same or (start == 0 and not torch.equal(x, first[0])):
            raise UserError(
                "The loader gave different batches when read twice: it shuffles or augments. "
                "Flatness is measured on fixed images, or two models could not be compared. Use "
                "shuffle=False and no random augmentation."
            )
        here = place[start : start + len(y)]
        found.append((here[here >= 0], x[(here >= 0).to(x.device)]))
        start += len(y)
    order = torch.argsort(torch.cat([where for where, _ in found]))
    images = torch.cat([x for _, x in found])
    return images[order.to(images.device)]
