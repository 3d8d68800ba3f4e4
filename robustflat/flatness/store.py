"""Owns the file in which long measurements keep their finished parts, to be resumed."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.errors import UserError

FORMAT = "robustflat-flatness-parts/2"


class Store:
    """Finished parts of a measurement, by key; in memory only, or also in a file of JSON lines.

    A part is one line, added at the end; a line that was cut off is left out. A file may hold the
    parts of several measurements: each knows its own by a fingerprint.

    Args:
        path: the file, made if missing; None keeps nothing.
        fingerprint: of everything that the parts depend on.

    Raises:
        UserError: if the file is something else, or cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, fingerprint: str) -> None:
        self._path = None if path is None else Path(path)
        self._fingerprint = fingerprint
        self._parts: dict[str, Any] = {}
        self._cut_off = False
        if self._path is not None and self._path.exists():
            self._parts = self._read(self._path)

    def in_memory(self) -> Store:
        """The same parts, kept in no file."""
        kept = Store(None, self._fingerprint)
        kept._parts = dict(self._parts)
        return kept

    def get(self, key: str) -> Any | None:
        """The part of that key, or None."""
        return self._parts.get(key)

    def put(self, key: str, part: Any) -> None:
        """Keep a part (anything JSON can hold exactly; also what is not finite)."""
        self._parts[key] = part
        if self._path is None:
            return
        line = json.dumps({"format": FORMAT, "of": self._fingerprint, "key": key, "part": part})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(("\n" if self._cut_off else "") + line + "\n")
        except OSError as error:
            raise UserError(
                f"The measurement's parts cannot be kept in {self._path}: {error}."
            ) from error
        self._cut_off = False

    def _read(self, path: Path) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        try:
            text = path.read_text(encoding="utf-8")
            self._cut_off = not text.endswith("\n")
            for line in text.splitlines():
                try:
                    content = json.loads(line)
                except ValueError:
                    if not line.startswith('{"format": "' + FORMAT):
                        raise
                    continue
                if content["format"] != FORMAT:
                    raise ValueError(f"its format is not {FORMAT}")
                if content["of"] == self._fingerprint:
                    parts[content["key"]] = content["part"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} does not hold the parts of flatness measurements ({error}). Move it away, "
                "or choose another file."
            ) from error
        return parts


def fingerprint(model: nn.Module, tensors: list[Tensor], settings: Mapping[str, Any]) -> str:
    """A hash of a model (weights, buffers, modules and their source), tensors and settings."""
    digest = hashlib.sha256(tensors_digest(model.state_dict()).encode())
    # Equal weights in another network, or in one whose forward pass was edited, are another model.
    digest.update(repr(model).encode())
    for kind in sorted({type(module) for module in model.modules()}, key=repr):
        try:
            digest.update(inspect.getsource(kind).encode())
        except (OSError, TypeError):  # made by a program, such as a compiled one
            continue
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
