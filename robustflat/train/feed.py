"""What each step of a run is fed: the batches of an epoch, mixed, laid out and on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

import robustflat.data as data
from robustflat.config import RunConfig
from robustflat.errors import UserError
from robustflat.perturb import InputPerturbation, Perturbation
from robustflat.perturb.displace import buffers_kept
from robustflat.train.parallel import Processes
from robustflat.train.randomness import derived_seed
from robustflat.train.step import Batch, TrainStep

# Batches that the statistics of an average are taken from.
_REFRESH = 100


class Feed:
    """The training images of a run, cut into steps.

    Every batch is a function of seed, epoch, step and rank, so an interrupted epoch goes on where
    it stood. A last batch too small for BatchNorm, or for a chunk of mSAM, is left out.

    Args:
        config: of the run.
        dataset: its images.
        device: where the batches shall be.
        processes: this process among those that train together.
        weights: the run's weight perturbation, which says how many batches of how many rows a step
            needs.

    Raises:
        UserError: if there is not one full batch, or the extra images cannot be used.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: data.Data,
        device: torch.device,
        processes: Processes,
        weights: Perturbation,
    ) -> None:
        self._config, self._device, self._rank = config, device, processes.rank
        self._augment = config.data.augment.build()
        extra = _extra_images(config, dataset)
        # Batches that are made in other processes are made on the host.
        away = hasattr(self._augment, "of_image") or (extra is not None and extra.images.streamed)
        place = "host" if away else config.data.place
        self._images = placed(dataset.train, place, device)
        if extra is not None:
            extra = replace(extra, images=placed(extra.images, place, device))
        asked = config.data.workers
        self._workers = data.usual_workers(processes.local_world) if asked is None else asked
        blank = torch.zeros(1, *dataset.shape, dtype=torch.uint8)
        self._augment(blank, torch.Generator())  # refuses what cannot fit
        self._classes = len(dataset.classes)
        self._together = weights.batches
        rest = len(self._images) % config.train.batch_size
        too_small = 0 < rest < processes.world * max(2, weights.least_rows)
        alone = len(self._images) == rest and extra is None
        share = config.train.batch_size // processes.world
        if weights.least_rows > share:
            raise UserError(
                f"weights.chunk is {weights.least_rows}, but each of {processes.world} processes "
                f"has {share} rows of a batch of {config.train.batch_size}, and a chunk is a part "
                "of them. Choose a smaller one."
            )
        if too_small and alone and weights.least_rows > 1:
            raise UserError(
                f"weights.chunk is {weights.least_rows}, but the {rest} training images make one "
                f"batch of {rest // processes.world}, and a chunk is a part "
                "of it. Choose a smaller one."
            )
        self._cut: dict[str, Any] = {
            "drop_last": too_small and len(self._images) > rest,
            "world": processes.world,
            "extra": extra,
        }
        self.steps_per_epoch = data.batch_count(
            len(self._images), config.train.batch_size, **self._cut
        )

    def share(self, step: int) -> float:
        """What this process's rows of a step count in the mean over all processes."""
        return data.share(
            len(self._images),
            self._config.train.batch_size,
            step,
            rank=self._rank,
            world=self._cut["world"],
            extra=self._cut["extra"],
        )

    def batches(self, epoch: int, step: int) -> Iterator[list[Batch]]:
        """The batches of every step of ``epoch`` from ``step`` on.

        A step has one batch, or several for n-SAM, the others drawn from orders of their own.
        """
        seed = self._config.seed
        orders = [derived_seed(seed, "order", epoch)]
        orders += [derived_seed(seed, "batches", epoch, i) for i in range(1, self._together)]
        streams = [
            data.batches(
                self._images,
                self._config.train.batch_size,
                device=self._device,
                order=order,
                augment=self._augment,
                skip=step,
                rank=self._rank,
                workers=self._workers,
                **self._cut,
            )
            for order in orders
        ]
        for at, together in enumerate(zip(*streams, strict=True), start=step):
            yield [self._finished(x, y, (epoch, at, i)) for i, (x, y) in enumerate(together)]

    def refresh_inputs(
        self, step: TrainStep, averaged: nn.Module, trained: nn.Module, epoch: int
    ) -> Iterator[Tensor]:
        """This process's share of what an epoch trains on, attacked at the ``averaged`` weights.

        At most 100 batches, which tell a mean and a variance well enough. The attack uses the
        statistics of its batch: the running ones are what is to be computed. One's own, which
        cannot be told so, attacks the ``trained`` network as it does in training.
        """
        attack: Callable[..., Tensor] | None = step.attack
        model = trained
        if isinstance(attack, InputPerturbation):
            attack, model = replace(attack, mode="batch"), averaged
        generator = torch.Generator(self._device)
        for at, ((x, y), *_) in enumerate(islice(self.batches(epoch, 0), _REFRESH)):
            if attack is None or step.objective.sees_clean:
                yield x
            if attack is not None:
                seed = derived_seed(self._config.seed, "attack", epoch, at, self._rank)
                generator.manual_seed(seed)
                with torch.enable_grad(), buffers_kept(model):
                    attacked = attack(model, x, y, generator=generator)
                yield attacked.detach()

    def _finished(self, x: Tensor, y: Tensor, where: tuple[int, ...]) -> Batch:
        mix = self._config.data.mix
        if mix is not None:
            mixing = data.mixup if mix.name == "mixup" else data.cutmix
            seed = derived_seed(self._config.seed, "mix", *where, self._rank)
            x, y = mixing(
                x,
                y,
                alpha=mix.alpha,
                num_classes=self._classes,
                generator=data.generator_for(seed),
            )
        if self._config.train.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, y


def placed(images: data.Images, place: str, device: torch.device) -> data.Images:
    """Images where they are kept during training, see ``data.place``."""
    if place == "host":
        return images
    if place == "auto" and device.type == "cuda" and isinstance(images, data.MemoryImages):
        free, _ = torch.cuda.mem_get_info(device)
        if 2 * images.pixels.nbytes > free:
            return images
    return images.to(device)


def _extra_images(config: RunConfig, dataset: data.Data) -> data.Extra | None:
    extra = config.data.extra
    if extra is None:
        return None
    images = data.load_extra(
        extra.path,
        shape=dataset.shape,
        num_classes=len(dataset.classes),
        samples=extra.samples,
        seed=config.seed,
    )
    return data.Extra(images=images, fraction=extra.fraction)
