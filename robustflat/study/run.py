"""Owns a study from its configuration to its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from robustflat.errors import UserError
from robustflat.runs.description import describe
from robustflat.study.folder import StudyFolder, check_same
from robustflat.study.grid import Point, expand
from robustflat.study.result import StudyResult, collect
from robustflat.study.schedule import Event, Schedule
from robustflat.study.schema import StudyConfig


def run_study(
    config: StudyConfig, jobs: int = 1, on_progress: Callable[[Event], None] | None = None
) -> StudyResult:
    """Train a grid of runs, measure them, and rank their robust gaps by each flatness measure.

    Each run is a process of its own, in an ordinary run folder under ``output/name/runs``. The
    study can be killed at any moment; called again, it keeps what is finished and goes on with the
    rest, to the same figures. Several machines that share the folder may call it at once.

    Args:
        config: as :func:`robustflat.study.read_study` reads it.
        jobs: most processes at once.
        on_progress: told what becomes of each run.

    Returns:
        Figures and rankings of the finished runs, also written to ``output/name/study.json``, and
        the runs that failed.

    Raises:
        UserError: if a grid point cannot be run, or the folder belongs to something else; nothing
            was trained then.
    """
    if jobs < 1:
        raise UserError(f"A study needs at least one job at a time, got {jobs}.")
    if isinstance(config.base, str):
        raise UserError(
            f"The study's base is the path {config.base!r}. Read the study with read_study, which "
            "puts the file in its place."
        )
    points = expand(config)
    folder = StudyFolder(config)
    folder.prepare(config)
    _check_runs(config, points, folder)
    Schedule(config, points, folder, jobs, on_progress).run()
    return collect(config, points, folder)


def _check_runs(config: StudyConfig, points: Sequence[Point], folder: StudyFolder) -> None:
    """Refuse grid points whose data or model cannot be had, or that were begun otherwise."""
    problems: dict[str, list[str]] = {}
    tried: dict[str, str | None] = {}
    for point in points:
        files = folder.files(point.name)
        if files.result(config.attacks, config.measures, point.config.train.epochs) is not None:
            problem = check_same(files, point.config)
        else:
            problem = check_same(files, point.config) or _unavailable(point, tried)
        if problem is not None:
            problems.setdefault(problem, []).append(point.name)
    if problems:
        lines = [f"  {', '.join(names)}: {problem}" for problem, names in problems.items()]
        raise UserError("\n".join([f"study {config.name} cannot be run:", *lines]))


def _unavailable(point: Point, tried: dict[str, str | None]) -> str | None:
    """Why data or model of a run cannot be had; tried once for those that share them."""
    key = point.config.model_dump_json(include={"data", "model", "device", "train"})
    if key not in tried:
        try:
            describe(point.config)
            tried[key] = None
        except UserError as error:
            tried[key] = str(error)
    return tried[key]
