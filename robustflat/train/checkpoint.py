"""Checkpoints: written aside and renamed, so that there is always a whole one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from robustflat.errors import UserError
from robustflat.models.files import read_tensors

FORMAT = 1


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors and plain values) so that ``path`` is always whole.

    Raises:
        UserError: if the disk is full or the folder cannot be written; an older checkpoint at
            ``path`` is then untouched.
    """
    aside = path.with_suffix(".tmp")
    try:
        with aside.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        kept = f" The checkpoint written before is untouched: {path}." if path.exists() else ""
        raise UserError(
            f"The checkpoint {path} could not be written: {error}. Free some space or choose "
            f"another output folder, then go on with --resume.{kept}"
        ) from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint made by :func:`save_checkpoint`, onto the CPU.

    Raises:
        UserError: if it is missing, damaged (checked against the checksums inside), or not one.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}. Train the run first, or check the path.")
    content = read_tensors(path)
    if not isinstance(content, dict) or "format" not in content or "model" not in content:
        raise UserError(
            f"The file {path} is no checkpoint of robustflat. A bare state_dict is evaluated with "
            "`robustflat evaluate FILE --model NAME`."
        )
    if content["format"] != FORMAT:
        raise UserError(
            f"The checkpoint {path} has format {content['format']}, and this version of "
            f"robustflat reads format {FORMAT}. Use the version that wrote it."
        )
    return content
