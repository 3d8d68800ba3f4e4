"""Owns a study's tables on the terminal and its scatter plots: each measure against the gap."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table

from robustflat.errors import UserError
from robustflat.report.charts import COLOURS
from robustflat.study.grid import plain
from robustflat.study.ranking import LEVEL
from robustflat.study.result import Ranking, RunResult, StudyResult
from robustflat.study.schema import METHOD, SEED, STRENGTH

_MARKERS = "osD^vP*X<>ph8dH"
_TARGETS = {
    "robust_accuracy": "robust accuracy gap",
    "robust_loss": "robust loss gap",
    "clean_accuracy": "clean accuracy gap",
    "clean_loss": "clean loss gap",
}
# Widest range of positive values that is still drawn on a linear axis.
_LINEAR_RANGE = 20.0


def runs_table(result: StudyResult) -> Table:
    """One line for every finished run: factors, robust accuracies, gaps, measures."""
    table = Table(title=f"Runs of {result.study.name}", title_justify="left")
    factors = list(result.study.factor_paths())
    for name in factors:
        table.add_column(name)
    shown = ["train robust", "test robust", *[_TARGETS[t] for t in result.study.targets]]
    for name in [*shown, *result.study.measures]:
        table.add_column(name.replace("_", " "), justify="right")
    for run in result.runs:
        splits = run.measured["splits"]
        table.add_row(
            *[_level(run.factors[f]) for f in factors],
            *[f"{splits[s]['robust_accuracy']['value']:.1%}" for s in ("train", "test")],
            *[_gap(run.gap(t), t) for t in result.study.targets],
            *[_number(run.measure(m)) for m in result.study.measures],
        )
    return table


def ranking_table(result: StudyResult, target: str) -> Table:
    """One line for every measure, the best first: tau, interval, p-value, granulated tau."""
    title = f"Kendall's tau of each measure with the {_TARGETS[target]}, {len(result.runs)} runs"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("measure", no_wrap=True)
    factors = list(result.study.factor_paths())
    for name in ("tau", f"{LEVEL:.0%} interval", "p", *factors, "average"):
        table.add_column(name, justify="right", no_wrap=True)
    rankings = result.rankings[target]
    for name in sorted(rankings, key=lambda n: -_sortable(rankings[n])):
        tau, grained = rankings[name].tau, rankings[name].granulated
        axes = [grained.axes.get(f) for f in factors]
        table.add_row(
            name,
            _signed(tau.value),
            "-" if tau.low is None else f"{_signed(tau.low)} .. {_signed(tau.high)}",
            "-" if tau.p_value is None else f"{tau.p_value:.2g}",
            *[_signed(axis.tau if axis else None) for axis in axes],
            _signed(grained.average),
        )
    first = next(iter(rankings.values()))
    pairs = ", ".join(f"{name} {axis.pairs}" for name, axis in first.granulated.axes.items())
    left_out = f" without {SEED}" if SEED in factors else ""
    table.caption = (
        "+1: a sharper run always has the larger gap. interval: bootstrap over runs. "
        f"{', '.join(factors)}: granulated tau, between runs that differ in this factor only "
        f"(pairs: {pairs or 'none'}); average: of these{left_out}."
    )
    return table


def tables(result: StudyResult) -> list[Table]:
    """The runs, then one ranking for each target."""
    return [runs_table(result), *[ranking_table(result, t) for t in result.study.targets]]


def save_tables(result: StudyResult, path: str | os.PathLike[str]) -> Path:
    """Write the tables as text."""
    target = Path(path)
    try:
        with target.open("w", encoding="utf-8") as file:
            console = Console(file=file, width=200)
            for table in tables(result):
                console.print(table)
    except OSError as error:
        raise UserError(f"The tables cannot be written to {target}: {error}.") from error
    return target


def save_plots(result: StudyResult, folder: str | os.PathLike[str], dpi: int = 150) -> list[Path]:
    """Write one PNG for each measure.

    Raises:
        UserError: if the folder cannot be written.
    """
    written = []
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in result.study.measures:
            written.append(Path(folder) / f"{name}.png")
            scatter(result, name).savefig(written[-1], dpi=dpi)
    except OSError as error:
        raise UserError(f"The plots cannot be written to {folder}: {error}.") from error
    return written


def scatter(result: StudyResult, measure: str) -> Figure:
    """One measure against every target, a point for each run.

    The colour is the method, the marker the strength (where a study has no such factors, its first
    and second), the bar the interval of the gap over training and test images. Dashed lines join
    runs that differ in strength only.

    Args:
        result: of the study.
        measure: its name.

    Returns:
        The figure, of no window: save it with ``savefig``.
    """
    targets = result.study.targets
    figure = Figure(figsize=(4.3 * len(targets) + 1.6, 4.0), layout="constrained")
    panels = figure.subplots(1, len(targets), squeeze=False)[0]
    by_colour, by_marker = _roles(list(result.study.factor_paths()))
    colours = _assign(result.runs, by_colour, COLOURS)
    markers = _assign(result.runs, by_marker, _MARKERS)
    for panel, target in zip(panels, targets, strict=True):
        _join(panel, result.runs, measure, target, by_colour, by_marker, colours)
        for run in result.runs:
            style = {
                "color": colours[run.factors.get(by_colour) if by_colour else None],
                "marker": markers[run.factors.get(by_marker) if by_marker else None],
            }
            _point(panel, run, measure, target, style)
        _axes(panel, result, measure, target)
    handles = _legend(by_colour, colours, by_marker, markers)
    if handles:
        figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    return figure


def _point(panel: Axes, run: RunResult, measure: str, target: str, style: dict[str, Any]) -> None:
    x, y = run.measure(measure), run.gap(target)
    if x is None or y is None:
        return
    scale = _scale(target)
    interval = run.measured["gap"][target]
    if interval["low"] is not None and interval["high"] is not None:
        ends = [scale * interval["low"], scale * interval["high"]]
        panel.plot([x, x], ends, color=style["color"], linewidth=1, alpha=0.2, zorder=1)
    panel.plot(
        x, scale * y, linestyle="", markersize=8, markeredgecolor="white", markeredgewidth=0.7,
        zorder=2, **style,
    )  # fmt: skip


def _join(
    panel: Axes,
    runs: Sequence[RunResult],
    measure: str,
    target: str,
    by_colour: str | None,
    by_marker: str | None,
    colours: dict[Any, str],
) -> None:
    """A line through the runs that differ in the marker's factor only, in its order."""
    if by_marker is None:
        return
    groups: dict[tuple[Any, ...], list[tuple[float, float, float]]] = defaultdict(list)
    for run in runs:
        x, y, level = run.measure(measure), run.gap(target), run.factors[by_marker]
        if x is not None and y is not None and isinstance(level, (int, float)):
            others = tuple(v for f, v in run.factors.items() if f != by_marker)
            colour = colours[run.factors[by_colour] if by_colour else None]
            group = (colour, *others)
            groups[group].append((level, x, _scale(target) * y))
    for (colour, *_), points in groups.items():
        _, xs, ys = zip(*sorted(points), strict=True)
        panel.plot(xs, ys, color=colour, linewidth=1, linestyle="--", alpha=0.6, zorder=1)


def _axes(panel: Axes, result: StudyResult, measure: str, target: str) -> None:
    values = [v for run in result.runs if (v := run.measure(measure)) is not None]
    if values and min(values) > 0 and max(values) > _LINEAR_RANGE * min(values):
        panel.set_xscale("log")
    ranking = result.rankings[target][measure]
    tau, average = ranking.tau, ranking.granulated.average
    if tau.value is None:
        title = "tau undefined"
    else:
        title = f"tau {_signed(tau.value)}"
        title += "" if tau.low is None else f" [{_signed(tau.low)}, {_signed(tau.high)}]"
        title += "" if average is None else f", granulated {_signed(average)}"
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(measure.replace("_", " "))
    panel.set_ylabel(_TARGETS[target] + (" (points)" if _scale(target) > 1 else ""))
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.2)


def _roles(factors: Sequence[str]) -> tuple[str | None, str | None]:
    """The factors that colour and marker stand for."""
    others = [f for f in factors if f != SEED]
    colour = METHOD if METHOD in others else next(iter(others), None)
    rest = [f for f in others if f != colour]
    marker = STRENGTH if STRENGTH in rest else next(iter(rest), None)
    return colour, marker


def _assign(runs: Sequence[RunResult], factor: str | None, styles: Sequence[str]) -> dict[Any, str]:
    """A style for every level: numbers ascending, then texts as they come."""
    levels = list(dict.fromkeys(run.factors.get(factor) if factor else None for run in runs))
    numbers = sorted(v for v in levels if isinstance(v, (int, float)))
    texts = [v for v in levels if isinstance(v, str)]
    ordered: list[Any] = [*([None] if None in levels else []), *numbers, *texts]
    return {level: styles[i % len(styles)] for i, level in enumerate(ordered)}


def _legend(
    by_colour: str | None, colours: dict[Any, str], by_marker: str | None, markers: dict[Any, str]
) -> list[Line2D]:
    handles: list[Line2D] = []
    if by_colour is not None:
        handles.append(_entry(by_colour))
        handles += [_entry(_level(v), color=c, marker="o") for v, c in colours.items()]
    if by_marker is not None:
        handles += [_entry(""), _entry(by_marker)]
        handles += [_entry(_level(v), color="#555555", marker=m) for v, m in markers.items()]
    return handles


def _entry(label: str, **style: Any) -> Line2D:
    return Line2D([], [], linestyle="", markersize=7, label=label, **style)


def _scale(target: str) -> float:
    return 100.0 if target.endswith("accuracy") else 1.0


def _gap(value: float | None, target: str) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if target.endswith("accuracy") else f"{value:.3f}"


def _level(level: Any) -> str:
    return "-" if level is None else plain(level)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _sortable(ranking: Ranking) -> float:
    return -math.inf if ranking.tau.value is None else ranking.tau.value
