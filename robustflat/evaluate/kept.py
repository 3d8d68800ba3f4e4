"""Tensors of an evaluation that are kept in a file of their own."""

from __future__ import annotations

import io
from dataclasses import fields
from pathlib import Path

import torch
from typing_extensions import Self

from robustflat.errors import UserError
from robustflat.files import write_whole, writing
from robustflat.models.files import read_tensors


class Kept:
    """The base of a dataclass of tensors that can be saved and loaded."""

    def save(self, path: Path) -> None:
        """Write them to a file, whole or not at all.

        Raises:
            UserError: If it cannot be written.
        """
        content = io.BytesIO()
        torch.save({f.name: getattr(self, f.name) for f in fields(self)}, content)  # type: ignore[arg-type]
        with writing(path):
            write_whole(path, content.getvalue())

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Those that were saved to a file; None if there is none.

        Raises:
            UserError: If it is damaged.
        """
        if not path.is_file():
            return None
        try:
            return cls(**read_tensors(path))
        except TypeError as error:
            what = cls.__name__.lower()
            raise UserError(f"{path} holds no {what} ({error}). Remove it.") from error
