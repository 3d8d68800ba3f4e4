"""Label unlabelled images with the classes that a run's network gives them (Carmon et al. 2019).

    python scripts/pseudo_label.py runs/standard data/unlabelled

Beside every image*.npy of the folder (uint8, [N, H, W, C]) it writes label*.npy, as data.extra.path
wants it. Images are read a batch at a time. A label file that is there already is left alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from robustflat.data import StoredArray
from robustflat.data.images import to_float
from robustflat.errors import UserError
from robustflat.subject import open_subject


def pseudo_label(run: Path, folder: Path, checkpoint: str, device: str, batch_size: int) -> None:
    """Write the labels that are missing.

    Raises:
        UserError: If there is nothing to label, or the images are not the network's.
    """
    files = sorted(folder.glob("image*.npy"))
    if not files:
        raise UserError(f"The folder {folder} holds no image*.npy, uint8 of shape [N, H, W, C].")
    subject = open_subject(str(run), device=device)
    model = subject.network(checkpoint).model
    (channels, height, width) = subject.images().shape
    for file in files:
        target = file.with_name(file.name.replace("image", "label", 1))
        if target.exists():
            print(f"{target} is there already")
            continue
        try:
            images = StoredArray.find(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{file} could not be read: {error}.") from None
        if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels):
            raise UserError(
                f"{file} must be uint8 of shape [N, {height}, {width}, {channels}] as {run} was "
                f"trained on, got {images.dtype} of shape {list(images.shape)}."
            )
        labels = np.empty(len(images), np.uint16)
        for start in range(0, len(images), batch_size):
            rows = np.arange(start, min(start + batch_size, len(images)))
            pixels = np.empty((len(rows), height, width, channels), np.uint8)
            images.read(rows, pixels)
            x = to_float(torch.from_numpy(pixels).to(subject.device).permute(0, 3, 1, 2))
            with torch.no_grad():
                labels[rows] = model(x).argmax(1).cpu().numpy()
        aside = target.with_suffix(".part.npy")
        np.save(aside, labels)
        aside.replace(target)
        counts = ", ".join(map(str, np.bincount(labels)))
        print(f"{target}: {len(labels)} labels, by class {counts}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", default="best", choices=("best", "last"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=500)
    given = parser.parse_args()
    try:
        pseudo_label(given.run, given.folder, given.checkpoint, given.device, given.batch_size)
    except UserError as error:
        sys.exit(f"error: {error}")
