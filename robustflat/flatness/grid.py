"""Owns what a landscape is: losses and accuracies on a grid, saved as npz and JSON."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustflat.errors import UserError
from robustflat.files import json_safe

FORMAT = "robustflat-landscape/1"
Grid = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """Losses and accuracies on a line or a grid of weights.

    Attributes:
        axes: the coordinates along each of one or two axes.
        names: of the axes.
        losses: mean loss by kind ("clean", "robust", "robust_fixed"), ``[A]`` or ``[A, B]``; NaN
            where it is not finite.
        accuracies: share classified rightly, likewise.
        points: coordinates of the model or of the checkpoints.
        about: directions, parameters, seed, examples, attack and so on; ready for JSON.
    """

    axes: tuple[list[float], ...]
    names: tuple[str, ...]
    losses: Mapping[str, Grid]
    accuracies: Mapping[str, Grid]
    points: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Keys ``format, axes, names, losses, accuracies, points, about``; NaN becomes null."""
        safe: dict[str, Any] = json_safe(
            {
                **self._header(),
                "axes": list(self.axes),
                "losses": {k: v.tolist() for k, v in self.losses.items()},
                "accuracies": {k: v.tolist() for k, v in self.accuracies.items()},
            }
        )
        return safe

    def save(self, path: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write ``path`` with the endings .npz and .json; both hold all of it.

        The npz has ``axis_0`` (and ``axis_1``), ``loss_KIND``, ``accuracy_KIND``, and the rest as
        JSON text in ``header``.
        """
        arrays: dict[str, Any] = {f"axis_{i}": np.array(axis) for i, axis in enumerate(self.axes)}
        arrays |= {f"loss_{kind}": grid for kind, grid in self.losses.items()}
        arrays |= {f"accuracy_{kind}": grid for kind, grid in self.accuracies.items()}
        stem = Path(path)
        stem = stem.with_suffix("") if stem.suffix in (".npz", ".json") else stem
        packed, text = (stem.with_name(stem.name + ending) for ending in (".npz", ".json"))
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(packed, header=json.dumps(json_safe(self._header())), **arrays)
            text.write_text(json.dumps(self.to_dict(), allow_nan=False, indent=1))
        except OSError as error:
            raise UserError(f"The landscape cannot be written to {stem}: {error}.") from error
        return packed, text

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Landscape:
        """Read what :meth:`save` wrote, from either file.

        Raises:
            UserError: if the file holds no landscape.
        """
        try:
            return _from_npz(path) if Path(path).suffix == ".npz" else _from_json(path)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} does not hold a landscape: {error}.") from error

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "names": self.names,
            "points": self.points,
            "about": self.about,
        }


def _from_json(path: str | os.PathLike[str]) -> Landscape:
    content = json.loads(Path(path).read_text())
    return _landscape(
        content,
        content["axes"],
        {k: np.array(v, dtype=np.float64) for k, v in content["losses"].items()},
        {k: np.array(v, dtype=np.float64) for k, v in content["accuracies"].items()},
    )


def _from_npz(path: str | os.PathLike[str]) -> Landscape:
    with np.load(path, allow_pickle=False) as arrays:
        return _landscape(
            json.loads(str(arrays["header"])),
            [arrays[f"axis_{i}"].tolist() for i in range(2) if f"axis_{i}" in arrays],
            {k.removeprefix("loss_"): arrays[k] for k in arrays if k.startswith("loss_")},
            {k.removeprefix("accuracy_"): arrays[k] for k in arrays if k.startswith("accuracy_")},
        )


def _landscape(
    header: dict[str, Any],
    axes: list[list[float]],
    losses: dict[str, Grid],
    accuracies: dict[str, Grid],
) -> Landscape:
    if header["format"] != FORMAT:
        raise ValueError(f"its format is {header['format']!r}, not {FORMAT!r}")
    shape = tuple(map(len, axes))
    if not losses or any(g.shape != shape for g in (*losses.values(), *accuracies.values())):
        raise ValueError("its grids do not fit its axes")
    return Landscape(
        axes=tuple(axes),
        names=tuple(header["names"]),
        losses=losses,
        accuracies=accuracies,
        points={label: tuple(at) for label, at in header["points"].items()},
        about=header["about"],
    )
