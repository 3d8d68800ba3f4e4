"""TensorBoard: the curves of a run, or nothing at all when it is switched off."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

_OPTIMISATION = ("train_loss", "gradient_norm", "lr", "skipped_steps", "seconds")


class TensorBoard:
    """TensorBoard: writes each epoch's row of metrics as scalars, the x axis counting epochs.

    Robust accuracy of train and validation and their difference, the robust-generalization gap,
    stand in one chart each.

    Args:
        folder: of the run; the event files go into its ``tensorboard``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writer: SummaryWriter | None = None

    def on_start(self, epochs: int, steps: int, done: int) -> None:
        """Open the files; a resumed run replaces the points after ``done``."""
        self._writer = SummaryWriter(
            str(self._folder), purge_step=done // steps + 1 if done else None
        )

    def on_step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Steps are not written."""

    def on_epoch(self, row: dict[str, Any]) -> None:
        """Write one epoch."""
        for tag, value in scalars(row).items():
            assert self._writer is not None
            self._writer.add_scalar(tag, value, row["epoch"])
        assert self._writer is not None
        self._writer.flush()

    def on_end(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The named scalars of one row of metrics.jsonl, gaps included."""
    found = {f"optimisation/{key}": row[key] for key in _OPTIMISATION if row[key] is not None}
    for suffix, key in (("", "monitor"), ("_average", "monitor_average")):
        measured = row.get(key) or {}
        for split, figures in measured.items():
            for name, value in figures.items():
                found[f"{name}/{split}{suffix}"] = value
        if "validation" in measured and "robust_loss" in measured["train"]:
            train, held_out = measured["train"], measured["validation"]
            found[f"robust_gap/accuracy{suffix}"] = (
                train["robust_accuracy"] - held_out["robust_accuracy"]
            )
            found[f"robust_gap/loss{suffix}"] = held_out["robust_loss"] - train["robust_loss"]
    for name, value in (row.get("flatness") or {}).items():
        if value is not None:
            found[f"flatness/{name}"] = value
    return found
