"""Owns the choice of examples: stratified splits and class-balanced subsets, by seed alone."""

from __future__ import annotations

import torch
from torch import Tensor

from robustflat.data.seeding import generator_for
from robustflat.errors import UserError

# Keeps the streams of different choices made with one seed apart.
_PROPORTIONAL, _BALANCED, _MIXED = 1, 2, 3


def proportional(labels: Tensor, count: int, *, seed: int) -> Tensor:
    """Choose examples so that every class keeps its share.

    Each class gets the whole part of its exact quota `count * n_c / n`; the seats left go to the
    largest remainders (Hamilton's method; ties to the lower class). So no class is more than one
    example away from its quota.

    Args:
        labels: int64, [N].
        count: How many to choose.
        seed: Which ones.

    Returns:
        Positions, int64 [count], ascending.

    Raises:
        UserError: If there are not that many.
    """
    _enough(labels, count)
    sizes = torch.bincount(labels)
    # Whole-number arithmetic, so that ties are ties.
    quota = sizes * count // max(len(labels), 1)
    remainder = sizes * count % max(len(labels), 1)
    left = count - int(quota.sum())
    quota[torch.argsort(remainder, descending=True, stable=True)[:left]] += 1
    return _choose(labels, quota, generator_for(_PROPORTIONAL, seed))


def balanced(labels: Tensor, count: int, *, seed: int) -> Tensor:
    """Choose equally many examples of every class, as far as the classes reach.

    A class that has fewer gives all it has, and the others share what is left over. Where the
    number does not divide, the classes that give one more are drawn by the seed.

    Args:
        labels: int64, [N].
        count: How many to choose.
        seed: Which ones.

    Returns:
        Positions, int64 [count], ascending.

    Raises:
        UserError: If there are not that many.
    """
    _enough(labels, count)
    generator = generator_for(_BALANCED, seed)
    sizes = torch.bincount(labels)
    quota = torch.zeros_like(sizes)
    left = count
    while left:
        open_classes = torch.nonzero(quota < sizes).flatten()
        share = left // len(open_classes)
        if share:
            add = torch.minimum(sizes[open_classes] - quota[open_classes], torch.tensor(share))
            quota[open_classes] += add
            left -= int(add.sum())
        else:
            chosen = open_classes[torch.randperm(len(open_classes), generator=generator)[:left]]
            quota[chosen] += 1
            left = 0
    return _choose(labels, quota, generator)


def mixed(labels: Tensor, *, seed: int) -> Tensor:
    """An order in which every stretch of examples has the classes in their shares.

    The members of a class, shuffled, stand at equal distances with a random offset: a stretch that
    is the share t of all holds t n_c of class c, give or take two.

    Args:
        labels: int64, [N].
        seed: Which order.

    Returns:
        Positions, int64 [N], each once.
    """
    generator = generator_for(_MIXED, seed)
    order = torch.randperm(len(labels), generator=generator)
    _, classes, sizes = labels[order].unique(return_inverse=True, return_counts=True)
    offset = torch.rand(len(sizes), generator=generator, dtype=torch.float64)
    by_class = torch.argsort(classes, stable=True)
    rank = torch.empty_like(order)
    rank[by_class] = torch.arange(len(order)) - torch.repeat_interleave(
        sizes.cumsum(0) - sizes, sizes
    )
    return order[torch.argsort((rank + offset[classes]) / sizes[classes], stable=True)]


def without(total: int, indices: Tensor) -> Tensor:
    """The positions that were not chosen.

    Args:
        total: How many positions there are.
        indices: Those chosen, int64 [M].

    Returns:
        The others, int64 [total - M], ascending.
    """
    keep = torch.ones(total, dtype=torch.bool)
    keep[indices] = False
    return torch.nonzero(keep).flatten()


def _choose(labels: Tensor, quota: Tensor, generator: torch.Generator) -> Tensor:
    """`quota[c]` random positions of every class c, ascending."""
    order = torch.randperm(len(labels), generator=generator)
    # Group the shuffled positions by class, then take each group's first ones.
    order = order[torch.argsort(labels[order], stable=True)]
    sizes = torch.bincount(labels, minlength=len(quota))
    starts = torch.cumsum(sizes, 0) - sizes
    rank = torch.arange(len(labels)) - torch.repeat_interleave(starts, sizes)
    return torch.sort(order[rank < torch.repeat_interleave(quota, sizes)]).values


def _enough(labels: Tensor, count: int) -> None:
    """Refuse to choose more than there are."""
    if not 0 <= count <= len(labels):
        raise UserError(f"Asked for {count} examples of {len(labels)}.")
