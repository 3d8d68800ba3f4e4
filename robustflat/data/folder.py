"""Owns users' own image trees: root/train/CLASS/* and root/test/CLASS/*."""

from __future__ import annotations

from pathlib import Path

import torch

from robustflat.data.images import FileImages
from robustflat.errors import UserError

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


def image_folder(
    root: Path, image_size: int | None
) -> tuple[FileImages, FileImages, tuple[str, ...]]:
    """List the files of a tree; nothing but the first of each split is read.

    Args:
        root: The folder that holds `train` and `test`, each with one folder per class.
        image_size: See `FileImages`.

    Returns:
        Train files, test files, and the names of the classes, sorted.

    Raises:
        UserError: If a folder is missing or empty, or the classes of the splits differ.
    """
    if image_size is not None and (isinstance(image_size, bool) or image_size < 1):
        raise UserError(f"data.image_size must be a positive number of pixels, got {image_size}.")
    train, test = _files(root, "train"), _files(root, "test")
    classes = tuple(train)
    if len(classes) < 2:
        raise UserError(
            f"{root / 'train'} has one class only ({classes[0]}); a classifier needs at least two. "
            "Each class is a folder of its own."
        )
    foreign = [name for name in test if name not in train]
    if foreign:
        raise UserError(
            f"{root / 'test'} has the class {foreign[0]!r}, which {root / 'train'} has not."
        )

    def split(files: dict[str, list[Path]]) -> FileImages:
        paths = [path for name in classes for path in files.get(name, [])]
        sizes = torch.tensor([len(files.get(name, [])) for name in classes])
        labels = torch.repeat_interleave(torch.arange(len(classes)), sizes)
        return FileImages(paths, labels, image_size)

    (train_images, test_images) = (split(train), split(test))
    if train_images.shape != test_images.shape:
        raise UserError(
            f"The images of {root / 'train'} and {root / 'test'} have different sizes "
            f"({train_images.shape[1]}x{train_images.shape[2]} and "
            f"{test_images.shape[1]}x{test_images.shape[2]}). Set data.image_size, or of "
            "a model --image-size."
        )
    return train_images, test_images, classes


def _files(root: Path, split: str) -> dict[str, list[Path]]:
    """The image files of a split, by class, all sorted."""
    folder = root / split
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}. An image folder needs {root / 'train'} and "
            f"{root / 'test'}, each with one folder of images per class (if your test images are "
            "in another folder, rename or link it)."
        )
    found: dict[str, list[Path]] = {}
    for directory in sorted(folder.iterdir()):
        if not directory.is_dir() or directory.name.startswith("."):
            continue
        files = sorted(
            path
            for path in directory.iterdir()
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
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
