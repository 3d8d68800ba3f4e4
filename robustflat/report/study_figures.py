"""Owns a study's tables on the terminal and its scatter plots: each measure by factor."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from robustflat.files import write_text
from robustflat.report import paper
from robustflat.report.chart import Axis, Chart, Series
from robustflat.report.tables import grid
from robustflat.runs.comparison import Unit
from robustflat.study.grid import plain
from robustflat.study.ranking import LEVEL, SEED, Estimate
from robustflat.study.result import Ranking, StudyResult
from robustflat.study.targets import TARGETS

# Widest range of positive values that is still drawn on a linear axis.
_LINEAR_RANGE = 20.0
# Measures drawn against each target.
_DRAWN = 4
_MARKS = {"holds": "", "reverses": " reverses", "open": " ?"}


def runs_table(result: StudyResult) -> Table:
    """One line for every finished run: factors, targets, measures."""
    study, factors = result.study, list(result.study.factor_paths())
    names = [TARGETS[t].title for t in study.targets] + list(study.measures)
    rows = [
        [*(_level(run.factors[f]) for f in factors),
         *(_target(run.target(t), t) for t in study.targets),
         *(_number(run.measure(m)) for m in study.measures)]
        for run in result.runs
    ]  # fmt: skip
    heads = [*factors, *(name.replace("_", " ") for name in names)]
    return grid(f"Runs of {study.name}", heads, rows, texts=range(len(factors)), fold=True)


def ranking_table(result: StudyResult, target: str) -> Table:
    """One line for every measure, the surest first: how it ranks the target, and how sure that is.

    Granulated tau by factor says where the order holds: marked "reverses" where the interval is on
    the other side of 0 than the average, and "?" where it includes 0.
    """
    runs = len(result.runs) - len(result.left_out)
    factors = [f for f in result.study.factor_paths() if f != SEED]
    interval = f"{LEVEL:.0%} interval"
    heads = ["measure", "tau", interval, "p", "granulated", interval, "p", *factors]
    heads += ["information", "sign error", "worst"]
    rows = []
    rankings = result.rankings[target]
    for name in _by_sureness(rankings):
        ranking = rankings[name]
        verdicts = ranking.verdicts()
        axes = [
            _signed(ranking.axes[f].value) + _MARKS[verdicts[f]] if f in ranking.axes else "-"
            for f in factors
        ]
        tau = _estimate(ranking.tau, ranking.corrected[0])
        average = _estimate(ranking.average, ranking.corrected[1])
        rows.append([name, *tau, *average, *axes, *_criteria(ranking)])
    table = grid(f"How each measure ranks the {TARGETS[target].title}, {runs} runs", heads, rows)
    table.caption = (
        f"+1: the larger measure always has the worse {TARGETS[target].title}. Intervals and "
        "p-values take configurations, not runs, as independent; p-values are corrected for the "
        f"{len(rankings)} measures (Holm). granulated: the mean over the factors at its right, "
        "each between configurations that differ in it alone; '?': its interval includes 0. "
        "information: share of the order told whatever one or two factors are known (what chance "
        "reaches). sign error: share of changes of one factor whose sign is wrong; worst: in the "
        "worst such change."
    )
    return table


def _by_sureness(rankings: Mapping[str, Ranking]) -> list[str]:
    return sorted(rankings, key=lambda name: -_surest(rankings[name]))


def tables(result: StudyResult) -> list[Table]:
    """The runs, then one ranking for each target."""
    return [runs_table(result), *[ranking_table(result, t) for t in result.study.targets]]


def save_tables(result: StudyResult, path: str | os.PathLike[str]) -> Path:
    """Write the tables and notes as text."""
    text = io.StringIO()
    console = Console(file=text, width=240)
    for table in tables(result):
        console.print(table)
    for note in result.notes:
        console.print(f"note: {note}", markup=False)
    write_text(target := Path(path), text.getvalue())
    return target


def save_plots(result: StudyResult, folder: Path) -> list[Path]:
    """Write one PNG for each target and each of the measures that rank it most surely.

    Not of all: a study of 46 measures and 6 targets would draw for ten minutes what nobody looks
    through. ``scatter`` is there for the others.

    Raises:
        UserError: if the folder cannot be written.
    """
    written = []
    for target in result.study.targets:
        for name in _by_sureness(result.rankings[target])[:_DRAWN]:
            written.append(folder / f"{name}-{target}.png")
            tau = result.rankings[target][name].tau
            title = "tau undefined" if tau.value is None else f"tau {_ends(tau)}"
            paper.save(paper.draw(scatter(result, name, target), 3, title), written[-1])
    return written


def scatter(result: StudyResult, measure: str, target: str) -> list[Chart]:
    """One measure against one target: a chart for each factor, coloured by its levels.

    A point is a run; the bar is the target's interval over images. Runs that are not ranked are
    left out.

    Args:
        result: of the study.
        measure: its name.
        target: its name.
    """
    points = [
        (run.factors, x, run.measured["targets"][target])
        for run in result.runs
        if run.run not in result.left_out
        and (x := run.measure(measure)) is not None
        and run.target(target) is not None
    ]
    values = [x for _, x, _ in points]
    wide = bool(values) and min(values) > 0 and max(values) > _LINEAR_RANGE * min(values)
    unit: Unit = ("pp" if target.startswith("gap") else "%") if TARGETS[target].percent else ""
    charts = []
    for factor in [f for f in result.study.factor_paths() if f != SEED] or [SEED]:
        series = []
        for i, level in enumerate(_levels([factors.get(factor) for factors, *_ in points])):
            own = [(x, y) for factors, x, y in points if factors.get(factor) == level]
            ends = {key: [y[key] for _, y in own] for key in ("value", "low", "high")}
            series.append(
                Series(
                    name=_level(level), run=i, line=None, mark="circle", x=[x for x, _ in own],
                    y=ends["value"], low=ends["low"], high=ends["high"],
                )
            )  # fmt: skip
        axis = result.rankings[target][measure].axes.get(factor)
        granulated = "" if axis is None or axis.value is None else f", granulated {_ends(axis)}"
        x_axis = Axis(label=measure.replace("_", " "), log=wide)
        y_axis = Axis(label=TARGETS[target].title, unit=unit)
        charts.append(Chart(title=f"{factor}{granulated}", series=series, x=x_axis, y=y_axis))
    return charts


def _levels(found: Sequence[Any]) -> list[Any]:
    """The levels of a factor: none, numbers ascending, then texts as they come."""
    levels = list(dict.fromkeys(found))
    numbers = sorted(v for v in levels if isinstance(v, (int, float)))
    return [*([None] if None in levels else []), *numbers,
            *(v for v in levels if isinstance(v, str))]  # fmt: skip


def _estimate(estimate: Estimate, corrected: float | None) -> list[str]:
    low, high = estimate.low, estimate.high
    return [
        _signed(estimate.value),
        "-" if low is None else f"{_signed(low)} .. {_signed(high)}",
        "-" if corrected is None else f"{corrected:.2g}",
    ]


def _criteria(ranking: Ranking) -> list[str]:
    known, error = ranking.information, ranking.sign_error
    chance = "" if known.chance is None else f" ({known.chance:.2f})"
    worst = error.worst
    return [
        "-" if known.value is None else f"{known.value:.2f}{chance}",
        "-" if error.mean is None else f"{error.mean:.2f}",
        "-"
        if worst is None
        else f"{worst.error:.2f} {worst.factor} {' to '.join(map(_level, worst.levels))}",
    ]


def _ends(estimate: Estimate) -> str:
    text = _signed(estimate.value)
    if estimate.low is None:
        return text
    return f"{text} [{_signed(estimate.low)}, {_signed(estimate.high)}]"


def _target(value: float | None, target: str) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if TARGETS[target].percent else f"{value:.3f}"


def _level(level: Any) -> str:
    return "-" if level is None else plain(level)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _surest(ranking: Ranking) -> float:
    """Distance of the interval's nearer end from 0; what has no interval comes after."""
    average = ranking.average if ranking.average.value is not None else ranking.tau
    if average.low is None or average.high is None:
        return -2 + abs(average.value or 0.0)
    return max(average.low, -average.high)
