"""Owns image trees: root/train/CLASS/* and root/test/CLASS/*, or root/val as ImageNet has it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from robustflat.data.images import FileImages
from robustflat.errors import UserError

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


def image_folder(
    root: Path, image_size: int | None, resize: int | None = None
) -> tuple[FileImages, FileImages, tuple[str, ...]]:
    """List the files of a tree; nothing but the first of each split is read.

    Args:
        root: The folder that holds `train` and `test` (or, where that is missing, `val`), each with
            one folder per class.
        image_size: See `FileImages`.
        resize: See `FileImages`.

    Returns:
        Train files, test files, and the names of the classes, sorted.

    Raises:
        UserError: If a folder is missing or empty, or the classes of the splits differ.
    """
    check_sizes(image_size, resize)
    _, test_name = splits_of(root)
    train, test = _files(root, "train"), _files(root, test_name)
    classes = tuple(train)
    if len(classes) < 2:
        raise UserError(
            f"{root / 'train'} has one class only ({classes[0]}); a classifier needs at least two. "
            "Each class is a folder of its own."
        )
    foreign = [name for name in test if name not in train]
    if foreign:
        raise UserError(
            f"{root / test_name} has the class {foreign[0]!r}, which {root / 'train'} has not."
        )

    def split(files: dict[str, list[str]]) -> FileImages:
        paths = [path for name in classes for path in files.get(name, [])]
        sizes = torch.tensor([len(files.get(name, [])) for name in classes])
        labels = torch.repeat_interleave(torch.arange(len(classes)), sizes)
        return FileImages(paths, labels, image_size, resize)

    return split(train), split(test), classes


def check_sizes(image_size: int | None, resize: int | None) -> None:
    """Refuse sizes that no image can be brought to.

    Raises:
        UserError: Saying which.
    """
    if image_size is not None and (isinstance(image_size, bool) or image_size < 1):
        raise UserError(f"data.image_size must be a positive number of pixels, got {image_size}.")
    if resize is not None and (image_size is None or resize < image_size):
        raise UserError(
            f"data.resize is what the shorter side of an image has before the square of "
            f"data.image_size is cut out, so it cannot be {resize} for {image_size}."
        )


def splits_of(root: Path) -> tuple[str, str]:
    """The folders to train and to test on; ImageNet calls the latter val."""
    only_val = not (root / "test").exists() and (root / "val").exists()
    return "train", "val" if only_val else "test"


def _files(root: Path, split: str) -> dict[str, list[str]]:
    """The image files of a split, by class, all sorted."""
    folder = root / split
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}. An image folder needs {root / 'train'} and "
            f"{root / 'test'}, each with one folder of images per class (if your test images are "
            "in another folder, rename or link it)."
        )
    return class_files(folder)


def class_files(folder: Path) -> dict[str, list[str]]:
    """The image files of a folder of classes, by class, all sorted.

    Args:
        folder: It has a folder for every class.

    Returns:
        Paths by the class's name.

    Raises:
        UserError: If there is no class, or one without images.
    """
    found: dict[str, list[str]] = {}
    for directory in sorted(folder.iterdir()):
        if not directory.is_dir() or directory.name.startswith("."):
            continue
        with os.scandir(directory) as entries:  # of which there may be millions
            files = sorted(
                entry.path
                for entry in entries
                if os.path.splitext(entry.name)[1].lower() in SUFFIXES
                and not entry.name.startswith(".")
                and entry.is_file()
            )
        if not files:
            raise UserError(
                f"The class folder {directory} has no images (files that end in "
                f"{', '.join(sorted(SUFFIXES))})."
            )
        found[directory.name] = files
    if not found:
        raise UserError(f"{folder} has no class folders: put the images into {folder}/CLASS/.")
    return found
