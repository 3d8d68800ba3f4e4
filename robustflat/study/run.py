"""Owns a study from its configuration to its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from robustflat.errors import UserError
from robustflat.evaluate.attacks.names import plan
from robustflat.evaluate.threat import Task
from robustflat.files import locked, write_json
from robustflat.perturb import parse_norm
from robustflat.runs.description import describe
from robustflat.study.engine import Event, Order, executor, run_all
from robustflat.study.folder import RunFiles, Status, StudyFolder, job_of
from robustflat.study.grid import Point, expand, size
from robustflat.study.ledger import Ledger
from robustflat.study.ranking import MINIMUM, SEED
from robustflat.study.result import StudyResult, collect, read_back, write_ledger
from robustflat.study.schema import StudyConfig
from robustflat.train.setup import build_model, load_data

# More runs than these are asked about.
MANY = 100


def run_study(
    config: StudyConfig,
    jobs: int = 1,
    on_progress: Callable[[Event], None] | None = None,
    *,
    scheduler: str | None = None,
    rows: Sequence[str] = (),
    ledger: Path | None = None,
    yes: bool = False,
) -> StudyResult:
    """Train a grid of runs, measure them, and rank their robustness by each measure.

    Each run is a process of its own, in an ordinary run folder under ``output/name/runs``. The
    study can be killed at any moment; called again, it keeps what is finished and goes on with the
    rest, to the same figures, runs that failed among it.

    Args:
        config: as :func:`robustflat.study.read_study` reads it.
        jobs: most processes at once on this machine.
        on_progress: told what becomes of each run.
        scheduler: the address of a Dask scheduler whose workers run them instead; they need this
            package, and the study's folder under the same path.
        rows: run only these, by name; all if empty.
        ledger: a ledger, CSV or Parquet; runs of which it has a row of the same configuration,
            measured in the same way, are taken from it and not made.
        yes: do it although it is long, or too small to tell anything.

    Returns:
        Figures and rankings of the finished runs, also written to ``output/name``, and the runs
        that failed.

    Raises:
        UserError: if a grid point cannot be run, the study is long or too small (without ``yes``),
            another command is at it, or the folder belongs to something else; nothing was trained
            then.
    """
    if jobs < 1:
        raise UserError(f"A study needs at least one job at a time, got {jobs}.")
    _check_base(config)
    if not yes and not rows:
        _ask(config, jobs)
    points = expand(config)
    if not yes and not rows:
        _check_enough(config, points)
    chosen = _chosen(points, rows)
    folder = StudyFolder(config)
    with locked(folder.config_file, patience=0):
        folder.prepare(config)
        _check_runs(config, chosen, folder)
        folder.write_jobs(config, chosen)
        if ledger is not None:
            _take(Ledger(ledger), config, chosen, folder)
        jobs_of = {p.name: job_of(config, p) for p in chosen}

        def is_done(files: RunFiles) -> bool:
            return files.result(jobs_of[files.name]) is not None

        left = [p for p in chosen if not is_done(folder.files(p.name))]
        orders = [
            Order(job=folder.files(p.name).job.resolve(), threads=p.config.threads) for p in left
        ]
        names = {p.name for p in left}
        kept = [p.name for p in chosen if p.name not in names]
        found = {p.name: read_back(config, p, folder) for p in points}
        of_name = {p.name: p for p in points}

        def tell(event: Event) -> None:
            # The ledger has what is finished, however the study ends.
            if event.state == "finished":
                found[event.run] = read_back(config, of_name[event.run], folder)
                write_ledger(found.values(), folder)
            if on_progress is not None:
                on_progress(event)

        with executor(jobs, scheduler) as (on, function):
            run_all(orders, on, function, is_done, tell, kept)
        return collect(config, points, folder)


def _take(
    ledger: Ledger, config: StudyConfig, points: Sequence[Point], folder: StudyFolder
) -> None:
    """Put the rows of a ledger in the place of runs that were not made here."""
    for point in points:
        files, job = folder.files(point.name), job_of(config, point)
        if files.result(job) is not None or files.begun():
            continue
        row = ledger.measured(job)
        if row is not None and set(job["measures"]) <= set(row["measures"]):
            files.folder.root.mkdir(exist_ok=True)
            write_json(files.row, row)


def status(config: StudyConfig) -> list[Status]:
    """How far every run of a study is; nothing is started.

    Args:
        config: as :func:`robustflat.study.read_study` reads it.

    Raises:
        UserError: if a grid point cannot be run.
    """
    _check_base(config)
    return StudyFolder(config).status(config, expand(config))


def _check_base(config: StudyConfig) -> None:
    if isinstance(config.base, str):
        raise UserError(
            f"The study's base is the path {config.base!r}. Read the study with read_study, which "
            "puts the file in its place."
        )


def _ask(config: StudyConfig, jobs: int) -> None:
    """Refuse a long study that nobody has agreed to."""
    count = size(config)
    if count <= MANY:
        return
    (first,) = expand(config, limit=1)
    hours = count * _seconds(first) / 3600 / jobs
    raise UserError(
        f"The grid has {count:,} runs, which take about {hours:,.1f} hours of {jobs} at a time, "
        "judged by a step of the first. If that is what you want, repeat the command with --yes."
    )


def _seconds(point: Point) -> float:
    """About how long the training of a run takes, from one forward and backward pass here."""
    config = point.config
    data = load_data(config)
    model = build_model(config, data, torch.device("cpu")).train()
    x, _ = data.train.tensors(min(config.train.batch_size, len(data.train)))
    model(x).sum().backward()
    began = time.monotonic()
    model(x).sum().backward()
    unit = (time.monotonic() - began) / 3
    # K forward passes and input gradients, a weight adversary and the descent.
    passes = 2 * getattr(config.attack, "steps", 0) + 6
    batches = -(-len(data.train) // config.train.batch_size)
    return unit * passes * batches * config.train.epochs


def _check_enough(config: StudyConfig, points: Sequence[Point]) -> None:
    """Refuse a study that cannot tell anything."""
    found = {tuple(v for f, v in p.factors.items() if f != SEED) for p in points}
    if len(found) < MINIMUM:
        raise UserError(
            f"study {config.name} has {len(found)} configurations (seeds are none): an interval "
            f"needs at least {MINIMUM}, and no order of fewer has p < 0.05. Vary more, or repeat "
            "the command with --yes to have the figures without intervals."
        )


def _chosen(points: Sequence[Point], rows: Sequence[str]) -> list[Point]:
    known = {p.name: p for p in points}
    for name in rows:
        if name not in known:
            raise UserError(
                f"The study has no run {name!r}. --status lists its {len(known)} runs, such as "
                f"{next(iter(known))!r}."
            )
    return [known[name] for name in rows] if rows else list(points)


def _check_runs(config: StudyConfig, points: Sequence[Point], folder: StudyFolder) -> None:
    """Refuse grid points whose data or model cannot be had, or that were begun otherwise."""
    problems: dict[str, list[str]] = {}
    tried: dict[str, str | None] = {}
    for point in points:
        files = folder.files(point.name)
        problem = files.differs(point.config)
        if problem is None and files.result(job_of(config, point)) is None:
            problem = _unavailable(config, point, tried)
        if problem is not None:
            problems.setdefault(problem, []).append(point.name)
    if problems:
        lines = [f"  {', '.join(names)}: {problem}" for problem, names in problems.items()]
        raise UserError("\n".join([f"study {config.name} cannot be run:", *lines]))


def _unavailable(study: StudyConfig, point: Point, tried: dict[str, str | None]) -> str | None:
    """Why data, model or attacks of a run cannot be had; tried once for those that share them."""
    key = point.config.model_dump_json(include={"data", "model", "device", "train"})
    if key not in tried:
        try:
            describe(point.config)
            data = load_data(point.config)
            task = Task(
                norm=parse_norm(point.threat.norm),
                eps=point.threat.eps,
                classes=len(data.classes),
                shape=data.shape,
            )
            plan(study.attacks, task)
            tried[key] = None
        except UserError as error:
            tried[key] = str(error)
    return tried[key]
