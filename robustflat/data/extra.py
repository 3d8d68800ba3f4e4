"""Owns the reading of extra images: generated ones in .npz or .npy shards, RST's pickle."""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robustflat.data.images import Images, MemoryImages, physical_memory
from robustflat.data.shards import ShardImages, StoredArray, member_start
from robustflat.data.split import balanced
from robustflat.errors import UserError


def _latin1(text: str, encoding: str) -> bytes:
    """What protocol 2 calls to rebuild bytes; it never needs another encoding."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


# All that a pickled numpy array of numbers needs, under the names of numpy 1 and 2. Nothing here
# can call code of the file's choosing.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}
for _core in ("numpy.core", "numpy._core"):
    _ADMITTED[f"{_core}.multiarray", "_reconstruct"] = np.empty(0).__reduce__()[0]
    _ADMITTED[f"{_core}.multiarray", "scalar"] = np.int64(0).__reduce__()[0]
    _ADMITTED[f"{_core}.numeric", "_frombuffer"] = np.empty(1).__reduce_ex__(5)[0]


@dataclass(frozen=True)
class _Shard:
    """Images uint8 [n, H, W, C], on disk or in memory, and labels [n] of one file."""

    path: Path
    pixels: StoredArray | NDArray[Any]
    labels: NDArray[Any]


def load_extra(
    path: str | Path,
    *,
    shape: tuple[int, int, int],
    num_classes: int,
    samples: int | None = None,
    seed: int = 0,
) -> Images:
    """Read extra labelled images, of which there may be more than fit into memory.

    - `.npz` files hold `image` (uint8, [N, H, W, C]) and `label` ([N]), as the DDPM and EDM files
      do (Gowal et al. 2021, Wang et al. 2023). Of those written by `numpy.savez` only the images
      of a batch are read, when it is made; their checksums are not looked at, which would read
      them whole. Compressed ones are read into memory, half of which they must leave free.
    - A folder holds several `.npz` files that are not compressed, or pairs of `.npy` files,
      `image*.npy` beside `label*.npy`: the shards of one data set, in the order of their names.
    - `.pickle` or `.pkl` files hold `data` and `extrapolated_targets`, as RST's
      `ti_500K_pseudo_labeled.pickle` does (Carmon et al. 2019), and are read into memory. A pickle
      can carry code: only numpy arrays of numbers are admitted, anything else is refused before it
      runs.

    Args:
        path: The file or the folder.
        shape: Channels, height and width of the labelled images.
        num_classes: Number of classes.
        samples: Take only this many, class-balanced.
        seed: Which ones.

    Returns:
        The images.

    Raises:
        UserError: If the file is missing, foreign, hostile, too large, or does not fit.
    """
    shards = [_checked(shard, shape, num_classes) for shard in _shards(Path(path))]
    stored = [shard.pixels for shard in shards if isinstance(shard.pixels, StoredArray)]
    images: Images
    if stored:
        parts = [shard.labels for shard in shards]
        labels = parts[0] if len(parts) == 1 else np.concatenate(parts)
        images = ShardImages(stored, torch.from_numpy(labels))
    else:
        # torch warns of arrays it may not write to, as some pickles hold; only those are copied.
        # The rest is a view: copying into [N, C, H, W] would double the memory.
        pixels = np.require(shards[0].pixels, requirements="W")
        images = MemoryImages(
            torch.from_numpy(pixels).permute(0, 3, 1, 2),
            torch.from_numpy(shards[0].labels.astype(np.int64)),
        )
    if samples is None:
        return images
    return images.subset(balanced(images.labels, samples, seed=seed))


def _shards(path: Path) -> list[_Shard]:
    """The files that a path names, opened."""
    if path.is_dir():
        packed = sorted(path.glob("*.npz"))
        pairs = sorted(path.glob("image*.npy"))
        if not packed and not pairs:
            raise UserError(
                f"The folder {path} holds no extra data: neither .npz files nor image*.npy beside "
                "label*.npy."
            )
        return [_read_npz(p, shard=True) for p in packed] + [_read_pair(p) for p in pairs]
    if not path.is_file():
        raise UserError(f"There is no extra data file {path}.")
    if path.suffix == ".npz":
        return [_read_npz(path)]
    if path.suffix in (".pickle", ".pkl"):
        return [_Shard(path, *_read_pickle(path))]
    raise UserError(
        f"Extra data must be an .npz, .pickle or .pkl file, or a folder of shards, got {path}."
    )


def _checked(shard: _Shard, shape: tuple[int, int, int], num_classes: int) -> _Shard:
    """Refuse what does not fit the labelled images; keep the labels in a byte where that will do.

    20 million of int64 would be 160 MB.
    """
    (path, pixels, labels) = (shard.path, shard.pixels, shard.labels)
    (channels, height, width) = shape
    wanted = (height, width, channels)
    if pixels.dtype != np.uint8 or len(pixels.shape) != 4 or pixels.shape[1:] != wanted:
        raise UserError(
            f"The images of {path} must be uint8 of shape [N, {height}, {width}, {channels}], got "
            f"{pixels.dtype} of shape {list(pixels.shape)}."
        )
    if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{path} has {len(pixels)} images, so it needs as many whole-number labels; got "
            f"{labels.dtype} of shape {list(labels.shape)}."
        )
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        found = f"{labels.min()} to {labels.max()}" if len(labels) else "none"
        raise UserError(f"The labels of {path} must lie in 0 to {num_classes - 1}, got {found}.")
    small = np.uint8 if num_classes <= 256 else np.int32
    return replace(shard, labels=labels.astype(small, copy=False))


def _read_npz(path: Path, *, shard: bool = False) -> _Shard:
    """`image` and `label` of an .npz file, the images left on disk if they are not compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
        keys = list(members)
        if "image" in keys and "label" in keys:
            image, label = members["image"], members["label"]
            if image.compress_type == zipfile.ZIP_STORED == label.compress_type:
                found = [StoredArray.find(path, member_start(path, m)) for m in (image, label)]
                return _Shard(path, found[0], found[1].whole())
            _check_memory(path, image.file_size, shard)
            # numpy leaves a file it opened itself open when it turns out to be damaged.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
                return _Shard(path, content["image"], content["label"])
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"The extra data file {path} could not be read ({type(error).__name__}: {error}). It "
            "may be truncated: fetch it again."
        ) from error
    raise UserError(f"{path} needs the arrays 'image' and 'label', it has {keys}.")


def _read_pair(path: Path) -> _Shard:
    """`image*.npy` and the `label*.npy` of the same name."""
    beside = path.with_name(path.name.replace("image", "label", 1))
    if not beside.is_file():
        raise UserError(
            f"{path} has no labels: there is no {beside}. Unlabelled images need pseudo-labels: "
            "the classes that a trained network gives them, saved there as whole numbers, [N]."
        )
    try:
        return _Shard(path, StoredArray.find(path), StoredArray.find(beside).whole())
    except Exception as error:
        raise UserError(
            f"The extra data files {path} and {beside} could not be read "
            f"({type(error).__name__}: {error}). They may be truncated: fetch them again."
        ) from error


def _check_memory(path: Path, size: int, shard: bool) -> None:
    """Refuse to unpack a shard, or what does not leave the machine half of its memory."""
    memory = physical_memory()
    if shard or (memory is not None and 2 * size > memory):
        raise UserError(
            f"{path} is compressed, so its {size / 2**30:.1f} GiB of images cannot be read a few "
            f"at a time. Unpack it once, with `unzip {path} -d FOLDER`, and set data.extra.path to "
            "that folder."
        )


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that knows numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up a global, if it is one that arrays need."""
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ADMITTED[module, name]


def _read_pickle(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """`data` and `extrapolated_targets` of a pickle, without running anything in it."""
    try:
        # latin1 is how arrays pickled by Python 2 are read.
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:
        raise UserError(
            f"The pickle {path} was refused ({type(error).__name__}: {error}). Only numpy arrays "
            "of numbers are read from pickles, because a pickle can run code. If you trust the "
            "file, save its arrays as `image` and `label` with numpy.savez."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"The pickle {path} must hold a dictionary, got {type(content).__name__}.")
    (pixels, labels) = (content.get("data"), content.get("extrapolated_targets"))
    if isinstance(labels, list):
        labels = np.asarray(labels)
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, np.ndarray):
        raise UserError(
            f"The pickle {path} needs the arrays 'data' and 'extrapolated_targets', it has "
            f"{[str(key) for key in content]}."
        )
    return pixels, labels
