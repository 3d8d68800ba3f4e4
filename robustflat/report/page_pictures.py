"""Owns the example images of a page: as they are, attacked, the difference, the predictions."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from robustflat.evaluate.shown import Shown, magnified
from robustflat.report.record import Record

# Larger images are brought to this, in pixels, or a page would weigh too much.
_LARGEST = 96


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One image, by its data URI; what is said below it, and whether that is wrong."""

    source: str
    alt: str
    text: str = ""
    wrong: bool = False


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Rows of images of one run, with their heads."""

    title: str
    run: int
    rows: Sequence[tuple[str, Sequence[Shot]]]


def pictures(records: Sequence[Record]) -> dict[int, Pictures]:
    """The examples of the runs that have them, at the best checkpoint if there are several."""
    return {record.index: found for record in records for found in list(_of(record))[:1]}


def _of(record: Record) -> Iterator[Pictures]:
    for checkpoint, entry in record.checkpoints.items():
        said = (entry["test"] or {}).get("examples")
        if said is None:
            continue
        shown = Shown.load(record.folder.outcomes / said["file"])
        if shown is None:
            continue
        labels = [image["label"] for image in said["images"]]
        difference, largest = magnified(shown.x, shown.x_adv)
        rows = [
            (
                head,
                [
                    Shot(
                        source=_source(image),
                        alt=f"{label}, {head}",
                        text=("" if found[kind] == label else "✗ ") + found[kind],
                        wrong=found[kind] != label,
                    )
                    for image, label, found in zip(images, labels, said["images"], strict=True)
                ],
            )
            for head, kind, images in (
                ("clean", "clean", shown.x),
                (f"attacked by {said['attack']}", "attacked", shown.x_adv),
            )
        ]
        grey = [Shot(source=_source(image), alt="") for image in difference]
        rows.append((f"difference, full scale ±{largest:.3g}", grey))
        yield Pictures(title=f"{record.name}, {checkpoint}", run=record.index, rows=rows)


def _source(image: Tensor) -> str:
    """A data URI of an image ``[C, H, W]`` in [0, 1]."""
    pixels = (255 * image.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(
        np.ascontiguousarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    )
    if max(picture.size) > _LARGEST:
        picture.thumbnail((_LARGEST, _LARGEST))
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
