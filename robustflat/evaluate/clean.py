"""What a model makes of the images as they are, and which images they are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.evaluate.accuracy import right
from robustflat.evaluate.examples import Examples
from robustflat.evaluate.frozen import Plain, held
from robustflat.evaluate.record import digest_of
from robustflat.evaluate.team import Team


def classify(
    model: nn.Module, data: Examples, batch_size: int, device: torch.device, team: Team
) -> tuple[int, Tensor, Tensor, str]:
    """Classify all images.

    Returns:
        The number of classes, which are right (bool [N]), predictions (int64 [N]), and the images'
        fingerprint.

    Raises:
        UserError: If the model cannot classify them, or returns NaN, or a label has no class.
    """
    parts = torch.arange(len(data)).split(batch_size)

    def one(number: int) -> tuple[Tensor, Tensor, list[str], int]:
        positions = parts[number]
        images, labels = data.images(positions), data.labels[positions]
        logits = _logits(model, images.to(device))
        if int(labels.max()) >= logits.shape[1]:
            raise UserError(
                f"The model has {logits.shape[1]} classes, numbered from 0, but there is the label "
                f"{int(labels.max())}."
            )
        bad = logits.isnan().any(1).cpu()
        if bool(bad.any()):
            raise UserError(
                f"The model returns NaN for {int(bad.sum())} of {len(bad)} images (first: number "
                f"{int(positions[bad.nonzero()[0]])}), without any attack. It has diverged, or its "
                "weights are damaged."
            )
        correct = right(logits, labels.to(device)).cpu()
        return correct, logits.argmax(1).cpu(), _prints(images), logits.shape[1]

    found = [result for results in team.each(one, range(len(parts))) for result in results]
    correct, predictions, prints, classes = zip(*found, strict=True)
    return classes[0], torch.cat(correct), torch.cat(predictions), _joined(prints)


def fingerprint_of_images(data: Examples, batch_size: int) -> str:
    """SHA-256 of all images, as an evaluation of them keeps it."""
    parts = torch.arange(len(data)).split(batch_size)
    return _joined([_prints(data.images(positions)) for positions in parts])


def _prints(images: Tensor) -> list[str]:
    """Image by image, so that batches of other sizes have the same."""
    return [digest_of([image]) for image in images]


def _joined(prints: Sequence[Sequence[str]]) -> str:
    return hashlib.sha256("".join(chain.from_iterable(prints)).encode()).hexdigest()


def classes_of(model: nn.Module, data: Examples) -> int:
    """The number of classes, from the logits of the first image: that can be had before any work.

    Raises:
        UserError: If the model cannot classify it.
    """
    with held(model) as device:
        return _logits(Plain(model), data.images(torch.tensor([0])).to(device)).shape[1]


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    try:
        logits: Tensor = model(images)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"The model cannot classify images of the shape {list(images.shape)}: "
            f"{type(error).__name__}: {first}"
        ) from error
    if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
        raise UserError(
            f"The model must return logits of the shape [{len(images)}, classes] with at least "
            f"two classes, got {list(logits.shape)}."
        )
    return logits
