"""Owns the file in which long measurements keep their finished parts, to be resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.evaluate.record import digest_of, fingerprint_of
from robustflat.files import writing

FORMAT = "robustflat-flatness-parts/2"
# The key of the logits by which a network is known again; and of how many images.
_LOGITS, PROBED = "logits", 8


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What parts depend on: weights, images and settings by a hash, the function by its logits.

    Equal weights are another network where its code has changed. Its logits are compared and not
    hashed, as the number of threads or another device changes their last digits.

    Attributes:
        mark: the hash.
        logits: on the first few images, ``[N, C]``.
        tolerance: how far logits of the same network may be apart, in the largest of them.
    """

    mark: str
    logits: list[list[float]]
    tolerance: float

    def has(self, logits: Any) -> bool:
        """Whether they are this network's (any part of a file's JSON)."""
        mine = torch.tensor(self.logits, dtype=torch.float64)
        try:
            theirs = torch.tensor(logits, dtype=torch.float64)
        except (TypeError, ValueError):
            return False
        if mine.shape != theirs.shape:
            return False
        return float((mine - theirs).abs().max()) <= self.tolerance * float(mine.abs().max())


class Store:
    """Finished parts of a measurement, by key; in memory only, or also in a file of JSON lines.

    A part is one line, added at the end; a line that was cut off is left out. A file may hold the
    parts of several measurements: each knows its own by its identity, whose logits are a part too.

    Args:
        path: the file, made if missing; None keeps nothing.
        identity: everything that the parts depend on; to be said with a path.

    Raises:
        UserError: if the file is something else, or cannot be read or written.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, identity: Identity | None = None
    ) -> None:
        self._path = None if path is None else Path(path)
        self._of = ""
        self._parts: dict[str, Any] = {}
        self._cut_off = False
        if self._path is not None:
            assert identity is not None
            self._begin(self._path, identity)

    def in_memory(self) -> Store:
        """The same parts, kept in no file."""
        kept = Store()
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
        line = json.dumps({"format": FORMAT, "of": self._of, "key": key, "part": part})
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._cut_off else "") + line + "\n")
        self._cut_off = False

    def _begin(self, path: Path, identity: Identity) -> None:
        """Find the parts of the identity, or begin them with its logits."""
        found = self._read(path, identity.mark) if path.exists() else {}
        for of, parts in found.items():
            if identity.has(parts.get(_LOGITS)):
                self._of, self._parts = of, parts
                return
        logits = hashlib.sha256(repr(identity.logits).encode()).hexdigest()
        self._of = f"{identity.mark}/{logits[:12]}"
        self.put(_LOGITS, identity.logits)

    def _read(self, path: Path, mark: str) -> dict[str, dict[str, Any]]:
        """The parts of all networks with the same weights."""
        found: dict[str, dict[str, Any]] = {}
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
                if content["of"].startswith(f"{mark}/"):
                    found.setdefault(content["of"], {})[content["key"]] = content["part"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} does not hold the parts of flatness measurements ({error}). Move it away, "
                "or choose another file."
            ) from error
        return found


def identity(model: nn.Module, tensors: list[Tensor], settings: Mapping[str, Any]) -> Identity:
    """A model's identity on some tensors, of which the first are its images, with settings."""
    place = next(model.parameters())
    parts = [fingerprint_of(model), digest_of(tensors), settings]
    text = json.dumps(parts, sort_keys=True, default=repr)
    with torch.no_grad():
        logits = model(tensors[0][:PROBED].to(place.device, place.dtype))
    return Identity(
        mark=hashlib.sha256(text.encode()).hexdigest(),
        logits=logits.double().tolist(),
        tolerance=torch.finfo(place.dtype).eps ** 0.5,
    )
