"""Reading saved tensors: damage is noticed, and no code in the file is ever run."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from robustflat.errors import UserError, reason


def read_tensors(path: str | Path) -> Any:
    """What ``torch.save`` wrote to ``path``, onto the CPU, if it is tensors and plain values.

    Args:
        path: the file; zip archives are checked against the checksums that they carry.

    Returns:
        Mostly a dict.

    Raises:
        UserError: if the file is missing, damaged, or holds anything that could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file {path} to read weights from. Check the path.")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} does not fit")
        with warnings.catch_warnings():
            # Of unusual pickle protocols; what cannot be read is refused anyway.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only" in str(error) or "Unsupported" in str(error):
            raise UserError(
                f"The file {path} holds more than tensors and plain values, which could run code "
                "when read, so it was not. Save the model's state_dict with torch.save instead."
            ) from None
        raise _damaged(path, error) from None
    except Exception as error:  # zlib, struct and torch's reader raise of all kinds
        raise _damaged(path, error) from None


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(
        f"The file {path} is damaged, cut short, or was not written by torch.save: "
        f"{reason(error)}. Use another copy of it."
    )
