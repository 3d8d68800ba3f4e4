"""Owns the order of an epoch: which images form which batch, on which process, augmented how."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from robustflat.data.augment import Augment
from robustflat.data.images import Images, moved, to_float
from robustflat.data.seeding import generator_for
from robustflat.errors import UserError

# Keep the streams of the epoch's order and of its batches apart.
_ORDER, _BATCH = 11, 12
_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Extra labelled images (generated, or with pseudo-labels) in every training batch.

    As in the released sampler of RST (Carmon et al. 2019) and its successors: a batch of B images
    has `round(fraction B)` extra ones (the released code rounds down), drawn uniformly with
    replacement from all of them, and the rest from the labelled set, without replacement. An epoch
    of N labelled images has as many batches as without extra data, `N / B`, so schedules in epochs
    keep their cost, and shows a share `1 - fraction` of the labelled images, others each epoch.
    Where the labelled images run out, the batch is filled up with extra ones.

    Attributes:
        images: The extra images, of the labelled ones' shape.
        fraction: Share of each batch, in (0, 1).
    """

    images: Images
    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise UserError(
                f"The fraction of extra images per batch must lie between 0 and 1 (both "
                f"excluded), got {self.fraction}."
            )
        if len(self.images) == 0:
            raise UserError("The extra data set is empty.")

    def labelled_size(self, batch_size: int) -> int:
        """How many labelled images a batch has.

        Args:
            batch_size: All images of the batch.

        Returns:
            The number of labelled ones.

        Raises:
            UserError: If none would be left.
        """
        size = batch_size - round(self.fraction * batch_size)
        if size < 1:
            raise UserError(
                f"A batch of {batch_size} with a fraction {self.fraction} of extra images has no "
                "labelled image left. Take a larger batch or a smaller fraction."
            )
        return size


def batch_count(
    size: int,
    batch_size: int,
    *,
    drop_last: bool = False,
    world: int = 1,
    extra: Extra | None = None,
) -> int:
    """How many batches `batches` yields without `skip`, on every process.

    Args:
        size: Number of (labelled) images.
        batch_size: Images per batch, of all processes together.
        drop_last: Whether an incomplete last batch is left out.
        world: Number of processes, which divides the batch size.
        extra: Extra images in the batches.

    Returns:
        The number of batches.

    Raises:
        UserError: If there would be none.
    """
    if batch_size < 1:
        raise UserError(f"The batch size must be at least 1, got {batch_size}.")
    if batch_size % world:
        near = max(round(batch_size / world), 1) * world
        raise UserError(
            f"The batch size {batch_size} is that of all processes together, and {world} cannot "
            f"share it evenly. Take a multiple of {world}, such as {near}."
        )
    if extra is not None:
        extra.labelled_size(batch_size)
    count = size // batch_size if drop_last else -(-size // batch_size)
    if count < 1:
        raise UserError(
            f"There is not one full batch: {size} images with batches of {batch_size}. Take a "
            "smaller batch size."
        )
    return count


def share(
    size: int,
    batch_size: int,
    k: int,
    *,
    rank: int,
    world: int,
    extra: Extra | None = None,
) -> float:
    """What the mean over this process's rows of batch k counts in the mean of all processes' means.

    Args:
        size: Number of (labelled) images.
        batch_size: Images per batch, of all processes together.
        k: The batch.
        rank: This process.
        world: Number of processes.
        extra: Extra images in the batches, which fill every one up.

    Returns:
        ``world`` times this process's part of the rows; 1 where all have equally many.
    """
    together = batch_size if extra else max(min(size - k * batch_size, batch_size), world)
    return world * len(range(rank, together, world)) / together


def batches(
    images: Images,
    batch_size: int,
    *,
    device: torch.device | str,
    order: int | None = None,
    augment: Augment | None = None,
    drop_last: bool = False,
    rank: int = 0,
    world: int = 1,
    skip: int = 0,
    extra: Extra | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of batches.

    Batch k depends on the arguments, k and the rank alone, not on the batches made before it: so
    an epoch resumed with `skip` continues exactly, and skipped batches are not decoded. All
    choices are drawn on the CPU: they are the same on every device.

    With several processes, every batch is dealt out among them in turn, so that together they see
    what one process would (:func:`share` weights their means). Every process gets equally many
    batches: the images of an incomplete last one are dealt out as evenly as they go (sizes differ
    by one at most); only if there are fewer of them than processes are the first of the epoch's
    order used again, one for each process left empty.

    Args:
        images: The images.
        batch_size: Images per batch, of all processes together.
        device: Where the batches shall be.
        order: Seed of the shuffling (and of augmentation and extra images): pass another one each
            epoch. None keeps the images in their order (and draws as seed 0 does).
        augment: Random changes of the images.
        drop_last: Whether an incomplete last batch is left out.
        rank: This process, 0 to world - 1.
        world: Number of processes, which divides the batch size.
        skip: Number of leading batches to leave out.
        extra: Extra images in each batch, which then is shuffled, so that any slice of it is mixed.

    Returns:
        An iterator over float32 [B, C, H, W] in [0, 1] and int64 [B], on the device.

    Raises:
        UserError: If the numbers do not fit each other.
    """
    count = batch_count(len(images), batch_size, drop_last=drop_last, world=world, extra=extra)
    if not 0 <= rank < world:
        raise UserError(f"The rank must lie between 0 and {world - 1}, got {rank}.")
    if not 0 <= skip <= count:
        raise UserError(f"Cannot skip {skip} batches of an epoch of {count}.")
    if extra is not None and extra.images.shape != images.shape:
        raise UserError(
            f"The extra images have shape {extra.images.shape}, the labelled ones {images.shape}."
        )
    plan = _Plan(images, batch_size, torch.device(device), order, augment, rank, world, extra)
    return _produce(plan, range(skip, count))


class _Plan:
    """Everything that decides what batch k is."""

    def __init__(
        self,
        images: Images,
        batch_size: int,
        device: torch.device,
        order: int | None,
        augment: Augment | None,
        rank: int,
        world: int,
        extra: Extra | None,
    ) -> None:
        self.images = images
        self.own_size = batch_size // world
        self.labelled = batch_size if extra is None else extra.labelled_size(batch_size)
        self.device = device
        self.seed = 0 if order is None else order
        self.augment = augment
        self.rank = rank
        self.world = world
        self.extra = extra
        if order is None:
            self.sequence = torch.arange(len(images))
        else:
            self.sequence = torch.randperm(len(images), generator=generator_for(_ORDER, order))
        # Once an epoch, where the labels are: no batch needs a copy of its indices.
        self.sequence = moved(self.sequence, images.labels.device)

    @property
    def streamed(self) -> bool:
        """Whether any of the images are decoded from files."""
        return self.images.streamed or (self.extra is not None and self.extra.images.streamed)

    def indices(self, k: int) -> Tensor:
        """The labelled images of batch k on this process."""
        run = self.sequence[k * self.labelled : (k + 1) * self.labelled]
        if self.extra is None and len(run) < self.world:
            # More processes than images may need several rounds of the order.
            again = self.sequence.repeat(-(-self.world // len(self.sequence)))
            run = torch.cat([run, again[: self.world - len(run)]])
        return run[self.rank :: self.world]

    def fetch(self, k: int) -> tuple[Tensor, Tensor, torch.Generator]:
        """The uint8 images and labels of batch k, and the generator for what is still random."""
        generator = generator_for(_BATCH, self.seed, k, self.rank)
        indices = self.indices(k)
        x = self.images.fetch(indices)
        y = self.images.labels[indices]
        if self.extra is not None:
            other = self.extra.images
            drawn = torch.randint(len(other), (self.own_size - len(indices),), generator=generator)
            mixed = torch.randperm(self.own_size, generator=generator)
            more = other.labels[moved(drawn, other.labels.device)]
            x = torch.cat([x, moved(other.fetch(drawn), x.device)])[moved(mixed, x.device)]
            y = torch.cat([y, moved(more, y.device).long()])[moved(mixed, y.device)]
        return moved(x, self.device), moved(y, self.device), generator

    def finish(self, fetched: tuple[Tensor, Tensor, torch.Generator]) -> tuple[Tensor, Tensor]:
        """The batch, augmented on the device."""
        (x, y, generator) = fetched
        if self.augment is not None:
            x = self.augment(x, generator)
        return to_float(x), y


def _produce(plan: _Plan, numbers: range) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; files are decoded a little ahead, in a thread."""
    if not plan.streamed:
        for k in numbers:
            yield plan.finish(plan.fetch(k))
        return
    pool = ThreadPoolExecutor(1)
    waiting: deque[Future[tuple[Tensor, Tensor, torch.Generator]]] = deque()
    try:
        for k in numbers:
            waiting.append(pool.submit(plan.fetch, k))
            if len(waiting) > _AHEAD:
                yield plan.finish(waiting.popleft().result())
        while waiting:
            yield plan.finish(waiting.popleft().result())
    finally:
        pool.shutdown(cancel_futures=True)
