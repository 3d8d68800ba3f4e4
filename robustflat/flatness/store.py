"""Owns the file in which a long measurement keeps its finished parts, to be resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.files import write_whole

FORMAT = "robustflat-flatness-parts/1"


class Store:
    """Finished parts of a measurement, by key; in memory only, or also in a JSON file.

    The file is written aside and renamed after each part, so that it is whole at any moment. It
    belongs to one model, data and setting, told by a fingerprint.

    Args:
        path: the file, made if missing; None keeps nothing.
        fingerprint: of everything that the parts depend on.

    Raises:
        UserError: if the file belongs to another measurement, is damaged, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, fingerprint: str) -> None:
        self._path = None if path is None else Path(path)
        self._fingerprint = fingerprint
        self._parts: dict[str, Any] = {}
        if self._path is not None and self._path.exists():
            self._parts = self._read(self._path)

    def get(self, key: str) -> Any | None:
        """The part of that key, or None."""
        return self._parts.get(key)

    def put(self, key: str, part: Any) -> None:
        """Keep a part (anything JSON can hold exactly)."""
        self._parts[key] = part
        if self._path is None:
            return
        content = {"format": FORMAT, "fingerprint": self._fingerprint, "parts": self._parts}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(content, allow_nan=False))
        except OSError as error:
            raise UserError(
                f"The measurement's parts cannot be kept in {self._path}: {error}."
            ) from error

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError("another format")
            fingerprint, parts = content["fingerprint"], dict(content["parts"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} does not hold the parts of a flatness measurement ({error}). Remove it, "
                "or choose another file."
            ) from error
        if fingerprint != self._fingerprint:
            raise UserError(
                f"{path} holds the parts of another measurement: its model, data, attack or "
                "options differ. Remove it to start anew, or choose another file."
            )
        return parts


def fingerprint(model: nn.Module, tensors: list[Tensor], settings: Mapping[str, Any]) -> str:
    """A hash of a model's weights and buffers, some tensors and settings."""
    digest = hashlib.sha256(tensors_digest(model.state_dict()).encode())
    for tensor in tensors:
        digest.update(_bytes(tensor))
    digest.update(json.dumps(settings, sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def tensors_digest(state: Mapping[str, Any]) -> str:
    """A hash of a state dict's names and tensors."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return (
        f"{tensor.dtype}{tuple(tensor.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()
    )
