"""Owns image files decoded once: kept on the disk beside them, mapped by every later command."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustflat.data.images import FileImages, MemoryImages, physical_memory
from robustflat.errors import UserError

_AT_ONCE = 1024


def decoded(images: FileImages, folder: Path) -> MemoryImages:
    """The images as pixels, from a file that the first to ask makes and all others map.

    Mapped pixels are in memory once for all processes of a machine. Where the file cannot be
    written, the images are decoded into this process's own memory.

    Args:
        images: The files.
        folder: Where the pixels are kept, as `HASH.npy`, uint8 [N, C, H, W]; the hash tells names,
            sizes and times of the files, so a changed one is decoded anew.

    Returns:
        The images.

    Raises:
        UserError: If a file is unreadable, or neither disk nor memory has room.
    """
    place = folder / f"{_fingerprint(images)}.npy"
    if not place.is_file() and not _written(images, place):
        return MemoryImages(_in_memory(images), images.labels)
    # Copy on write: torch asks for an array that may be written to, and nobody writes.
    pixels = torch.from_numpy(np.load(place, mmap_mode="c"))
    return MemoryImages(pixels, images.labels)


def _fingerprint(images: FileImages) -> str:
    found = hashlib.sha256(repr((images.image_size, images.resize, images.shape)).encode())
    for path in map(images.path, range(len(images))):
        status = path.stat()
        found.update(
            f"{path.parent.name}/{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode()
        )
    return found.hexdigest()[:24]


def _parts(images: FileImages) -> Iterator[Tensor]:
    for indices in torch.arange(len(images)).split(_AT_ONCE):
        yield images.fetch(indices)


def _bytes(images: FileImages) -> int:
    return len(images) * images.shape[0] * images.shape[1] * images.shape[2]


def _written(images: FileImages, place: Path) -> bool:
    """Decode into a file, whole or not at all. Returns whether there is one now."""
    aside = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(exist_ok=True)
        if shutil.disk_usage(place.parent).free < _bytes(images):
            return False
        with aside.open("wb") as file:
            header = {
                "descr": "|u1",
                "fortran_order": False,
                "shape": (len(images), *images.shape),
            }
            np.lib.format.write_array_header_1_0(file, header)
            for part in _parts(images):
                file.write(part.numpy().tobytes())
        aside.replace(place)
    except OSError:
        return False
    finally:
        if aside.exists():
            aside.unlink()
    return True


def _in_memory(images: FileImages) -> Tensor:
    needed, available = _bytes(images), physical_memory()
    if available is not None and needed > available:
        raise UserError(
            f"Decoding {len(images)} images of {images.shape[1]}x{images.shape[2]} needs "
            f"{needed / 2**30:.1f} GiB, the machine has {available / 2**30:.1f}. Set data.cache: "
            "false to decode them as they are needed, or a smaller data.image_size."
        )
    return torch.cat(list(_parts(images)))
