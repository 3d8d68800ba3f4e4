"""Owns what a study found: every run's figures, and how each measure ranks each target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from robustflat.files import write_json
from robustflat.study.criteria import Information, SignError, information, sign_error
from robustflat.study.folder import StudyFolder, job_of
from robustflat.study.grid import Level, Point
from robustflat.study.ledger import save_ledger
from robustflat.study.ranking import Estimate, Runs, conditional, granulated, holm, tau
from robustflat.study.schema import StudyConfig
from robustflat.study.targets import TARGETS

Verdict = Literal["holds", "reverses", "open"]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One finished run.

    Attributes:
        run: its name.
        factors: its levels.
        config: the whole configuration.
        measured: as its process wrote it: ``targets`` and ``measures`` (each figure with its
            interval or error), ``epoch``, ``reached_loss``, ``circumstances``, ``passes``,
            ``train_seconds`` and others.
    """

    run: str
    factors: dict[str, Level]
    config: dict[str, Any]
    measured: dict[str, Any]

    def target(self, name: str) -> float | None:
        """A target; None if it is not finite."""
        value: float | None = self.measured["targets"][name]["value"]
        return value

    def noise(self, name: str) -> float | None:
        """The standard error of a target over images, of its 95 % interval."""
        figure = self.measured["targets"][name]
        if figure["low"] is None or figure["high"] is None:
            return None
        return float(figure["high"] - figure["low"]) / (2 * 1.96)

    def measure(self, name: str) -> float | None:
        """A measure; None if it is not finite or could not be taken."""
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
    """How a measure orders the runs compared with a target, larger targets being worse.

    Attributes:
        tau: over all pairs of configurations.
        average: granulated tau, the mean of ``axes``.
        axes: granulated tau of each factor.
        conditional: tau at each level of a factor, and the mean of these.
        information: conditional mutual information.
        sign_error: with the worst environment.
        corrected: the p-values of tau and of ``average``, corrected for the number of measures.
    """

    tau: Estimate
    average: Estimate
    axes: dict[str, Estimate]
    conditional: dict[str, tuple[dict[Any, Estimate], Estimate]]
    information: Information
    sign_error: SignError
    corrected: tuple[float | None, float | None] = (None, None)

    def verdicts(self) -> dict[str, Verdict]:
        """In which factors the order over all of them holds, and in which it reverses.

        "open" where a factor's interval includes 0, or there is none.
        """
        whole = self.average.value or 0.0
        found: dict[str, Verdict] = {}
        for factor, axis in self.axes.items():
            if axis.low is None or axis.high is None or axis.low <= 0 <= axis.high:
                found[factor] = "open"
            else:
                found[factor] = "holds" if axis.low * whole > 0 else "reverses"
        return found

    def to_dict(self) -> dict[str, Any]:
        """Stable keys, for JSON."""
        return {
            "tau": {**asdict(self.tau), "corrected": self.corrected[0]},
            "granulated": {
                "average": {**asdict(self.average), "corrected": self.corrected[1]},
                "axes": {factor: asdict(axis) for factor, axis in self.axes.items()},
                "verdicts": self.verdicts(),
            },
            "conditional": {
                factor: {
                    "levels": [{"level": k, **asdict(e)} for k, e in each.items()],
                    "mean": asdict(mean),
                }
                for factor, (each, mean) in self.conditional.items()
            },
            "information": asdict(self.information),
            "sign_error": asdict(self.sign_error),
        }


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """A study's outcome.

    Attributes:
        study: its configuration.
        folder: where it is.
        runs: the finished runs, in the order of the grid.
        left_out: those of them that ended above the common training loss, so are not ranked.
        failed: the others.
        rankings: by target, then by measure.
        notes: sentences on what the figures cannot tell.
    """

    study: StudyConfig
    folder: Path
    runs: list[RunResult]
    failed: list[Failure]
    rankings: dict[str, dict[str, Ranking]]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: stable keys, null for what is not known."""
        return {
            "study": self.study.name,
            "complete": not self.failed,
            "factors": list(self.study.factor_paths()),
            "nested": self.study.nesting(),
            "measures": list(self.study.measures),
            "targets": list(self.study.targets),
            "notes": list(self.notes),
            "left_out": list(self.left_out),
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


def read_back(study: StudyConfig, point: Point, folder: StudyFolder) -> RunResult | Failure:
    """What a run left: its figures, or why there are none."""
    files, job = folder.files(point.name), job_of(study, point)
    measured = files.result(job)
    if measured is None:
        error = files.failed() or "It was not run yet. Repeat the command."
        return Failure(run=point.name, factors=point.factors, error=error)
    return RunResult(run=point.name, factors=point.factors, config=job["config"], measured=measured)


def write_ledger(found: Iterable[RunResult | Failure], folder: StudyFolder) -> None:
    """Write the rows of the runs that are finished."""
    runs = [run for run in found if isinstance(run, RunResult)]
    save_ledger(runs, folder.ledger, f"robustflat study {folder.config_file} --row")


def collect(study: StudyConfig, points: Sequence[Point], folder: StudyFolder) -> StudyResult:
    """Read back what the runs left, rank, and write ``study.json`` and the ledger."""
    found = [read_back(study, point, folder) for point in points]
    runs = [run for run in found if isinstance(run, RunResult)]
    left_out = tuple(r.run for r in runs if r.measured["reached_loss"] is False)
    ranked = [r for r in runs if r.run not in left_out]
    result = StudyResult(
        study=study,
        folder=folder.root,
        runs=runs,
        failed=[run for run in found if isinstance(run, Failure)],
        rankings={t: rank_all(ranked, study, t) for t in study.targets},
        left_out=left_out,
        notes=tuple(_notes(study, runs, left_out)),
    )
    write_json(folder.result, result.to_dict())
    write_ledger(runs, folder)
    return result


def rank_all(runs: Sequence[RunResult], study: StudyConfig, target: str) -> dict[str, Ranking]:
    """How every measure ranks a target, p-values corrected for the number of measures."""
    found = {name: rank(runs, name, target, study.nesting()) for name in study.measures}
    taus = holm([r.tau.p_value for r in found.values()])
    averages = holm([r.average.p_value for r in found.values()])
    return {
        name: Ranking(**{**vars(ranking), "corrected": both})
        for (name, ranking), both in zip(
            found.items(), zip(taus, averages, strict=True), strict=True
        )
    }


def rank(
    runs: Sequence[RunResult], measure: str, target: str, nested: Mapping[str, str]
) -> Ranking:
    """How ``measure`` orders the runs that have both numbers, compared with ``target``."""
    x, y, levels, noise = [], [], [], []
    for run in runs:
        value, found = run.measure(measure), run.target(target)
        if value is not None and found is not None:
            x.append(value)
            y.append(TARGETS[target].worse * found)
            levels.append(run.factors)
            noise.append(run.noise(target))
    both = Runs(x, y, levels, nested, noise)
    axes, average = granulated(both)
    return Ranking(
        tau=tau(both),
        average=average,
        axes=axes,
        conditional=conditional(both),
        information=information(both),
        sign_error=sign_error(both),
    )


def _notes(study: StudyConfig, runs: Sequence[RunResult], left_out: Sequence[str]) -> list[str]:
    varied = ", ".join(study.factor_paths())
    notes = [f"Varied: {varied}. Nothing is said about what was not varied."]
    if left_out:
        notes.append(
            f"{len(left_out)} of {len(runs)} runs ended above the common training loss and are not "
            "ranked."
        )
    for name in study.measures:
        missing = [r.run for r in runs if r.measure(name) is None]
        if missing:
            why = runs[[r.run for r in runs].index(missing[0])].measured["measures"][name]
            reason = why.get("error", "it is not finite")
            notes.append(f"{name} is missing of {len(missing)} of {len(runs)} runs: {reason}")
    return notes
