"""Owns WebDataset's shards: root/train/*.tar and root/test/*.tar (or val), KEY.jpg beside KEY.cls.

The package webdataset reads shards from their beginning and shuffles in a buffer, so that what
comes next hangs on all that came before. Here each image is found by its place in its shard, as any
file is: the order of an epoch is a function of seed and epoch, and a run goes on where it stood.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from robustflat.data.folder import SUFFIXES, check_sizes, splits_of
from robustflat.data.images import FileImages
from robustflat.errors import UserError


class TarImages(FileImages):
    """Images inside plain tar files.

    Args:
        members: Shard, offset and length of each image.
        labels: Whole numbers, [N].
        image_size: See `FileImages`.
        resize: See `FileImages`.
    """

    def __init__(
        self,
        members: list[tuple[str, int, int]],
        labels: Tensor,
        image_size: int | None = None,
        resize: int | None = None,
    ) -> None:
        self._spans = np.array([span for _, *span in members], dtype=np.int64).reshape(-1, 2)
        super().__init__([shard for shard, *_ in members], labels, image_size, resize)

    @contextmanager
    def stream(self, index: int) -> Iterator[BinaryIO]:
        """The bytes of an image; see `FileImages.stream`."""
        offset, length = map(int, self._spans[index])
        with open(self.path(index), "rb") as shard:
            shard.seek(offset)
            yield BytesIO(shard.read(length))

    def where(self, index: int) -> str:
        """The shard, and where in it; see `FileImages.where`."""
        return f"{self.path(index)} (at byte {self._spans[index, 0]})"

    def _keep(self, indices: Tensor) -> None:
        super()._keep(indices)
        self._spans = self._spans[indices.numpy()]


def webdataset(
    root: Path, image_size: int | None, resize: int | None = None
) -> tuple[TarImages, TarImages, tuple[str, ...]]:
    """Find the images of shards by the tar headers; of the images only the first is read.

    Args:
        root: The folder that holds `train` and `test` (or, where that is missing, `val`), each with
            shards.
        image_size: See `FileImages`.
        resize: See `FileImages`.

    Returns:
        Train images, test images, and the names of the classes, which are their numbers.

    Raises:
        UserError: If a folder, an image or a label is missing, or a shard is compressed or damaged.
    """
    check_sizes(image_size, resize)
    made = [TarImages(*_members(root / split), image_size, resize) for split in splits_of(root)]
    count = 1 + max(int(images.labels.max()) for images in made)
    return made[0], made[1], tuple(map(str, range(count)))


def _members(folder: Path) -> tuple[list[tuple[str, int, int]], Tensor]:
    """The images of all shards of a split in their order, and their labels."""
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise UserError(
            f"There are no shards {folder / '*.tar'}. WebDataset's shards lie in the folders train "
            "and test (or val) of data.root."
        )
    members, labels = [], []
    for shard in shards:
        for image, label in _samples(shard):
            members.append((str(shard), image.offset_data, image.size))
            labels.append(label)
    return members, torch.tensor(labels)


def _samples(shard: Path) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Each image of a shard with its label: the members that share a key stand together."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                key, _, kind = name.partition(".")
                key = os.path.join(folder, key)
                if not member.isfile():
                    continue
                if f".{kind.lower()}" in SUFFIXES:
                    if key in images:
                        raise UserError(f"The shard {shard} has several images {key!r}.")
                    images[key] = member
                elif kind == "cls":
                    file = tar.extractfile(member)
                    labels[key] = int(file.read()) if file is not None else -1
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(
            f"The shard {shard} could not be read ({type(error).__name__}: {error}). It must be a "
            "plain tar file, not compressed, whose KEY.cls hold the class as a whole number."
        ) from error
    alone = images.keys() ^ labels.keys()
    if alone or not images:
        what = f"{min(alone)!r} without the one or the other" if alone else "nothing"
        raise UserError(
            f"The shard {shard} needs KEY.jpg (or such) beside KEY.cls, and has {what}."
        )
    return iter([(member, labels[key]) for key, member in images.items()])
