"""Owns the reading of extra data files of the field: .npz with generated images, RST's pickle."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robustflat.data.images import MemoryImages
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


def load_extra(
    path: str | Path,
    *,
    shape: tuple[int, int, int],
    num_classes: int,
    samples: int | None = None,
    seed: int = 0,
) -> MemoryImages:
    """Read extra labelled images.

    `.npz` files hold `image` (uint8, [N, H, W, C]) and `label` ([N]), as the 1M DDPM and EDM files
    do (Gowal et al. 2021, Wang et al. 2023); `.pickle` or `.pkl` files hold `data` and
    `extrapolated_targets`, as RST's `ti_500K_pseudo_labeled.pickle` does (Carmon et al. 2019). A
    pickle can carry code: only numpy arrays of numbers are admitted, anything else is refused
    before it runs.

    Args:
        path: The file.
        shape: Channels, height and width of the labelled images.
        num_classes: Number of classes.
        samples: Take only this many, class-balanced.
        seed: Which ones.

    Returns:
        The images.

    Raises:
        UserError: If the file is missing, foreign, hostile, or does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no extra data file {path}.")
    if path.suffix == ".npz":
        (pixels, labels) = _read_npz(path)
    elif path.suffix in (".pickle", ".pkl"):
        (pixels, labels) = _read_pickle(path)
    else:
        raise UserError(f"Extra data must be an .npz, .pickle or .pkl file, got {path}.")

    (channels, height, width) = shape
    wanted = (height, width, channels)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != wanted:
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
    # torch warns of arrays it may not write to, as some pickles hold; only those are copied. The
    # rest is a view: copying into [N, C, H, W] would double the memory of a million images.
    pixels = np.require(pixels, requirements="W")
    images = MemoryImages(
        torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64))
    )
    if samples is None:
        return images
    return images.subset(balanced(images.labels, samples, seed=seed))


def _read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """`image` and `label` of an .npz file."""
    try:
        # numpy leaves a file it opened itself open when it turns out to be damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            keys = list(archive.files)
            if "image" in keys and "label" in keys:
                return archive["image"], archive["label"]
    except Exception as error:
        raise UserError(
            f"The extra data file {path} could not be read ({type(error).__name__}: {error}). It "
            "may be truncated: fetch it again."
        ) from error
    raise UserError(f"{path} needs the arrays 'image' and 'label', it has {keys}.")


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
