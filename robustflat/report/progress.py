"""Progress on the terminal: one bar for a run, one line for each measured epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from robustflat.flatness import Progress as Measured


class ProgressBar:
    """Shows how far a run is and, where the epoch was measured, how it fares.

    Args:
        console: where to write.
        name: of the run.
    """

    def __init__(self, console: Console, name: str) -> None:
        self._name = name
        self._steps = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )

    def on_start(self, epochs: int, steps: int, done: int) -> None:
        """Open the bar."""
        self._steps = steps
        self._progress.start()
        self._task = self._progress.add_task(self._name, total=epochs * steps, completed=done)

    def on_step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Advance by one step."""
        self._progress.update(self._task, completed=epoch * self._steps + step + 1)

    def on_epoch(self, row: dict[str, Any]) -> None:
        """Print one line for a measured epoch."""
        measured = row["monitor_average"] or row["monitor"]
        if not measured or "validation" not in measured:
            return
        parts = [f"{self._name}  epoch {row['epoch']:>3}"]
        if row["train_loss"] is not None:
            parts.append(f"loss {row['train_loss']:.3f}")
        for label, split in (("train", "train"), ("val", "validation")):
            figures = measured[split]
            parts.append(f"{label} clean {figures['clean_accuracy']:6.1%}")
            if "robust_accuracy" in figures:
                parts.append(f"robust {figures['robust_accuracy']:6.1%}")
        parts.append("best" if row["is_best"] else "")
        if row.get("alarm") and row["alarm"]["epoch"] == row["epoch"]:
            parts.append("collapsed")
        self._progress.console.print(
            "  ".join(parts).rstrip(), highlight=False, markup=False, soft_wrap=True
        )

    def on_end(self) -> None:
        """Close the bar."""
        self._progress.stop()


class Counter:
    """A bar for work whose parts are counted: the batches of attacks, the passes of measures.

    Args:
        console: where to write.
        name: of the run.
    """

    def __init__(self, console: Console, name: str) -> None:
        self._name = name
        self._progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn(),
            console=console, transient=True,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Counter:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def on_attack(self, attack: str, done: int, total: int, standing: int) -> None:
        """An attack finished ``done`` of ``total`` batches; ``standing`` examples withstand."""
        self._update(attack, done, total, f"{self._name}  {attack}: {standing} standing")

    def on_measure(self, progress: Measured) -> None:
        """A flatness measurement has come so far."""
        text = f"{self._name}  {progress.measure}"
        self._update("measures", progress.done, progress.total, text)

    def _update(self, key: str, done: float, total: float, text: str) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(text, total=total)
        self._progress.update(self._tasks[key], completed=done, total=total, description=text)
