"""Owns corrupted test sets: CIFAR-10-C and -100-C's arrays, ImageNet-C's folders, and the like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustflat.data.folder import class_files
from robustflat.data.images import FileImages, Images, MemoryImages
from robustflat.errors import UserError

# Hendrycks and Dietterich 2019: those that the mean corruption error is taken over.
CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression",
)  # fmt: skip
SEVERITIES = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Corrupted:
    """One corruption at one severity.

    Attributes:
        corruption: Its name.
        severity: 1 to 5.
        images: Read when asked for.
    """

    corruption: str
    severity: int
    images: Callable[[], Images]


def corrupted(
    folder: str | Path,
    classes: Sequence[str],
    shape: tuple[int, int, int],
    corruptions: Sequence[str] = CORRUPTIONS,
) -> list[Corrupted]:
    """The corrupted test sets of a folder, after a look at all of them; no image is decoded.

    Either as CIFAR-10-C is published: `labels.npy` [5 N] and for every corruption `NAME.npy`, uint8
    [5 N, H, W, C], the N images of severity 1 first. Or as ImageNet-C is: `NAME/SEVERITY/CLASS/*`.

    Args:
        folder: Where they are.
        classes: Of the model, in the order of its logits.
        shape: Channels, height and width that the model takes.
        corruptions: Which.

    Returns:
        Every corruption at every severity, in this order.

    Raises:
        UserError: If something is missing, of another length, shape or class, or damaged.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder} of corrupted images. Check the path.")
    if (folder / "labels.npy").is_file():
        return _of_arrays(folder, len(classes), shape, corruptions)
    if any(folder.glob("*.npy")):
        raise UserError(
            f"{folder} has images but no labels.npy, so nothing tells their classes: put the file "
            "of the published set there."
        )
    return _of_folders(folder, classes, shape, corruptions)


def _of_arrays(
    folder: Path, classes: int, shape: tuple[int, int, int], corruptions: Sequence[str]
) -> list[Corrupted]:
    numbers = _array(folder / "labels.npy")
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or len(numbers) % SEVERITIES:
        raise UserError(
            f"{folder / 'labels.npy'} must hold whole numbers, as many for each of {SEVERITIES} "
            f"severities; it has {numbers.dtype} of shape {list(numbers.shape)}."
        )
    labels = torch.from_numpy(numbers.astype(np.int64))
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise UserError(
            f"{folder / 'labels.npy'} must hold labels from 0 to {classes - 1}, the classes of the "
            "model: is it of another data set?"
        )
    count = len(labels) // SEVERITIES
    found = []
    for name in corruptions:
        path = folder / f"{name}.npy"
        pixels = _array(path)
        (channels, height, width) = shape
        wanted = (len(labels), height, width, channels)
        if pixels.dtype != np.uint8 or pixels.shape != wanted:
            raise UserError(
                f"{path} must hold uint8 of shape {list(wanted)}, as labels.npy and the model say; "
                f"it has {pixels.dtype} of shape {list(pixels.shape)}."
            )
        for severity in range(1, SEVERITIES + 1):
            rows = slice((severity - 1) * count, severity * count)
            images = partial(_mapped, path, rows, labels[rows])
            found.append(Corrupted(corruption=name, severity=severity, images=images))
    return found


def _array(path: Path) -> NDArray[np.generic]:
    """An array in its file: mapped, not read."""
    if not path.is_file():
        raise UserError(
            f"There is no file {path}: the set is not whole. Fetch it again, or say which "
            "corruptions are to be measured (--corruption)."
        )
    try:
        found: NDArray[np.generic] = np.load(path, mmap_mode="c")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged or no array ({error}). Fetch it again.") from None
    return found


def _mapped(path: Path, rows: slice, labels: Tensor) -> Images:
    pixels = torch.from_numpy(np.load(path, mmap_mode="c")[rows])
    return MemoryImages(pixels.permute(0, 3, 1, 2), labels)


def _of_folders(
    folder: Path,
    classes: Sequence[str],
    shape: tuple[int, int, int],
    corruptions: Sequence[str],
) -> list[Corrupted]:
    found, first = [], None
    for name in corruptions:
        for severity in range(1, SEVERITIES + 1):
            place = folder / name / str(severity)
            counts = {key: len(files) for key, files in _files(place, classes).items()}
            if first is None:
                first = place, counts
            different = next((k for k in classes if counts.get(k) != first[1].get(k)), None)
            if different is not None:
                raise UserError(
                    f"{place} has {counts.get(different, 0)} images of {different!r} and "
                    f"{first[0]} {first[1].get(different, 0)}: the set is not whole. Fetch it "
                    "again."
                )
            images = partial(_listed, place, tuple(classes), shape)
            found.append(Corrupted(corruption=name, severity=severity, images=images))
    return found


def _files(place: Path, classes: Sequence[str]) -> dict[str, list[str]]:
    if not place.is_dir():
        raise UserError(
            f"There is no folder {place}: the set is not whole. Fetch it again, or say which "
            "corruptions are to be measured (--corruption)."
        )
    files = class_files(place)
    foreign = [name for name in files if name not in classes]
    if foreign:
        raise UserError(f"{place} has the class {foreign[0]!r}, which the model's data have not.")
    return files


def _listed(place: Path, classes: Sequence[str], shape: tuple[int, int, int]) -> Images:
    files = _files(place, classes)
    labels = torch.tensor([i for i, name in enumerate(classes) for _ in files.get(name, ())])
    paths = [path for name in classes for path in files.get(name, ())]
    # Of another size they are brought to the model's, as its own test images are.
    return FileImages(paths, labels, shape[1] if shape[1] == shape[2] else None)
