"""Images a second of the feed of images in memory, beside torchvision's data set and a DataLoader.

    python scripts/benchmark_feed.py

Both shuffle, pad by 4 and crop, flip and scale to [0, 1] the same made-up 32x32 images, in batches
of 128. The peer is the usual loop of released code: a CIFAR10 of torchvision, which makes a PIL
image of each, RandomCrop, RandomHorizontalFlip, ToTensor, by so many worker processes. Rounds are
interleaved, ratios taken within a round, and their medians shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10

from robustflat.data import Augment, batches
from robustflat.data.images import MemoryImages

BATCH = 128
Batches = Iterable[tuple[Tensor, Tensor]]


class MadeUp(CIFAR10):  # type: ignore[misc]
    """torchvision's data set, of images that need no download."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.data = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        self.targets = labels.tolist()
        self.target_transform = None
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )


def main() -> None:
    """Time one epoch of each in every round, and print the table."""
    parser = argparse.ArgumentParser(description="The feed beside a DataLoader.")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="of the DataLoader")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pixels = torch.randint(0, 256, (args.images, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (args.images,))
    ours, theirs = MemoryImages(pixels, labels), MadeUp(pixels, labels)
    feeds: dict[str, Batches] = {
        f"DataLoader, {n} workers": DataLoader(
            theirs, BATCH, shuffle=True, num_workers=n, persistent_workers=n > 0
        )
        for n in args.workers
    }
    epoch = partial(batches, ours, BATCH, device="cpu", augment=Augment(crop=4, flip=True))
    times: dict[str, list[float]] = {name: [] for name in ("robustflat", *feeds)}
    for number in range(args.rounds + 1):
        for name in times:
            began = time.perf_counter()
            for _ in epoch(order=number) if name == "robustflat" else feeds[name]:
                pass
            if number:  # the first starts the workers
                times[name].append(time.perf_counter() - began)
    console = Console()
    console.print(f"{args.images:,} images of 32x32, batches of {BATCH}, CPU, one thread a process")
    for name, taken in times.items():
        ratio = statistics.median(t / o for t, o in zip(taken, times["robustflat"], strict=True))
        speed = args.images / statistics.median(taken)
        console.print(f"{name:<22} {speed:>9,.0f} images/s  {ratio:5.1f} times ours")


if __name__ == "__main__":
    main()
