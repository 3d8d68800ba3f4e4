"""Owns adversarial examples in a file: kept while attacks run, saved, and read again."""

from __future__ import annotations

import io
import math
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustflat.errors import UserError
from robustflat.evaluate.examples import Examples
from robustflat.evaluate.record import Record
from robustflat.evaluate.threat import Threat
from robustflat.evaluate.verdict import SLACK, size
from robustflat.files import write_whole, writing


@dataclass(frozen=True, kw_only=True, eq=False)
class Adversarial:
    """Adversarial examples, as an .npz file holds them under these names.

    Attributes:
        positions: Where each stands in the data, int64 [N].
        x_adv: float32 [N, C, H, W]: the image with which the first attack broke it; of one that
            stands, the last that was tried; of one misclassified anyway, itself.
        labels: int64 [N].
        predictions: What the attacked model takes `x_adv` for, int64 [N].
        threat: In the file `norm`, such as "linf", and `eps`.
        model: SHA-256 of the attacked model's weights.
    """

    positions: Tensor
    x_adv: Tensor
    labels: Tensor
    predictions: Tensor
    threat: Threat
    model: str

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            UserError: If it cannot be written.
        """
        content = io.BytesIO()
        np.savez(
            content,
            positions=self.positions.numpy(),
            x_adv=self.x_adv.numpy(),
            labels=self.labels.numpy(),
            predictions=self.predictions.numpy(),
            norm=np.array(self.threat.norm_name),
            eps=np.array(self.threat.eps),
            model=np.array(self.model),
        )
        with writing(path):
            write_whole(path, content.getvalue())

    @classmethod
    def load(cls, path: Path) -> Adversarial:
        """Read a file.

        Raises:
            UserError: If it is not such a file.
        """
        try:
            with np.load(path, allow_pickle=False) as content:
                found = cls(
                    positions=torch.from_numpy(content["positions"]).long(),
                    x_adv=torch.from_numpy(content["x_adv"]).float(),
                    labels=torch.from_numpy(content["labels"]).long(),
                    predictions=torch.from_numpy(content["predictions"]).long(),
                    threat=Threat.of(str(content["norm"]), float(content["eps"])),
                    model=str(content["model"]) if "model" in content else "",
                )
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            zipfile.BadZipFile,
        ) as error:
            said = error.args[0] if isinstance(error, KeyError) else error
            raise UserError(
                f"{path} holds no adversarial examples ({type(error).__name__}: {said}). It must "
                "be an .npz file as --save-adversarial writes it: positions, x_adv, labels, "
                "predictions, norm, eps."
            ) from error
        count = len(found.positions)
        if found.x_adv.ndim != 4 or {len(found.x_adv), len(found.labels)} != {count}:
            raise UserError(
                f"{path} is damaged: {count} positions, labels of the shape "
                f"{list(found.labels.shape)}, images of the shape {list(found.x_adv.shape)}."
            )
        return found

    def rows(self, examples: Examples, threat: Threat, path: Path) -> Tensor:
        """For each example the row of its image, -1 if there is none; int64 [N].

        Raises:
            UserError: If they were made for another threat, other images or other labels.
        """
        same = self.threat.norm == threat.norm and math.isclose(
            self.threat.eps, threat.eps, rel_tol=1e-6
        )
        if not same:
            raise UserError(
                f"The examples of {path} were made for {self.threat}, and the evaluation is for "
                f"{threat}: say --norm {self.threat.norm_name} --eps {self.threat.eps:g}, or make "
                "others."
            )
        if tuple(self.x_adv.shape[1:]) != tuple(examples.shape):
            raise UserError(
                f"The images of {path} have the shape {list(self.x_adv.shape[1:])}, those that are "
                f"evaluated {list(examples.shape)}: they are of another data set."
            )
        place = {int(position): row for row, position in enumerate(self.positions)}
        rows = torch.tensor([place.get(int(position), -1) for position in examples.positions])
        have = (rows >= 0).nonzero().flatten()
        if not len(have):
            raise UserError(
                f"{path} holds images for {len(place)} examples, and none of the {len(rows)} that "
                "are evaluated: it is of another choice of them."
            )
        other = int((self.labels[rows[have]] != examples.labels[have]).sum())
        if other:
            raise UserError(
                f"{other} of {len(have)} labels of {path} are not those of the images at their "
                "positions: it was made of another data set, or of one with other labels."
            )
        far = 0
        for some in have.split(500):
            delta = self.x_adv[rows[some]].double() - examples.images(some).double()
            far += int((~(size(delta, threat.norm) <= threat.eps * (1 + SLACK) + 1e-6)).sum())
        # A few that left the ball are the judge's business.
        if 2 * far > len(have):
            raise UserError(
                f"{far} of {len(have)} images of {path} are not within {threat} of the images at "
                "their positions: it was made of another data set."
            )
        return rows


def check_target(path: Path) -> None:
    """Refuse a file that cannot be written, before anything is paid for.

    Raises:
        UserError: If it exists, or its name does not end in .npz.
    """
    if path.suffix != ".npz":
        raise UserError(f"Adversarial examples are saved to a file that ends in .npz, got {path}.")
    if path.exists():
        raise UserError(f"{path} exists: remove it, or name another file.")
    with writing(path):
        tempfile.TemporaryFile(dir=path.parent).close()


class Pictures:
    """The images of an evaluation, one an example, in a file beside its record or in memory.

    Args:
        examples: What is evaluated.
        record: Of the attacks; if it knows of images that were kept, these are gone on with.
    """

    def __init__(self, examples: Examples, record: Record) -> None:
        self._record = record
        shape = (len(examples), *examples.shape)
        self._rows: np.ndarray[Any, Any]
        path = None if record.path is None else record.path.with_suffix(".npy")
        try:
            if path is not None and any(entry.pictured for entry in record.entries):
                self._rows = np.lib.format.open_memmap(path, mode="r+")
                return
            if path is None:
                self._rows = np.empty(shape, np.float32)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._rows = np.lib.format.open_memmap(path, "w+", np.float32, shape)
            for some in torch.arange(len(examples)).split(500):
                self._rows[some.numpy()] = examples.images(some).numpy()
        except (OSError, ValueError) as error:
            raise UserError(f"The images cannot be kept in {path}: {error}.") from error

    def keep(self, index: int, places: Tensor, broke: list[int], images: Tensor) -> None:
        """Keep what the attack at `index` of the record made of the examples at `places`.

        The first attack's image that broke an example stays; until one does, the latest does.
        """
        kept = self._record.entries
        before, ever = np.zeros((2, len(self._rows)), bool)
        for i, entry in enumerate(kept):
            if entry.pictured and i != index:
                ever[entry.broke] = True
                if i < index:
                    before[entry.broke] = True
        now = np.isin(places.numpy(), broke)
        better = np.where(now, ~before[places.numpy()], ~ever[places.numpy()])
        self._rows[places.numpy()[better]] = images.numpy()[better]
        if isinstance(self._rows, np.memmap):
            self._rows.flush()

    def all(self) -> Tensor:
        """float32 [N, C, H, W]."""
        return torch.from_numpy(np.array(self._rows))
