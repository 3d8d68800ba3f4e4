"""Owns the order of an epoch: which images form which batch, on which process, augmented how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from robustflat.data.images import Images, batch_of, moved, to_float
from robustflat.data.seeding import generator_for, seed_for
from robustflat.data.workers import in_workers
from robustflat.errors import UserError

# Of a batch of images, by a generator; one of single images has a method `of_image` as well.
Augmentation = Callable[[Tensor, torch.Generator], Tensor]
Fetched = tuple[Tensor, Tensor, Tensor]
# Keep the streams of the epoch's order, of its batches and of its images apart.
_ORDER, _BATCH, _IMAGE = 11, 12, 13


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
    augment: Augmentation | None = None,
    drop_last: bool = False,
    rank: int = 0,
    world: int = 1,
    skip: int = 0,
    extra: Extra | None = None,
    workers: int = 0,
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
        augment: Random changes of the images; of single ones if it has a method `of_image`.
        drop_last: Whether an incomplete last batch is left out.
        rank: This process, 0 to world - 1.
        world: Number of processes, which divides the batch size.
        skip: Number of leading batches to leave out.
        extra: Extra images in each batch, which then is shuffled, so that any slice of it is mixed.
        workers: Processes that decode, and augment single images, ahead; no batch depends on it.
            For images on a GPU, or that need neither, none is started.

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
    if not plan.wants_workers:
        workers = 0
    fetched = in_workers(plan.fetch, range(skip, count), workers, pinned=plan.device.type == "cuda")
    return map(plan.finish, fetched)


@dataclass(eq=False)
class _Plan:
    """Everything that decides what batch k is."""

    images: Images
    batch_size: int
    device: torch.device
    order: int | None
    augment: Augmentation | None
    rank: int
    world: int
    extra: Extra | None

    def __post_init__(self) -> None:
        size, extra, order = self.batch_size, self.extra, self.order
        self.own_size = size // self.world
        self.labelled = size if extra is None else extra.labelled_size(size)
        self.seed = 0 if order is None else order
        self.of_image = getattr(self.augment, "of_image", None)
        sequence = torch.arange(len(self.images))
        if order is not None:
            sequence = torch.randperm(len(sequence), generator=generator_for(_ORDER, order))
        # Once an epoch, where the labels are: no batch needs a copy of its indices.
        self.sequence = moved(sequence, self.images.labels.device)

    @property
    def wants_workers(self) -> bool:
        """Whether making a batch takes long, and can be done in another process."""
        parts = [self.images] if self.extra is None else [self.images, self.extra.images]
        slow = self.of_image is not None or any(images.streamed for images in parts)
        return slow and all(images.labels.device.type == "cpu" for images in parts)

    def indices(self, k: int) -> Tensor:
        """The labelled images of batch k on this process."""
        run = self.sequence[k * self.labelled : (k + 1) * self.labelled]
        if self.extra is None and len(run) < self.world:
            # More processes than images may need several rounds of the order.
            again = self.sequence.repeat(-(-self.world // len(self.sequence)))
            run = torch.cat([run, again[: self.world - len(run)]])
        return run[self.rank :: self.world]

    def fetch(self, k: int) -> Fetched:
        """The uint8 images and labels of batch k, and the state of what is still random."""
        generator = generator_for(_BATCH, self.seed, k, self.rank)
        indices = self.indices(k)
        x = self._images(self.images, indices, k, 0)
        y = self.images.labels[indices]
        if self.extra is not None:
            other = self.extra.images
            drawn = torch.randint(len(other), (self.own_size - len(indices),), generator=generator)
            mixed = torch.randperm(self.own_size, generator=generator)
            more = other.labels[moved(drawn, other.labels.device)]
            added = self._images(other, drawn, k, len(indices))
            x = torch.cat([x, moved(added, x.device)])[moved(mixed, x.device)]
            y = torch.cat([y, moved(more, y.device).long()])[moved(mixed, y.device)]
        return x, y, generator.get_state()

    def _images(self, images: Images, indices: Tensor, k: int, first: int) -> Tensor:
        """Images of batch k, of which this process has `first` already; each by its own seed."""
        if self.of_image is None:
            return images.fetch(indices)
        out = batch_of(len(indices), images.shape)
        for place, index in enumerate(indices.tolist()):
            # Of its place among all processes, so that their number does not matter.
            where = (first + place) * self.world + self.rank
            seed = seed_for(_IMAGE, self.seed, k, where)
            out[place] = self.of_image(images.raw(index), seed, images.shape)
        return out

    def finish(self, fetched: Fetched) -> tuple[Tensor, Tensor]:
        """The batch on the device, and augmented there unless image by image."""
        (x, y, state) = fetched
        x, y = moved(x, self.device), moved(y, self.device)
        if self.augment is not None and self.of_image is None:
            generator = torch.Generator()
            generator.set_state(state)
            x = self.augment(x, generator)
        return to_float(x), y
