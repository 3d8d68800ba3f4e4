"""A run followed from another terminal: what it leaves of its progress, and who reads that."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from robustflat.errors import UserError
from robustflat.files import read_json, write_json
from robustflat.report.progress import ProgressBar, duration
from robustflat.train.folder import RunFolder
from robustflat.train.listeners import Listener

_EVERY = 1.0  # seconds between two writings, and between two looks
_SILENT = 60.0  # seconds after which a run that says nothing is told of


class Trace(Listener):
    """Leaves how far a run is in ``progress.json``, at most once a second.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._file = RunFolder(folder).progress_file
        self._said: dict[str, Any] = {}
        self._written = 0.0

    def on_start(self, epochs: int, steps: int, done: int) -> None:
        """The run begins."""
        self._said = {"epochs": epochs, "steps": steps, "done": done, "values": {}}
        self._write("training")

    def on_step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """A step was taken."""
        self._said["done"] = epoch * self._said["steps"] + step + 1
        self._said["values"] = dict(values) or self._said["values"]
        if time.monotonic() - self._written >= _EVERY:
            self._write("training")

    def on_epoch(self, row: dict[str, Any]) -> None:
        """An epoch was recorded; a run may end before its last."""
        if row.get("ended") or row["epoch"] == self._said["epochs"]:
            self._said["over"] = True

    def on_end(self) -> None:
        """The run is over, or stopped."""
        self._write("finished" if self._said.get("over") else "stopped")

    def _write(self, state: str) -> None:
        self._written = time.monotonic()
        # Waiting for the disk every second would delay the training, for what is old by the next.
        said = {**self._said, "state": state, "time": time.time()}
        write_json(self._file, said, durable=False)


def follow(folder: RunFolder, console: Console, *, plain: bool = False) -> str:
    """Show a run that another process trains until it ends. Returns how it ended.

    Args:
        folder: of the run.
        console: where to show it.
        plain: lines even on a terminal.

    Raises:
        UserError: if it is no run, or one that left no trace.
    """
    folder.read_config()
    said = _read(folder)
    if said is None:
        raise UserError(
            f"{folder.progress_file} does not exist, so there is nothing to follow. Name a run "
            "that `robustflat train` has begun."
        )
    bar = ProgressBar(console, folder.name, plain=plain)
    bar.on_start(said["epochs"], said["steps"], said["done"])
    told, silent = 0, False
    try:
        while True:
            said = _read(folder) or said
            # Looked at before the rows: a run that has ended has written them all.
            state = str(said["state"])
            if said["done"]:
                epoch, step = divmod(said["done"] - 1, said["steps"])
                bar.on_step(epoch, step, said["values"])
            rows = folder.metrics()
            if rows and rows[-1]["epoch"] < told:  # it went back, or was begun anew
                told = 0
            for row in rows:
                if row["epoch"] > told:
                    bar.on_epoch(row)
                    told = row["epoch"]
            if state != "training":
                return state
            age = time.time() - said["time"]
            if age > _SILENT and not silent:
                console.print(
                    f"no sign of life for {duration(age)}: a long step or measurement, or the "
                    "process was killed; then go on with --resume",
                    style="yellow",
                    markup=False,
                )
            silent = age > _SILENT
            time.sleep(_EVERY)
    finally:
        bar.on_end()


def _read(folder: RunFolder) -> dict[str, Any] | None:
    with suppress(UserError, TypeError):
        found: dict[str, Any] = read_json(folder.progress_file)
        if {"epochs", "steps", "done", "values", "state", "time"} <= set(found):
            return found  # Everything that is used is there.
    return None
