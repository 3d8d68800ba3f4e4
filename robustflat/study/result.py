"""Owns what a study found: every run's figures, and how each measure ranks each gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from robustflat.files import write_json
from robustflat.study.folder import StudyFolder
from robustflat.study.grid import Level, Point
from robustflat.study.ranking import Granulated, Tau, granulated, tau
from robustflat.study.schema import StudyConfig


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One finished run.

    Attributes:
        run: its name.
        factors: its levels.
        measured: as its worker wrote it: ``gap`` (train-test at the last checkpoint, each figure
            with its interval), ``splits``, ``test``, ``measures``, ``norm``, ``eps``, ``seconds``.
    """

    run: str
    factors: dict[str, Level]
    measured: dict[str, Any]

    def gap(self, target: str) -> float | None:
        """A figure of the robust-generalization gap; None if it is not finite."""
        value: float | None = self.measured["gap"][target]["value"]
        return value

    def measure(self, name: str) -> float | None:
        """A flatness measure; None if it is not finite."""
        value: float | None = self.measured["measures"][name]["value"]
        return value


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that failed, and why."""

    run: str
    factors: dict[str, Level]
    error: str


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How a measure orders the runs compared with a figure of the gap."""

    tau: Tau
    granulated: Granulated

    def to_dict(self) -> dict[str, Any]:
        """Keys ``tau``, ``low``, ``high``, ``p_value``, ``runs`` and ``granulated``."""
        overall = asdict(self.tau)
        return {"tau": overall.pop("value"), **overall, "granulated": asdict(self.granulated)}


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """A study's outcome.

    Attributes:
        study: its configuration.
        folder: where it is.
        runs: the finished runs, in the order of the grid.
        failed: the others.
        rankings: by target, then by measure.
    """

    study: StudyConfig
    folder: Path
    runs: list[RunResult]
    failed: list[Failure]
    rankings: dict[str, dict[str, Ranking]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: stable keys, null for what is not known."""
        return {
            "study": self.study.name,
            "complete": not self.failed,
            "factors": list(self.study.factor_paths()),
            "nested": self.study.nesting(),
            "measures": list(self.study.measures),
            "attacks": list(self.study.attacks),
            "targets": list(self.study.targets),
            "runs": [
                {
                    "run": r.run,
                    "factors": r.factors,
                    "folder": f"runs/{r.run}",
                    **{key: value for key, value in r.measured.items() if key != "run"},
                }
                for r in self.runs
            ],
            "failed": [asdict(f) for f in self.failed],
            "rankings": {
                target: {measure: ranking.to_dict() for measure, ranking in by_measure.items()}
                for target, by_measure in self.rankings.items()
            },
        }


def collect(study: StudyConfig, points: Sequence[Point], folder: StudyFolder) -> StudyResult:
    """Read back what the runs left, rank, and write ``study.json``."""
    runs: list[RunResult] = []
    failed: list[Failure] = []
    for point in points:
        files = folder.files(point.name)
        measured = files.result(study.attacks, study.measures, point.config.train.epochs)
        if measured is None:
            error = files.failed() or "It left no result. Repeat the command."
            failed.append(Failure(run=point.name, factors=point.factors, error=error))
        else:
            runs.append(RunResult(run=point.name, factors=point.factors, measured=measured))
    rankings: dict[str, dict[str, Ranking]] = {
        target: {name: rank(runs, name, target, study.nesting()) for name in study.measures}
        for target in study.targets
    }
    result = StudyResult(
        study=study, folder=folder.root, runs=runs, failed=failed, rankings=rankings
    )
    write_json(folder.result, result.to_dict())
    return result


def rank(
    runs: Sequence[RunResult], measure: str, target: str, nested: Mapping[str, str]
) -> Ranking:
    """How ``measure`` orders the runs that have both numbers, compared with ``target``."""
    x, y, levels = [], [], []
    for run in runs:
        value, gap = run.measure(measure), run.gap(target)
        if value is not None and gap is not None:
            x.append(value)
            y.append(gap)
            levels.append(run.factors)
    return Ranking(tau=tau(x, y), granulated=granulated(x, y, levels, nested))
