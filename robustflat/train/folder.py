"""A run's folder: which files it holds, and that nothing in it is lost by accident."""

from __future__ import annotations

import json
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from robustflat.config import RunConfig, read_config, write_config
from robustflat.config.choice import plugins
from robustflat.errors import UserError
from robustflat.files import json_safe, locked, readable, write_json, write_text
from robustflat.plugins import origin

_PACKAGES = ("robustflat", "torch", "torchvision", "numpy", "pyautoattack", "torchattacks")
# What changes no weight of a run: where it is made, and how it is measured afterwards.
_FREE_TO_CHANGE = (
    ("device",), ("data", "root"), ("data", "download"), ("data", "place"), ("data", "workers"),
    ("output",),
    ("evaluate",), ("flatness",),
    ("listeners",), ("monitor", "step_every"), ("monitor", "pictures_every"),
)  # fmt: skip


class RunFolder:
    """The files of one run.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.config_file = self.root / "config.yaml"
        self.environment_file = self.root / "environment.json"
        self.metrics_file = self.root / "metrics.jsonl"
        self.progress_file = self.root / "progress.json"
        self.last = self.root / "checkpoints" / "last.pt"
        self.best = self.root / "checkpoints" / "best.pt"
        self.good = self.root / "checkpoints" / "good.pt"
        self.evaluation = self.root / "evaluation.json"
        self.outcomes = self.root / "outcomes"
        self.flatness = self.root / "flatness.json"
        self.curves = self.root / "curves.json"
        self.corruptions = self.root / "corruptions.json"
        self.landscapes = self.root / "landscapes"

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.root.resolve().name

    @property
    def records(self) -> dict[Path, str]:
        """The files of what was measured that are there, with the command that writes each."""
        commands = {
            self.evaluation: "evaluate", self.flatness: "flatness", self.curves: "evaluate",
            self.corruptions: "corruptions",
        }  # fmt: skip
        return {path: command for path, command in commands.items() if path.is_file()}

    def read_config(self) -> RunConfig:
        """The resolved configuration of the run.

        Raises:
            UserError: if the folder is missing or is no run.
        """
        if not self.config_file.is_file():
            what = "is not the folder of a run" if self.root.is_dir() else "does not exist"
            raise UserError(
                f"{self.root} {what}: there is no {self.config_file}. Name a folder that "
                "`robustflat train` wrote, or in which a model's results are kept."
            )
        return read_config(self.config_file)

    def check(self, config: RunConfig, *, resume: bool, overwrite: bool) -> None:
        """See whether ``config`` can be run here; changes nothing.

        Raises:
            UserError: if the folder is in use and neither ``resume`` nor ``overwrite`` is given,
                or it belongs to another configuration.
        """
        try:
            self.root.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return
        except (OSError, ValueError) as error:
            raise UserError(
                f"The run folder {str(self.root)!r} cannot be used: {error}. Choose another output "
                "folder."
            ) from None
        if resume and self.config_file.is_file():
            self._check_same(config)
            return
        if self.root.exists() and not self.root.is_dir():
            raise UserError(
                f"{self.root} is a file, and a run needs a folder. Choose another name."
            )
        if not self._is_begun():
            return
        if not overwrite:
            raise UserError(
                f"The run folder {self.root} already exists. Go on with it with --resume, replace "
                "it with --overwrite, or choose another name."
            )
        if not self.config_file.is_file():
            raise UserError(
                f"{self.root} is not the folder of a run (it has no config.yaml), so --overwrite "
                "leaves it alone. Choose another name or empty it yourself."
            )

    def written_by_one(self) -> AbstractContextManager[None]:
        """Hold the folder against every other process that trains in it.

        Raises:
            UserError: on entering, if another one holds it, or it cannot be written.
        """
        # A process that was just killed may need a moment to let go.
        return locked(self.root, patience=2.0)

    def prepare(
        self, config: RunConfig, *, resume: bool, machines: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Make the folder ready, after :meth:`check`; unless ``resume``, clear an earlier run.

        Args:
            config: the run.
            resume: leave what an earlier run left.
            machines: :func:`machine` of every process, for environment.json.

        Raises:
            UserError: if the folder cannot be written.
        """
        if resume and self.config_file.is_file():
            return
        try:
            if self.root.is_dir():
                self._clear()
            self.last.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.environment_file, environment(machines or [machine("cpu")], config))
            # Last and whole, because it makes this the folder of a run.
            write_config(config, self.config_file)
        except OSError as error:
            raise self._unwritable(error) from None

    def event_files(self) -> list[Path]:
        """TensorBoard's files: the run's own, and those of its splits in folders of their own."""
        name = "events.out.tfevents.*"
        return [*self.root.glob(name), *self.root.glob(f"*/{name}")]

    def known_as(self, tracker: str) -> Path:
        """The file that says what a tracker, such as mlflow, calls this run."""
        return self.root / f"{tracker}.id"

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, one for each epoch; a half-written last line is left out.

        Raises:
            UserError: if any other is damaged, or the file cannot be read.
        """
        if not self.metrics_file.is_file():
            return []
        with readable(self.metrics_file):
            lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and "epoch" in row:
                rows.append(row)
            elif number < len(lines):
                raise UserError(
                    f"{self.metrics_file} is damaged in line {number}: it is no JSON object with "
                    "an epoch. Remove that line; its epoch will be missing from the curves."
                )
        return rows

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add a row, replacing any of the same or a later epoch (left by an interrupted run)."""
        rows = [old for old in self.metrics() if old["epoch"] < row["epoch"]]
        text = "".join(json.dumps(json_safe(r), allow_nan=False) + "\n" for r in [*rows, row])
        write_text(self.metrics_file, text)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"The run folder {self.root} cannot be written: {error}. Choose another output folder."
        )

    def _check_same(self, config: RunConfig) -> None:
        old, new = (
            dict(flattened(c.model_dump(mode="json"))) for c in (self.read_config(), config)
        )
        different = sorted(
            ".".join(key)
            for key in old.keys() | new.keys()
            if old.get(key) != new.get(key) and not free_to_change(key)
        )
        if different:
            raise UserError(
                f"The run folder {self.root} was begun with another configuration; they differ in "
                f"{', '.join(different)}. Resume with {self.config_file}, or choose another name."
            )

    def _is_begun(self) -> bool:
        """Whether more is here than :meth:`prepare` leaves if it is killed."""
        if not self.root.is_dir():
            return False
        first = {"checkpoints", self.environment_file.name}
        # What was being written aside when it was killed counts for nothing.
        held = {p.name for p in self.root.iterdir() if p.suffix != ".tmp"}
        return not held <= first or any(self.last.parent.glob("*"))

    def _clear(self) -> None:
        """Remove what runs write, and nothing else; config.yaml last, in case this is killed."""
        for path in (self.last.parent, self.outcomes, self.landscapes, self.root / "wandb"):
            if path.is_dir():
                shutil.rmtree(path)
        for path in self.event_files():
            path.unlink()
            if path.parent != self.root and not any(path.parent.iterdir()):
                path.parent.rmdir()
        single = [
            self.environment_file,
            self.metrics_file,
            self.progress_file,
            self.evaluation,
            self.flatness,
            self.curves,
            self.corruptions,
            *(self.known_as(tracker) for tracker in ("mlflow", "wandb")),
        ]
        parts = [*self.root.glob("flatness.parts.jsonl")]
        parts += [*self.root.glob("evaluate.log"), *self.root.glob(".*.json.lock")]
        for path in [*single, *parts, self.config_file]:
            path.unlink(missing_ok=True)


def machine(device: str) -> dict[str, Any]:
    """What a process computes on: its host, and the name of its GPU if ``device`` is one."""
    on_gpu = device.startswith("cuda")
    return {
        "host": socket.gethostname(),
        "device": device,
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
    }


def environment(
    machines: Sequence[dict[str, Any]], config: RunConfig | None = None
) -> dict[str, Any]:
    """What a result may depend on beside the configuration: versions, machines, one's own code.

    Args:
        machines: :func:`machine` of every process that trains together, by rank.
        config: which names the code of one's own.
    """
    named = {} if config is None else plugins(config)
    return {
        "plugins": {where: f"{name} ({origin(name)})" for where, name in named.items()},
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda": next((m["gpu"] for m in machines if m["gpu"]), None),
        "processes": list(machines),
        "commit": _commit(),
        "command": sys.argv,
    }


def free_to_change(key: tuple[str, ...]) -> bool:
    """Whether a setting, by the path of its key, changes no weight of a run."""
    return any(key[: len(free)] == free for free in _FREE_TO_CHANGE)


def flattened(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The innermost keys of nested mappings, as paths, and their values."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flattened(inner, (*at, key))
    else:
        yield at, value


def versions() -> dict[str, str | None]:
    """Of the packages on which figures depend; None of one that is not installed."""
    found: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _commit() -> str | None:
    """The commit of the checkout this package runs from, if it runs from one."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
