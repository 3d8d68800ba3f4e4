"""Owns a study's folder: which files it holds, and how far each of its runs is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from robustflat.config import ConfigError
from robustflat.errors import UserError
from robustflat.files import locked, write_json, write_whole, writing
from robustflat.study.grid import Point
from robustflat.study.schema import StudyConfig
from robustflat.train.folder import RunFolder

State = Literal["done", "at work", "begun", "failed", "open"]


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
        self.log = runs / f"{name}.log"
        self.failure = runs / f"{name}.failed.json"
        self.row = self.folder.root / "row.json"

    @classmethod
    def of_job(cls, job: Path) -> RunFiles:
        """The run whose job file this is."""
        return cls(job.parent, job.name.removesuffix(".job.json"))

    def result(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """What was measured at the end of the run, if it is all that ``job`` asks for."""
        found = read_json(self.row)
        if found is None:
            return None
        same = found.get("circumstances") == circumstances(job)
        return found if same and set(job["measures"]) <= set(found["measures"]) else None

    def failed(self) -> str | None:
        """Why the run failed, if it did."""
        found = read_json(self.failure)
        return None if found is None else str(found.get("error"))

    def last_lines(self) -> str:
        """The end of the run's log."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-12:])

    def begun(self) -> bool:
        """Whether the run's folder holds anything that training could go on from.

        Without a checkpoint there is nothing to lose, and a run that was killed while its folder
        was being made may have left a part of its configuration.
        """
        return self.folder.last.is_file()

    def differs(self, config: Any) -> str | None:
        """Why a run that has begun cannot go on with ``config``, if it cannot."""
        if not self.begun():
            return None
        try:
            self.folder.check(config, resume=True, overwrite=False)
        except ConfigError as error:
            return f"{self.folder.config_file} is damaged: {error}"
        except UserError as error:
            return str(error)
        return None


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far a run of a study is.

    Attributes:
        run: its name.
        state: "done", "at work" (a process holds it), "begun" (to be resumed), "failed" or "open".
        text: the epochs that it has behind it, or why it failed.
    """

    run: str
    state: State
    text: str


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
        self.ledger = self.root / "ledger.csv"
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
        with writing(self.config_file):
            self.runs.mkdir(parents=True, exist_ok=True)
            write_whole(self.config_file, text)

    def files(self, name: str) -> RunFiles:
        """The files of one run."""
        return RunFiles(self.runs, name)

    def write_jobs(self, study: StudyConfig, points: Sequence[Point]) -> None:
        """Write what each run's process is to do."""
        for point in points:
            write_json(self.files(point.name).job, job_of(study, point))

    def status(self, study: StudyConfig, points: Sequence[Point]) -> list[Status]:
        """How far every run is, as the files tell."""
        return [_status(self.files(p.name), job_of(study, p)) for p in points]

    def _is_new(self) -> bool:
        """Whether nothing is here but what a first call may have made before it was killed."""
        if not self.root.exists():
            return True
        empty = not self.runs.is_dir() or not any(self.runs.iterdir())
        made = {self.runs.name, f"{self.config_file.name}.tmp", "study.tmp"}
        held = {p.name for p in self.root.iterdir() if not p.name.startswith(".")}
        return self.root.is_dir() and empty and held <= made


def job_of(study: StudyConfig, point: Point) -> dict[str, Any]:
    """What the process of a run is told."""
    return {
        "config": point.config.model_dump(mode="json"),
        "threat": point.threat.model_dump(mode="json"),
        "attack": study.attack,
        "attacks": list(study.attacks),
        "measures": list(study.measures),
    }


def circumstances(job: dict[str, Any]) -> dict[str, Any]:
    """What figures depend on beside the training; rows with others are measured anew."""
    config = job["config"]
    return {
        "threat": job["threat"],
        "attack": job["attack"],
        "attacks": job["attacks"],
        "gap_samples": config["evaluate"]["gap_samples"],
        "flatness_samples": config["flatness"]["samples"],
        "flatness_attack": config["flatness"]["attack"],
        "flatness_options": config["flatness"]["options"],
    }


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if it is missing or no such thing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _status(files: RunFiles, job: dict[str, Any]) -> Status:
    epochs = f"epoch {len(files.folder.metrics())} of {job['config']['train']['epochs']}"
    state: State
    if files.result(job) is not None:
        state, text = "done", epochs
    elif files.job.is_file() and _is_held(files.job):
        state, text = "at work", epochs
    elif (why := files.failed()) is not None:
        state, text = "failed", why.splitlines()[0]
    elif files.begun():
        state, text = "begun", epochs
    else:
        state, text = "open", ""
    return Status(run=files.name, state=state, text=text)


def _is_held(path: Path) -> bool:
    with suppress(UserError), locked(path, patience=0):
        return False
    return True
