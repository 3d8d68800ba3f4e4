"""Owns images that stay on disk: rows of the arrays in .npy and .npz files, read by offset."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustflat.data.images import Images, check_count
from robustflat.errors import UserError

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def member_start(path: Path, member: zipfile.ZipInfo) -> int:
    """Where the content of a stored (not compressed) member of a zip file begins.

    Args:
        path: The zip file.
        member: The member.

    Returns:
        Bytes from the start of the file.

    Raises:
        ValueError: If there is no member there.
    """
    with path.open("rb") as file:
        file.seek(member.header_offset)
        header = file.read(_LOCAL_HEADER.size)
    # Name and extra field may be longer here than in the central directory.
    (magic, *_, name, extra) = _LOCAL_HEADER.unpack(header)
    if magic != b"PK\x03\x04":
        raise ValueError(f"no member {member.filename} where the directory says")
    return int(member.header_offset + _LOCAL_HEADER.size + name + extra)


@dataclass(frozen=True)
class StoredArray:
    """An array in .npy format inside a file, of which rows are read as they are needed.

    Rows are read, not mapped: they count as nobody's memory afterwards, and a file that is cut off
    while it is in use gives an error, where a mapped one would end the process.

    Attributes:
        path: The file.
        start: Where its first row begins, in bytes.
        dtype: Of its entries.
        shape: With the number of rows first.
    """

    path: Path
    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @classmethod
    def find(cls, path: Path, at: int = 0) -> StoredArray:
        """Read the header of an array.

        Args:
            path: The file that holds it.
            at: Where in the file it begins.

        Returns:
            The array.

        Raises:
            ValueError: If there is none, it is of Python objects, or the file ends before it does.
        """
        with path.open("rb") as file:
            file.seek(at)
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                (shape, fortran, dtype) = np.lib.format.read_array_header_1_0(file)
            elif version == (2, 0):
                (shape, fortran, dtype) = np.lib.format.read_array_header_2_0(file)
            else:
                raise ValueError(f".npy format {version}")
            if dtype.hasobject or fortran:
                raise ValueError("an array of objects, or in the order of Fortran")
            found = cls(path, file.tell(), dtype, tuple(shape))
        if found.start + len(found) * found.row_bytes > path.stat().st_size:
            raise ValueError(f"the file ends before its array of shape {list(shape)}")
        return found

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def whole(self) -> NDArray[Any]:
        """All of it, in memory."""
        count = int(np.prod(self.shape, dtype=np.int64))
        found = np.fromfile(self.path, self.dtype, count, offset=self.start)
        return found.reshape(self.shape)

    def read(self, rows: NDArray[np.int64], into: NDArray[Any]) -> None:
        """Read rows.

        Args:
            rows: Their numbers, [B].
            into: Where to, [B, ...] of this dtype.

        Raises:
            UserError: If the file has become shorter, or cannot be read any more.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                for i in np.argsort(rows, kind="stable"):  # as they lie on the disk
                    file.seek(self.start + int(rows[i]) * self.row_bytes)
                    if file.readinto(into[i]) != self.row_bytes:
                        raise OSError("it has become shorter")
        except OSError as error:
            raise UserError(
                f"The extra images in {self.path} cannot be read any more: {error}. Put the file "
                "back and go on with --resume."
            ) from error


class ShardImages(Images):
    """Images that stay in one or several files; each fetch reads its own.

    Args:
        shards: uint8, [n, H, W, C] each.
        labels: Whole numbers, [N], for all shards in turn.

    Raises:
        UserError: If there is another number of labels.
    """

    streamed = True

    def __init__(self, shards: Sequence[StoredArray], labels: Tensor) -> None:
        self.shards = list(shards)
        self.ends = np.cumsum([len(shard) for shard in shards])
        self.chosen: Tensor | None = None
        check_count(labels, int(self.ends[-1]))
        self.labels = labels
        (height, width, channels) = shards[0].shape[1:]
        self.shape = (channels, height, width)

    def fetch(self, indices: Tensor) -> Tensor:
        """Images by position; see `Images.fetch`."""
        at = (indices.cpu() if self.chosen is None else self.chosen[indices.cpu()]).numpy()
        out = np.empty((len(at), *self.shards[0].shape[1:]), np.uint8)
        which = np.searchsorted(self.ends, at, side="right")
        for number in np.unique(which):
            rows = np.flatnonzero(which == number)
            part = np.empty((len(rows), *out.shape[1:]), np.uint8)
            shard = self.shards[number]
            shard.read(at[rows] - (self.ends[number] - len(shard)), part)
            out[rows] = part
        return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()

    def _keep(self, indices: Tensor) -> None:
        self.chosen = indices if self.chosen is None else self.chosen[indices]
