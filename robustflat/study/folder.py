"""Owns a study's folder: which files it holds, and which of its runs are finished or failed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from robustflat.config import ConfigError
from robustflat.errors import UserError
from robustflat.files import write_json, write_whole
from robustflat.study.schema import StudyConfig
from robustflat.train.folder import RunFolder


class RunFiles:
    """The files of one run of a study: its folder, and what stands beside it.

    Args:
        runs: the study's folder of runs.
        name: of the run.
    """

    def __init__(self, runs: Path, name: str) -> None:
        self.name = name
        self.folder = RunFolder(runs / name)
        self.job = runs / f"{name}.job.json"
        self.lock = runs / f"{name}.lock"
        self.log = runs / f"{name}.log"
        self.failure = runs / f"{name}.failed.json"
        self.measured = self.folder.root / "measured.json"

    @classmethod
    def of_job(cls, job: Path) -> RunFiles:
        """The run whose job file this is."""
        return cls(job.parent, job.name.removesuffix(".job.json"))

    def result(
        self, attacks: Sequence[str], measures: Sequence[str], epochs: int
    ) -> dict[str, Any] | None:
        """What was measured at the end of the run, if it is all that is asked for."""
        found = read_json(self.measured)
        if found is None or found.get("epoch") != epochs:
            return None
        whole = found.get("attacks") == list(attacks) and set(measures) <= set(found["measures"])
        return found if whole else None

    def failed(self) -> str | None:
        """Why the run failed, if it did."""
        found = read_json(self.failure)
        return None if found is None else str(found.get("error"))

    def fail(self, error: str) -> None:
        """Note why the run failed."""
        write_json(self.failure, {"run": self.name, "error": error})


class StudyFolder:
    """The files of one study.

    Args:
        study: whose folder ``output/name`` it is.
    """

    def __init__(self, study: StudyConfig) -> None:
        self.root = Path(study.output) / study.name
        self.config_file = self.root / "study.yaml"
        self.result = self.root / "study.json"
        self.table = self.root / "study.txt"
        self.plots = self.root / "plots"
        self.runs = self.root / "runs"

    def prepare(self, study: StudyConfig) -> None:
        """Make the folder, or go on with the one that is there.

        Raises:
            UserError: if it is something else, or cannot be written.
        """
        if not self.config_file.is_file() and not self._is_new():
            raise UserError(
                f"{self.root} exists and is not the folder of a study (it has no "
                f"{self.config_file.name}). Choose another name or output."
            )
        text = yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            write_whole(self.config_file, text)
        except OSError as error:
            raise UserError(
                f"The study's folder {self.root} cannot be written: {error}. Choose another output."
            ) from None

    def files(self, name: str) -> RunFiles:
        """The files of one run."""
        return RunFiles(self.runs, name)

    def _is_new(self) -> bool:
        """Whether nothing is here but what a first call may have made before it was killed."""
        if not self.root.exists():
            return True
        made = (self.runs, self.config_file.with_suffix(".tmp"))
        empty = not self.runs.is_dir() or not any(self.runs.iterdir())
        return self.root.is_dir() and empty and all(p in made for p in self.root.iterdir())


def begun(folder: RunFolder) -> bool:
    """Whether a run's folder holds anything that training could go on from.

    Without a checkpoint there is nothing to lose, and a run that was killed while its folder was
    being made may have left a part of its configuration.
    """
    return folder.last.is_file()


def check_same(files: RunFiles, config: Any) -> str | None:
    """Why a run that has begun cannot go on with ``config``, if it cannot."""
    if not begun(files.folder):
        return None
    try:
        files.folder.check(config, resume=True, overwrite=False)
    except ConfigError as error:
        return f"{files.folder.config_file} is damaged: {error}"
    except UserError as error:
        return str(error)
    return None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if it is missing or no such thing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
