"""Owns what a split of a data set is: labelled uint8 images, in memory or decoded on demand."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info
from typing_extensions import Self

from robustflat.data.split import proportional
from robustflat.errors import UserError


class Images(ABC):
    """Labelled images of one size. Never changed in place: every method returns a new object.

    Attributes:
        labels: Whole numbers, [N]: int64, or a smaller type where there are millions.
        shape: Channels, height, width.
        streamed: Whether `fetch` reads files, so that fetching ahead in other processes pays.
    """

    labels: Tensor
    shape: tuple[int, int, int]
    streamed: bool

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def fetch(self, indices: Tensor) -> Tensor:
        """Images by position.

        Args:
            indices: int64, [B].

        Returns:
            uint8, [B, C, H, W].
        """

    def raw(self, index: int) -> Tensor:
        """An image as it is kept, of whatever size.

        Args:
            index: Its position.

        Returns:
            uint8, [C, H, W].
        """
        return self.fetch(torch.tensor([index]))[0]

    def subset(self, indices: Tensor) -> Self:
        """The images at some positions, in that order; of streamed ones nothing is read.

        Args:
            indices: int64, [M].

        Returns:
            M images, of the same shape.
        """
        new = copy(self)
        new.labels = self.labels[moved(indices, self.labels.device)]
        new._keep(indices)
        return new

    @abstractmethod
    def _keep(self, indices: Tensor) -> None:
        """Forget all images, of a new object, but those at some positions."""

    def relabelled(self, labels: Tensor) -> Self:
        """The same images with other labels.

        Args:
            labels: int64, [N].

        Returns:
            N images.
        """
        new = copy(self)
        new.labels = checked_labels(labels, len(self)).to(self.labels.device)
        return new

    def to(self, device: torch.device | str) -> Self:
        """The images where they are fetched fastest for a device.

        Args:
            device: The device.

        Returns:
            In-memory images move there; streamed ones stay with the host.
        """
        return self

    def tensors(self, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """All images, or a fixed choice of them in which classes keep their shares.

        Args:
            limit: How many; None for all. The same limit always gives the same images.

        Returns:
            float32 [M, C, H, W] in [0, 1], and int64 [M].
        """
        if limit is None or limit == len(self):
            indices = torch.arange(len(self), device=self.labels.device)
        else:
            # Sorted files would make "the first `limit`" one single class.
            indices = proportional(self.labels.cpu(), limit, seed=0).to(self.labels.device)
        return to_float(self.fetch(indices)), self.labels[indices].long()


def to_float(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [0, 1].

    Args:
        pixels: uint8, any shape.

    Returns:
        float32, the same shape; exactly `pixels / 255`.
    """
    return pixels.to(torch.float32).div_(255)


def batch_of(count: int, shape: tuple[int, int, int]) -> Tensor:
    """Room for a batch; in a worker, where the process that trains finds it without a copy.

    Args:
        count: Images, N.
        shape: Channels, height and width of each.

    Returns:
        uint8, [N, C, H, W], of any values.
    """
    room = torch.empty((count, *shape), dtype=torch.uint8)
    return room if get_worker_info() is None else room.share_memory_()


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, copied there from the host without either waiting for the other.

    Args:
        tensor: On the host, or on the device already.
        device: The device.

    Returns:
        The tensor there.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from any other memory the copy would wait
    return tensor.to(device, non_blocking=True)


def check_count(labels: Tensor, count: int) -> None:
    """Refuse another number of labels than there are images.

    Raises:
        UserError: If there are others.
    """
    if labels.shape != (count,):
        raise UserError(
            f"Each image needs one label: got {count} images and labels of shape "
            f"{list(labels.shape)}."
        )


def checked_labels(labels: Tensor, count: int) -> Tensor:
    """Labels as int64 [N].

    Args:
        labels: Whole numbers, one per image.
        count: How many images there are.

    Returns:
        int64, [N].

    Raises:
        UserError: If the number, the type or the values cannot be labels.
    """
    check_count(labels, count)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UserError(f"Labels must be whole numbers, got {labels.dtype}.")
    labels = labels.to(torch.int64)
    if labels.device.type != "meta" and count and int(labels.min()) < 0:
        raise UserError(f"Labels count from 0, got {int(labels.min())}.")
    return labels


class MemoryImages(Images):
    """Images held as one uint8 tensor.

    Args:
        pixels: uint8, [N, C, H, W].
        labels: Whole numbers, [N].

    Raises:
        UserError: If the types or shapes are others.
    """

    streamed = False

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4:
            raise UserError(
                "Images must be uint8 of shape [N, C, H, W] with values 0 to 255, got "
                f"{pixels.dtype} of shape {list(pixels.shape)}."
            )
        self.pixels = pixels
        self.labels = checked_labels(labels, len(pixels)).to(pixels.device)
        self.shape = (pixels.shape[1], pixels.shape[2], pixels.shape[3])

    def fetch(self, indices: Tensor) -> Tensor:
        """Images by position; see `Images.fetch`."""
        return self.pixels[moved(indices, self.pixels.device)].contiguous()

    def to(self, device: torch.device | str) -> Self:
        """The images on a device; see `Images.to`."""
        new = copy(self)
        new.pixels, new.labels = self.pixels.to(device), self.labels.to(device)
        return new

    def _keep(self, indices: Tensor) -> None:
        self.pixels = self.fetch(indices)


class FileImages(Images):
    """Image files, decoded to RGB when they are fetched.

    Args:
        paths: The files.
        labels: Whole numbers, [N].
        image_size: If given, the centre square of this side is cut out. If not, all files must have
            the size of the first.
        resize: What the shorter side is brought to before (bilinear, antialiased); `image_size` if
            None.

    Raises:
        UserError: If there is no file or the first cannot be read.
    """

    streamed = True

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: Tensor,
        image_size: int | None = None,
        resize: int | None = None,
    ) -> None:
        if not paths:
            raise UserError("There are no image files to read.")
        # One block of memory: a million objects would be copied into every process that reads.
        self._names = np.array([os.fsencode(path) for path in paths])
        self.labels = checked_labels(labels, len(paths))
        self.image_size, self.resize = image_size, resize or image_size
        self.threads = min(8, os.cpu_count() or 1)
        side = image_size
        if side is None:
            with self._opened(0) as image:
                (width, height) = image.size
            self.shape = (3, height, width)
        else:
            self.shape = (3, side, side)

    def path(self, index: int) -> Path:
        """The file of an image."""
        return Path(os.fsdecode(bytes(self._names[index])))

    def stream(self, index: int) -> AbstractContextManager[BinaryIO]:
        """The bytes of an image, to be read."""
        return open(self.path(index), "rb")

    def where(self, index: int) -> str:
        """What to call the place of an image."""
        return str(self.path(index))

    def fetch(self, indices: Tensor) -> Tensor:
        """Images by position, decoded by threads unless in a worker; see `Images.fetch`."""
        chosen = indices.tolist()
        out = batch_of(len(chosen), self.shape)

        def decode(position: int) -> None:
            out[position] = self._fitted(chosen[position])

        if get_worker_info() is not None:
            for position in range(len(chosen)):
                decode(position)
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                for _ in pool.map(decode, range(len(chosen))):
                    pass
        return out

    def raw(self, index: int) -> Tensor:
        """An image of the file's own size; see `Images.raw`."""
        with self._opened(index) as image:
            return _pixels(image)

    def threaded(self, threads: int) -> FileImages:
        """The same files, decoded by so many threads.

        Args:
            threads: At least 1.

        Returns:
            N images.
        """
        new = copy(self)
        new.threads = threads
        return new

    def _keep(self, indices: Tensor) -> None:
        self._names = self._names[indices.numpy()]

    def _fitted(self, index: int) -> Tensor:
        """One file as uint8 [3, H, W] of the right size."""
        with self._opened(index) as image:
            if self.image_size is not None and self.resize is not None:
                image = _resized(image.convert("RGB"), self.resize, self.image_size)
            (height, width) = self.shape[1:]
            if image.size != (width, height):
                raise UserError(
                    f"{self.where(index)} is {image.size[1]}x{image.size[0]} (height x width) "
                    f"where the data set is {height}x{width}. Bring all images to one "
                    "size with data.image_size, or of a model with --image-size."
                )
            return _pixels(image)

    @contextmanager
    def _opened(self, index: int) -> Iterator[Image.Image]:
        """An image, fully read; whatever is wrong with it is said in one sentence."""
        try:
            with self.stream(index) as stream:
                image = Image.open(stream)
                image.load()
        except Exception as error:
            raise UserError(
                f"The image {self.where(index)} could not be read ({type(error).__name__}: "
                f"{error}). Repair or remove the file."
            ) from error
        with image:
            yield image


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _resized(image: Image.Image, shorter: int, side: int) -> Image.Image:
    """The shorter side brought to a length, then the centre square."""
    (width, height) = image.size
    scale = shorter / min(width, height)
    (wide, high) = (max(shorter, round(width * scale)), max(shorter, round(height * scale)))
    image = image.resize((wide, high), Image.Resampling.BILINEAR)
    (left, top) = ((wide - side) // 2, (high - side) // 2)
    return image.crop((left, top, left + side, top + side))


def physical_memory() -> int | None:
    """Bytes of memory in the machine, where the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
