"""Owns what a landscape is: losses and accuracies on a grid of weights, kept as one JSON file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from robustflat.errors import UserError
from robustflat.files import json_safe, write_json

FORMAT = "robustflat-landscape/2"
Grid = NDArray[np.float64]
Quantity = Literal["losses", "accuracies"]
# A landscape replaces an earlier one that differs in its weights and in these alone.
_INCIDENTAL = ("epoch", "device", "versions")


@dataclass(frozen=True, kw_only=True, eq=False)
class Landscape:
    """Losses and accuracies on a line (one axis) or a plane (two) of weights.

    The file is a JSON object with the attributes as keys, ``format`` and, to be read by people,
    ``kind`` and ``complete``.

    Attributes:
        axes: the coordinates along each axis, ``[A]`` or ``[A], [B]``.
        names: of the axes.
        losses: mean loss by kind ("clean", "robust": examples remade at every point,
            "robust_fixed": those of the centre), ``[draws, A]`` or ``[draws, A, B]``. Each draw has
            random directions of its own. NaN (null in the file) where it is not finite, or not
            measured yet.
        accuracies: the share classified rightly, likewise.
        points: the coordinates of the model ("model"), or of checkpoints by name.
        about: the circumstances: ``directions, direction_loss, parameters, grid`` (points along
            each axis), ``draws, span`` (``margin``, between checkpoints), ``seed, norm, eps,
            attack, attack_settings, losses, examples, batch_size, batchnorm, dtype, device,
            versions``; of a run or a named model also ``subject, checkpoint, epoch, weights, data,
            split``.
        measured: how many values of each grid are known, in the order of the file.
        fingerprint: of all that the values depend on, weights and images included.
        logits: the model's on the first few images, by which its function is known again.
    """

    axes: tuple[list[float], ...]
    names: tuple[str, ...]
    losses: Mapping[str, Grid]
    accuracies: Mapping[str, Grid]
    points: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    measured: int
    fingerprint: str = ""
    logits: list[list[float]] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What it is: "line" or "plane"; through checkpoints "between-line", "between-plane"."""
        between = "between-" if self.about.get("directions") == "checkpoints" else ""
        return between + ("line" if len(self.axes) == 1 else "plane")

    @property
    def draws(self) -> int:
        """How many random directions (pairs, of a plane) it was drawn along."""
        return len(next(iter(self.losses.values())))

    @property
    def complete(self) -> bool:
        """Whether every point is measured."""
        return self.measured == next(iter(self.losses.values())).size

    @property
    def lost(self) -> str:
        """How many of its losses are not finite, "4 of 5"; "" if none."""
        grids = np.concatenate([grid.ravel() for grid in self.losses.values()])
        count = int(np.isnan(grids).sum())
        return f"{count} of {len(grids)}" if count else ""

    def mean(self, quantity: Quantity = "losses") -> dict[str, Grid]:
        """The mean over the draws, by kind of loss: ``[A]`` or ``[A, B]``."""
        return {kind: grid.mean(axis=0) for kind, grid in getattr(self, quantity).items()}

    def spread(self, quantity: Quantity = "losses") -> dict[str, Grid]:
        """The sample standard deviation over the draws, likewise; empty for a single draw."""
        if self.draws == 1:
            return {}
        return {kind: grid.std(axis=0, ddof=1) for kind, grid in getattr(self, quantity).items()}

    @property
    def asked(self) -> Any:
        """All that tells landscapes apart, but for the weights and what is incidental."""
        about = {key: value for key, value in self.about.items() if key not in _INCIDENTAL}
        return json_safe([self.kind, about])

    @property
    def filename(self) -> str:
        """Its name among other landscapes: the kind, the directions, and a mark of the rest."""
        mark = hashlib.sha256(json.dumps(self.asked, sort_keys=True).encode()).hexdigest()
        directions = str(self.about.get("directions", "given"))
        return f"{self.kind}-{directions}-{mark[:8]}.json"

    def to_dict(self) -> dict[str, Any]:
        """What its file holds; NaN is null."""
        grids = {
            quantity: {kind: grid.tolist() for kind, grid in getattr(self, quantity).items()}
            for quantity in ("losses", "accuracies")
        }
        rest = ("axes", "names", "points", "about", "measured", "fingerprint", "logits")
        found: dict[str, Any] = json_safe(
            {
                "format": FORMAT,
                "kind": self.kind,
                "complete": self.complete,
                **{key: getattr(self, key) for key in rest},
                **grids,
            }
        )
        return found

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write its file, whole or not at all.

        Raises:
            UserError: if it cannot be written.
        """
        write_json(target := Path(path), self.to_dict())
        return target

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Landscape:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: if the file holds no landscape.
        """
        try:
            return _read(json.loads(Path(path).read_text("utf-8")))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} does not hold a landscape: {error}. Remove it and draw it anew."
            ) from None


def drawn_in(folder: Path) -> list[Landscape]:
    """The complete landscapes in a folder, the latest written last; none if there is no folder.

    Raises:
        UserError: if a file in it is damaged.
    """
    files = sorted(folder.glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return [found for found in map(Landscape.load, files) if found.complete]


def _read(content: Any) -> Landscape:
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
    losses, accuracies = (
        {kind: np.array(grid, dtype=np.float64) for kind, grid in content[quantity].items()}
        for quantity in ("losses", "accuracies")
    )
    grids = [*losses.values(), *accuracies.values()]
    shape = tuple(map(len, content["axes"]))
    if not losses or any(g.shape != (len(grids[0]), *shape) for g in grids):
        raise ValueError("its grids do not fit its axes")
    return Landscape(
        axes=tuple(content["axes"]),
        names=tuple(content["names"]),
        losses=losses,
        accuracies=accuracies,
        points={label: tuple(at) for label, at in content["points"].items()},
        about=content["about"],
        measured=content["measured"],
        fingerprint=content["fingerprint"],
        logits=content.get("logits", []),
    )
