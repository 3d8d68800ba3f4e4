"""Progress on the terminal: one bar for a run, one line for each measured epoch."""

from __future__ import annotations

import time
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
from robustflat.train.listeners import Listener


class ProgressBar(Listener):
    """Shows how far a run is and, where the epoch was measured, how it fares.

    On a terminal a bar with epoch, steps, throughput and time left; elsewhere, or if asked, plain
    lines that begin with the time of day.

    Args:
        console: where to write.
        name: of the run.
        plain: lines even on a terminal.
    """

    def __init__(self, console: Console, name: str, *, plain: bool = False) -> None:
        self._console, self._name = console, name
        self._bar = console.is_terminal and not plain
        self._pace = Pace()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TextColumn("{task.fields[speed]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self._bar,
        )

    def on_start(self, epochs: int, steps: int, done: int) -> None:
        """Open the bar."""
        self._pace.start(epochs, steps, done)
        self._progress.start()
        self._task = self._progress.add_task(
            f"{self._name}  epoch {done // steps + 1}/{epochs}",
            total=epochs * steps,
            completed=done,
            speed="",
        )

    def on_step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Advance by one step."""
        self._pace.step(epoch, step, values)
        self._progress.update(
            self._task,
            completed=self._pace.done,
            description=f"{self._name}  epoch {epoch + 1}/{self._pace.epochs}",
            speed=self._pace.throughput,
        )

    def on_epoch(self, row: dict[str, Any]) -> None:
        """Print one line for a measured epoch; on no terminal also for one that is not."""
        found = figures(row)
        if not found and self._bar:
            return
        width = len(str(self._pace.epochs))
        of = "" if self._bar else f"/{self._pace.epochs}"
        parts = [f"{self._name}  epoch {row['epoch']:>{max(3, width)}}{of}", *found]
        if not self._bar:
            parts = [time.strftime("%H:%M:%S"), *parts, self._pace.throughput, self._pace.left()]
        self._progress.console.print(
            "  ".join(part for part in parts if part),
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def on_end(self) -> None:
        """Close the bar."""
        self._progress.stop()


class Pace:
    """How far a run is, how fast it goes and how long it will take at this pace."""

    def __init__(self) -> None:
        self.epochs, self.done, self.total = 0, 0, 0
        self.throughput = ""
        self._steps, self._first, self._began = 1, 0, 0.0

    def start(self, epochs: int, steps: int, done: int) -> None:
        """The run has so many epochs of so many steps, ``done`` steps of it are taken."""
        self.epochs, self._steps, self.total = epochs, steps, epochs * steps
        self.done = self._first = done
        self._began = time.monotonic()

    def step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """A step was taken, counted from 0."""
        self.done = epoch * self._steps + step + 1
        if "images_per_second" in values:
            self.throughput = f"{values['images_per_second']:,.0f} images/s"

    def left(self) -> str:
        """The time left, or nothing where it is not known."""
        taken = self.done - self._first
        if taken < 1 or self.done >= self.total:
            return ""
        return (
            f"{duration((time.monotonic() - self._began) / taken * (self.total - self.done))} left"
        )


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min or 3 h 20 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def figures(row: Mapping[str, Any]) -> list[str]:
    """How a measured epoch fares, in words; nothing of one that was not measured."""
    averaged = row.get("monitor_average")
    measured = averaged or row.get("monitor")
    if not measured or "validation" not in measured:
        return []
    parts = []
    if row["train_loss"] is not None:
        parts.append(f"loss {row['train_loss']:.3f}")
    for label, split in (("train", "train"), ("val", "validation")):
        found = measured[split]
        parts.append(f"{label} clean {found['clean_accuracy']:6.1%}")
        if "robust_accuracy" in found:
            parts.append(f"robust {found['robust_accuracy']:6.1%}")
    if averaged:
        parts.append("(averaged weights)")
    if row["is_best"]:
        parts.append("best")
    if row.get("ended"):
        parts.append(f"ends here (train.{row['ended']})")
    if row.get("alarm") and row["alarm"]["epoch"] == row["epoch"]:
        parts.append("collapsed")
    return parts


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
            console=console, transient=True, disable=not console.is_terminal,
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

    def on_set(self, name: str, done: int, total: int) -> None:
        """Of ``total`` sets of images ``done`` have been classified, the last one ``name``."""
        self._update("sets", done, total, f"{self._name}  {name}")

    def on_measure(self, progress: Measured) -> None:
        """A flatness measurement has come so far."""
        text = f"{self._name}  {progress.measure}"
        self._update("measures", progress.done, progress.total, text)

    def _update(self, key: str, done: float, total: float, text: str) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(text, total=total)
        self._progress.update(self._tasks[key], completed=done, total=total, description=text)
