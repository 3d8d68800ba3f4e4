"""The evidence: ledgers of studies kept under docs/results, their figures and tables, and a check.

    robustflat study configs/study/strength.yaml --jobs 2 --yes --ledger LEDGER
    python scripts/evidence.py collect     keeps what is finished, also of a study that is not
    python scripts/evidence.py figures     draws all figures and tables again, from the ledgers
    python scripts/evidence.py redo        makes every tenth kept run again and compares

LEDGER is docs/results/evidence/strength.csv, so that what it has is not run again.

A ledger is not replaced but added to: a row that is there and was not made again stays.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from robustflat.errors import UserError
from robustflat.files import write_whole
from robustflat.landscapes import Landscape
from robustflat.runs import records
from robustflat.study import StudyConfig, read_study, run_study
from robustflat.study.folder import StudyFolder, job_of
from robustflat.study.grid import expand
from robustflat.study.ledger import Ledger, ledger
from robustflat.study.ranking import SEED, Estimate, Runs, tau
from robustflat.study.result import Ranking, RunResult, rank_all
from robustflat.study.targets import TARGETS

Row = dict[str, Any]
FloatArray = NDArray[np.float64]
ROOT = Path(__file__).parents[1]
SMALL = ("ledger", "strength", "why-sam", "alignment")
STUDIES = (*SMALL, "cifar10")  # whose images do not come with the installation
RESULTS = ROOT / "docs/results/evidence"
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#777777"
LATE = 20  # half of the epochs of the study of the alignment
# Of the methods whose strength is swept, and by which knob.
SWEPT = {
    "awp": (BLUE, "gamma"), "sam": (ORANGE, "rho"), "amp": (GREEN, "epsilon"),
    "rwp": ("#cc79a7", "threshold"),
}  # fmt: skip
# What is asked of the ledger: targets, and what a measure that ranks them well would say.
RANKED = ("gap_robust_loss", "gap_robust_accuracy", "test_robust_accuracy")
# Measures whose order is also asked for within groups of runs.
GROUPED = (
    "worst_robust", "average_robust", "hessian_max_robust", "hessian_trace_robust",
    "relative_flatness_robust", "worst_clean", "hessian_max", "logit_margin", "frobenius_sum",
)  # fmt: skip


def study_of(name: str, output: str | None = None) -> StudyConfig:
    """A study by name, in the folder of its file unless another is given."""
    return read_study(
        ROOT / f"configs/study/{name}.yaml", [] if output is None else [f"output={output}"]
    )


def kept(name: str) -> list[RunResult]:
    """The runs of a study that its ledger under docs/results has."""
    config, path = study_of(name), RESULTS / f"{name}.csv"
    if not path.is_file():
        return []
    found, committed = [], Ledger(path)
    for point in expand(config):
        job = job_of(config, point)
        measured = committed.measured(job)
        if measured is not None:
            found.append(
                RunResult(
                    run=point.name, factors=point.factors, config=job["config"], measured=measured
                )
            )
    return found


def collect(name: str, output: str | None) -> int:
    """Add the finished runs of a study to its ledger. Returns how many there are then."""
    config = study_of(name)
    folder = StudyFolder(study_of(name, output))
    before = {run.run: run for run in kept(name)}
    found = []
    for point in expand(config):
        job = job_of(config, point)
        measured = folder.files(point.name).result(job)
        if measured is not None:
            found.append(
                RunResult(
                    run=point.name, factors=point.factors, config=job["config"], measured=measured
                )
            )
        elif point.name in before:
            found.append(before[point.name])
    if found:
        write_rows(name, ledger(found, f"robustflat study configs/study/{name}.yaml --row"))
    return len(found)


def write_rows(name: str, rows: Sequence[Row]) -> None:
    """A CSV file of rows, whose columns are those of any of them."""
    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_whole(RESULTS / f"{name}.csv", text.getvalue())


def read_rows(name: str) -> list[Row]:
    """The rows of such a file; none if there is none."""
    path = RESULTS / f"{name}.csv"
    if not path.is_file():
        return []
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def collect_whole_runs(name: str, output: str | None) -> None:
    """What a ledger does not have: every epoch, both checkpoints, spectra and landscapes.

    Of runs that are in the folder; where there are none, what was collected before is left.
    """
    config = study_of(name)
    folder = StudyFolder(study_of(name, output))
    epochs, checkpoints, lines = list[Row](), list[Row](), list[Row]()
    for point in expand(config):
        home, run = folder.files(point.name).folder, {"run": point.name}
        for row in home.metrics():
            seen = row["monitor_average"] or row["monitor"] or {}
            seen = {f"{s}.{key}": value for s in seen for key, value in seen[s].items()}
            if seen := {**seen, **row.get("flatness", {})}:
                epochs.append({**run, "epoch": row["epoch"], **seen})
        for one in records.read(home.evaluation, "evaluate"):
            place, result = {**run, "checkpoint": one["checkpoint"]}, one["result"]
            low, high = result["robust_interval"]
            figure = {"figure": " + ".join(result["suites"]), "value": result["robust_accuracy"]}
            checkpoints.append(
                {**place, **figure, "images": one["samples"], "low": low, "high": high}
            )
        for one in records.read(home.flatness, "flatness"):
            place = {**run, "checkpoint": one["checkpoint"]}
            for measure, figure in one["measures"].items():
                measure = measure.partition(" with ")[0]
                checkpoints.append(
                    {**place, "figure": measure, "images": one["samples"], "value": figure["value"]}
                )
                grid = figure["details"].get("grid", ())
                for x, height in zip(grid, figure["details"].get("density", ()), strict=True):
                    lines.append({**place, "kind": measure, "x": x, "value": height})
        for path in sorted(home.landscapes.glob("*.json")):
            seen = Landscape.load(path)
            place = {**run, "checkpoint": seen.about["checkpoint"]}
            for kind, grid in seen.mean().items():
                for at, value in np.ndenumerate(grid):
                    xy = {key: axis[i] for key, axis, i in zip("xy", seen.axes, at, strict=False)}
                    lines.append({**place, "kind": f"{seen.kind} {kind}", **xy, "value": value})
    for end, rows in (("epochs", epochs), ("checkpoints", checkpoints), ("lines", lines)):
        if rows:
            write_rows(f"{name}-{end}", rows)


# A figure of a configuration over its seeds


@dataclass(frozen=True)
class Cell:
    """The runs of one configuration."""

    runs: tuple[RunResult, ...]

    def level(self, factor: str) -> object:
        """Of a factor that is not the seed."""
        return self.runs[0].factors[factor]

    def values(self, name: str) -> list[float]:
        """A target (in per cent where it is a share) or a measure, of every run."""
        if name not in TARGETS:
            return [v for run in self.runs if (v := run.measure(name)) is not None]
        factor = 100 if TARGETS[name].percent else 1
        return [factor * v for run in self.runs if (v := run.target(name)) is not None]


def cells_of(runs: Sequence[RunResult]) -> list[Cell]:
    """The configurations, in the order of the study."""
    found: dict[tuple[object, ...], list[RunResult]] = {}
    for run in runs:
        key = tuple(level for factor, level in run.factors.items() if factor != SEED)
        found.setdefault(key, []).append(run)
    return [Cell(tuple(group)) for group in found.values()]


def half_width(cells: Sequence[Cell], name: str, level: float = 0.95) -> Callable[[Cell], float]:
    """Half of the interval of a cell's mean, the noise of a run pooled over all cells.

    Two or three seeds are too few for a spread of each cell's own. Where all cells have equally
    many, what a seed does to all alike (it draws the training images) is no noise: the interval is
    for comparing cells with one another.
    """
    groups = [np.array(cell.values(name)) for cell in cells]
    freedom = sum(len(g) - 1 for g in groups if len(g))
    residuals = [g - g.mean() for g in groups if len(g)]
    if len({len(g) for g in residuals}) == 1:
        residuals = list(np.array(residuals) - np.mean(residuals, axis=0))
        freedom = (len(residuals) - 1) * (len(residuals[0]) - 1)
    if freedom < 1:
        return lambda cell: float("nan")
    squares = sum(float((g**2).sum()) for g in residuals)
    reach = stats.t.ppf((1 + level) / 2, freedom) * (squares / freedom) ** 0.5
    return lambda cell: float(reach / max(len(cell.values(name)), 1) ** 0.5)


def table(cells: Sequence[Cell], names: Sequence[str], title: Callable[[Cell], str]) -> str:
    """A Markdown table of means and half-widths."""
    widths = {name: half_width(cells, name) for name in names}
    heads = [TARGETS[n].title if n in TARGETS else n.replace("_", " ") for n in names]
    lines = ["| | seeds | " + " | ".join(heads) + " |", "|" + "---|" * (len(names) + 2)]
    for cell in cells:
        texts = []
        for name in names:
            values = cell.values(name)
            mean, width = float(np.mean(values)) if values else float("nan"), widths[name](cell)
            share = name in TARGETS and TARGETS[name].percent
            text = f"{mean:.1f} ± {width:.1f}" if share else f"{mean:.3g} ± {width:.2g}"
            texts.append(text.removesuffix(" ± nan") if values else "")
        lines.append(f"| {title(cell)} | {len(cell.runs)} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


# The strength


def draw_strength(runs: Sequence[RunResult]) -> Figure:
    """Robustness, gap and flatness against the strength of each method."""
    names = ("test_robust_accuracy", "test_clean_accuracy", "gap_robust_loss", "worst_robust")
    cells = cells_of(runs)
    figure = Figure(figsize=(9.5, 6.5), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, names, strict=True):
        width = half_width(cells, name)
        plain = next((cell for cell in cells if cell.level("method") == "none"), None)
        if plain is not None:
            mean, reach = float(np.mean(plain.values(name))), width(plain)
            axes.axhspan(mean - reach, mean + reach, color=GREY, alpha=0.25, lw=0)
            axes.axhline(mean, color=GREY, lw=1.2, label="none")
        for method, (colour, knob) in SWEPT.items():
            here = [cell for cell in cells if cell.level("method") == method]
            factor = "threshold" if knob == "threshold" else "strength"
            axes.errorbar(
                [float(str(cell.level(factor))) for cell in here],
                [float(np.mean(cell.values(name))) for cell in here],
                [width(cell) for cell in here],
                color=colour,
                marker="o",
                capsize=3,
                lw=1.4,
                ms=4,
                label=f"{method} ({knob})",
            )
        axes.set_xscale("log")
        axes.set_title(_title(name), fontsize=10)
        axes.set_xlabel("strength")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


# Why SAM helps


def variant(cell: Cell) -> str:
    """A row of the study of SAM in words."""
    method, chunk = cell.level("method"), cell.level("chunk")
    text = f"{method} {cell.level('strength')}" if method != "none" else "none"
    return text + (f", chunks of {chunk}" if chunk is not None else "")


def draw_why(runs: Sequence[RunResult]) -> Figure:
    """Every variant of SAM, with true labels and with wrong ones."""
    names = ("test_clean_accuracy", "test_robust_accuracy", "wen2023_worst", "alignment")
    cells = cells_of(runs)
    order = list(dict.fromkeys(variant(cell) for cell in cells))
    figure = Figure(figsize=(10.5, 6.5), layout="constrained")
    for k, (axes, name) in enumerate(zip(figure.subplots(2, 2).flat, names, strict=True)):
        for shift, noise, colour in ((-0.13, None, BLUE), (0.13, 0.3, ORANGE)):
            here = [cell for cell in cells if cell.level("noise") == noise]
            if not here:
                continue
            width = half_width(here, name)
            axes.errorbar(
                [float(np.mean(cell.values(name))) for cell in here],
                [order.index(variant(cell)) + shift for cell in here],
                xerr=[width(cell) for cell in here],
                color=colour,
                marker="o",
                ls="",
                capsize=3,
                ms=4,
                label="30 % wrong labels" if noise else "true labels",
            )
        axes.set_yticks(range(len(order)), order if k % 2 == 0 else [""] * len(order))
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.set_title(_title(name), fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["top", "right"]].set_visible(False)
    return _with_legend(figure)


def draw_alignment(runs: Sequence[RunResult], rows: Sequence[Row]) -> Figure:
    """|cos| of the gradient and the top eigenvector, and its eigenvalue, along the training."""
    cells = cells_of(runs)
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("alignment", "hessian_max"), strict=True):
        for cell, colour in zip(cells, (GREY, BLUE, ORANGE, GREEN), strict=True):
            epochs, means, widths = along(cell, cells, rows, name)
            axes.plot(epochs, means, color=colour, marker="o", ms=3, lw=1.4, label=variant(cell))
            axes.fill_between(
                epochs, means - widths, means + widths, color=colour, alpha=0.15, lw=0
            )
        axes.set_title(_title(name), fontsize=10)
        axes.set_xlabel("epoch")
        axes.set(
            **({"ylim": (0, 1)} if name == "alignment" else {"yscale": "log", "ylim": (0.1, 20)})
        )
        axes.spines[["top", "right"]].set_visible(False)
    return _with_legend(figure)


def along(
    cell: Cell, cells: Sequence[Cell], rows: Sequence[Row], name: str
) -> tuple[list[int], FloatArray, FloatArray]:
    """A figure at every look, over the seeds of a configuration: epochs, means, half-widths."""
    epochs = sorted({int(row["epoch"]) for row in rows})
    seen = {(row["run"], int(row["epoch"])): float(row[name]) for row in rows}

    def at(epoch: int) -> list[Cell]:
        def told(run: RunResult) -> RunResult:
            measures = {name: {"value": seen[run.run, epoch], "standard_error": None}}
            return replace(run, measured={**run.measured, "measures": measures})

        return [Cell(tuple(told(run) for run in one.runs)) for one in cells]

    here, means, widths = list(cells).index(cell), [], []
    for epoch in epochs:
        known = at(epoch)
        means.append(float(np.mean(known[here].values(name))))
        widths.append(half_width(known, name)(known[here]))
    return epochs, np.array(means), np.array(widths)


def _with_legend(figure: Figure) -> Figure:
    """Under all axes, for what the first shows."""
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        frameon=False,
        fontsize=9,
        loc="outside lower center",
        ncols=2,
    )
    return figure


def _title(name: str) -> str:
    if name not in TARGETS:
        return {
            "worst_robust": "worst-direction sharpness of the robust loss",
            "wen2023_worst": "worst-direction sharpness (Wen et al. 2023)",
            "alignment": "|cos| of gradient and top eigenvector",
            "hessian_max": "largest eigenvalue",
        }.get(name, name.replace("_", " "))
    return TARGETS[name].title + (", %" if TARGETS[name].percent else "")


# CIFAR-10

WAYS = {
    ("none", "adversarial", None): "AT",
    ("awp", "adversarial", None): "AT-AWP",
    ("sam", "adversarial", None): "AT-SAM",
    ("amp", "adversarial", None): "AT-AMP",
    ("rwp", "adversarial", None): "RWP",
    ("none", "adversarial", "ema"): "AT + EMA",
    ("none", "trades", None): "TRADES",
    ("awp", "trades", None): "TRADES-AWP",
}
PGD, STRONG = "pgd-10", "apgd-ce + apgd:dlr:malt-3"


def way(cell: Cell) -> str:
    """How a network of the study on CIFAR-10 was trained."""
    method, objective, average = (cell.level(f) for f in ("method", "objective", "average"))
    return WAYS[str(method), str(objective), None if average is None else str(average)]


def with_checkpoints(runs: Sequence[RunResult], rows: Sequence[Row]) -> list[RunResult]:
    """Runs with measures of both checkpoints: ``best pgd-10``, ``last pgd-10``, their difference.

    Accuracies are in per cent.
    """
    values: dict[str, dict[str, float]] = {run.run: {} for run in runs}
    for row in rows:
        scale = 100 if row["low"] else 1
        name = f"{row['checkpoint']} {row['figure']}"
        values[row["run"]][name] = scale * float(row["value"])
    for own in values.values():
        for attack in (PGD, STRONG):
            if {f"best {attack}", f"last {attack}"} <= set(own):
                own[f"best - last {attack}"] = own[f"best {attack}"] - own[f"last {attack}"]
    names = {name for own in values.values() for name in own}
    found = []
    for run in runs:
        more = {
            name: {"value": values[run.run].get(name), "standard_error": None} for name in names
        }
        measured = {**run.measured, "measures": {**run.measured["measures"], **more}}
        found.append(replace(run, measured=measured))
    return found


def draw_epochs(runs: Sequence[RunResult], rows: Sequence[Row]) -> Figure:
    """Robust accuracy and loss on training and validation images, epoch by epoch, of every run."""
    cells = cells_of(runs)
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    axes = figure.subplots(2, len(cells), sharex=True, sharey="row")
    for column, cell in zip(axes.T, cells, strict=True):
        for side, key, scale in zip(
            column, ("robust_accuracy", "robust_loss"), (100, 1), strict=True
        ):
            for split, colour in (("train", GREY), ("validation", BLUE)):
                for run in cell.runs:
                    own = [row for row in rows if row["run"] == run.run]
                    side.plot(
                        [int(row["epoch"]) for row in own],
                        [scale * float(row[f"{split}.{key}"]) for row in own],
                        color=colour, lw=1.2, alpha=0.8,
                        label=split if run is cell.runs[0] else None,
                    )  # fmt: skip
            side.spines[["top", "right"]].set_visible(False)
            side.grid(axis="y", alpha=0.3)
        column[0].set_title(way(cell), fontsize=10)
        column[1].set_xlabel("epoch", fontsize=9)
    axes[0, 0].set_ylabel("robust accuracy, %")
    axes[1, 0].set_ylabel("robust loss")
    return _with_legend(figure)


def draw_ways(cells: Sequence[Cell], panels: Sequence[tuple[str, Sequence[str]]]) -> Figure:
    """Of every way of training some figures with their intervals, a panel for each kind."""
    names = [way(cell) for cell in cells]
    figure = Figure(
        figsize=(11, 0.27 * len(cells) * -(-len(panels) // 3) + 1.6), layout="constrained"
    )
    grid = figure.subplots(-(-len(panels) // 3), 3, squeeze=False)
    for k, (axes, (title, shown)) in enumerate(zip(grid.flat, panels, strict=True)):
        for shift, (name, colour) in enumerate(zip(shown, (BLUE, ORANGE, GREEN), strict=False)):
            width = half_width(cells, name)
            here = [(i, cell) for i, cell in enumerate(cells) if cell.values(name)]
            axes.errorbar(
                [float(np.mean(cell.values(name))) for _, cell in here],
                [i + 0.22 * (shift - (len(shown) - 1) / 2) for i, _ in here],
                xerr=[width(cell) for _, cell in here],
                color=colour, marker="o", ls="", capsize=2.5, ms=4,
                label=name.split(" ")[0] if len(shown) > 1 else None,
            )  # fmt: skip
        axes.set_yticks(range(len(names)), names if k % 3 == 0 else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return _with_legend(figure)


def draw_lines(runs: Sequence[RunResult], rows: Sequence[Row]) -> Figure:
    """Around the weights of both checkpoints: loss along a direction and on a plane; spectra."""
    names = {run.run: way(Cell((run,))) for run in runs}
    found = dict[tuple[str, str, str], list[Row]]()
    for row in rows:
        found.setdefault((row["kind"], names[row["run"]], row["checkpoint"]), []).append(row)
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, 3)
    line, spectrum, planes = axes[0, 0], axes[1, 0], axes[:, 1:]
    for (kind, name, checkpoint), own in found.items():
        colour = BLUE if name == "AT" else ORANGE
        x, y = ([float(row[key]) for row in own] for key in ("x", "value"))
        style = "--" if checkpoint == "best" else "-"
        if kind in ("line robust", "hessian_density_robust"):
            side = line if kind == "line robust" else spectrum
            side.plot(x, y, style, color=colour, lw=1.4, label=f"{name}, {checkpoint}")
    line.set(title="robust loss along random directions", xlabel="filter norms", ylim=(0, None))
    spectrum.set(
        title="spectrum, robust loss", xlabel="eigenvalue", yscale="log", ylim=(1e-8, None)
    )
    line.legend(frameon=False, fontsize=8)
    planes_found = {key: own for key, own in found.items() if key[0] == "plane robust"}
    top = max((float(row["value"]) for own in planes_found.values() for row in own), default=1.0)
    for side, ((_, name, checkpoint), own) in zip(
        planes.T.flat, sorted(planes_found.items()), strict=False
    ):
        x, y = (sorted({float(row[key]) for row in own}) for key in "xy")
        values = np.array([float(row["value"]) for row in own]).reshape(len(x), len(y))
        shown = side.contourf(
            x, y, values.T, levels=np.linspace(0, min(top, 6.0), 19), cmap="viridis", extend="max"
        )
        side.set_title(f"robust loss, {name}, {checkpoint}", fontsize=10)
        side.set_aspect("equal")
    if planes_found:
        figure.colorbar(shown, ax=planes, shrink=0.8)
    return figure


# The ledger


def both_numbers(runs: Sequence[RunResult], config: StudyConfig, measure: str, target: str) -> Runs:
    """The runs that have a measure and a target, as the statistics take them."""
    both = [(run, run.measure(measure), run.target(target)) for run in runs]
    known = [(run, x, y) for run, x, y in both if x is not None and y is not None]
    return Runs(
        [x for _, x, _ in known],
        [TARGETS[target].worse * y for _, _, y in known],
        [run.factors for run, _, _ in known],
        config.nesting(),
    )


def ranked_runs(runs: Sequence[RunResult]) -> list[RunResult]:
    """Those that ended at the common training loss, or were not to."""
    return [run for run in runs if run.measured["reached_loss"] is not False]


def draw_ledger(by_target: dict[str, dict[str, Ranking]]) -> Figure:
    """Kendall's tau of every measure with its interval; beside it within factors."""
    first = by_target[RANKED[0]]
    order = sorted(first, key=lambda n: -(first[n].tau.value or 0.0))
    figure = Figure(figsize=(11, 0.21 * len(order) + 1.6), layout="constrained")
    for k, (axes, target) in enumerate(zip(figure.subplots(1, 3), RANKED, strict=True)):
        ranked = by_target[target]
        _forest(axes, [ranked[n].tau for n in order], -0.17, BLUE, "all pairs")
        _forest(axes, [ranked[n].average for n in order], 0.17, ORANGE, "one factor changes")
        axes.axvline(0, color="black", lw=0.8)
        axes.set_xlim(-1.02, 1.02)
        axes.set_ylim(len(order) - 0.5, -0.5)
        names = [n.replace("_", " ") for n in order]
        axes.set_yticks(range(len(order)), names if k == 0 else [""] * len(order), fontsize=8)
        worse = "larger" if TARGETS[target].worse > 0 else "less"
        axes.set_title(f"{TARGETS[target].title}, {worse} is worse: tau", fontsize=9)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return _with_legend(figure)


def _forest(
    axes: Axes, estimates: Sequence[Estimate], shift: float, colour: str, label: str
) -> None:
    for k, e in enumerate(estimates):
        if e.value is None:
            continue
        if e.low is not None and e.high is not None:
            axes.plot([e.low, e.high], [k + shift] * 2, color=colour, lw=1.1, alpha=0.7)
        axes.plot(e.value, k + shift, "o", color=colour, ms=3, label=label if k == 0 else None)


def ranking_table(ranked: dict[str, Ranking]) -> str:
    """A Markdown table of the measures, the surest first."""
    lines = [
        "| measure | tau, all pairs | p (Holm) | one factor changes | holds in | reverses in |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(ranked, key=lambda n: -abs(ranked[n].tau.value or 0.0)):
        one, verdicts = ranked[name], ranked[name].verdicts()
        holds, reverses = (
            ", ".join(factor for factor, verdict in verdicts.items() if verdict == asked)
            for asked in ("holds", "reverses")
        )
        p = "" if one.corrected[0] is None else f"{one.corrected[0]:.3f}"
        lines.append(
            f"| {name} | {_interval(one.tau)} | {p} | {_interval(one.average)} | {holds} "
            f"| {reverses} |"
        )
    return "\n".join(lines) + "\n"


def group_table(runs: Sequence[RunResult], config: StudyConfig, target: str) -> str:
    """A Markdown table of tau within each objective, and within the runs of a common loss."""
    groups = {
        f"{objective}": [r for r in runs if r.factors["objective"] == objective]
        for objective in dict.fromkeys(r.factors["objective"] for r in runs)
    }
    groups["common loss"] = [r for r in runs if r.factors["common_loss"] is not None]
    heads = [f"{name} ({len(group)})" for name, group in groups.items()]
    lines = [f"| measure | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for measure in GROUPED:
        cells = [_interval(tau(both_numbers(g, config, measure, target))) for g in groups.values()]
        lines.append(f"| {measure} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _interval(e: Estimate) -> str:
    if e.value is None:
        return ""
    ends = "" if e.low is None else f" [{e.low:+.2f}, {e.high:+.2f}]"
    return f"{e.value:+.2f}{ends}"


def strength_title(cell: Cell) -> str:
    """A row of the study of the strength in words."""
    levels = (cell.runs[0].factors.get(factor) for factor in ("method", "strength", "threshold"))
    return " ".join(str(level) for level in levels if level is not None)


STRENGTH_COLUMNS = (
    "test_clean_accuracy", "test_robust_accuracy", "gap_robust_accuracy", "gap_robust_loss",
    "worst_robust", "average_robust", "hessian_max_robust",
)  # fmt: skip
CIFAR_COLUMNS = (
    ("test_clean_accuracy", *(
        f"{at} {attack}" for attack in (PGD, STRONG) for at in ("best", "last", "best - last")
    )),
    ("gap_robust_accuracy", "gap_robust_loss", "worst_clean", "worst_robust", "average_robust",
     "andriushchenko2023_worst", "relative_flatness_robust", "hessian_max", "hessian_max_robust",
     "hessian_trace_robust"),
)  # fmt: skip
CIFAR_PANELS = (
    ("robust accuracy on test, PGD-10, %", ("best pgd-10", "last pgd-10")),
    ("best - last, points", ("best - last pgd-10",)),
    ("robust accuracy gap at the last epoch, points", ("gap_robust_accuracy",)),
    ("worst-direction sharpness, robust loss", ("worst_robust",)),
    ("largest eigenvalue, robust loss", ("hessian_max_robust",)),
    ("relative flatness, robust loss", ("relative_flatness_robust",)),
)
WHY_COLUMNS = (
    "test_clean_accuracy", "test_robust_accuracy", "gap_clean_accuracy", "wen2023_worst",
    "wen2023_ascent", "wen2023_average", "hessian_max", "hessian_trace", "alignment",
)  # fmt: skip


def figures() -> None:
    """Draw everything again from the ledgers."""
    text = ["# Tables\n\nWritten by `python scripts/evidence.py figures`; ± and brackets: 95 %.\n"]
    if runs := kept("strength"):
        _save(draw_strength(runs), "strength")
        rows = table(cells_of(runs), STRENGTH_COLUMNS, strength_title)
        text.append(f"\n## The strength: {len(runs)} runs\n\n{rows}")
    if runs := kept("why-sam"):
        _save(draw_why(runs), "why-sam")
        for noise, words in ((None, "true labels"), (0.3, "30 % wrong labels")):
            here = [cell for cell in cells_of(runs) if cell.level("noise") == noise]
            rows = table(here, WHY_COLUMNS, variant)
            text.append(f"\n## Why SAM helps: {words}\n\n{rows}")
    if runs := kept("alignment"):
        looked, cells = read_rows("alignment-epochs"), cells_of(runs)
        _save(draw_alignment(runs, looked), "alignment")
        text.append("\n## The alignment along training\n")
        for name in ("alignment", "hessian_max"):
            # Looks at one run are no independent ones: their mean counts as one.
            late = [
                {"run": run.run, "epoch": 0, name: np.mean([
                    float(row[name]) for row in looked
                    if row["run"] == run.run and int(row["epoch"]) >= LATE
                ])} for run in runs
            ]  # fmt: skip
            epochs = along(cells[0], cells, looked, name)[0]
            text.append(f"\n| {name}, epoch | {' | '.join(map(str, epochs))} | from {LATE} on |\n")
            text.append("|---" * (len(epochs) + 2) + "|\n")
            for cell in cells:
                (_, *looks), (_, *mean) = (along(cell, cells, r, name) for r in (looked, late))
                pairs = zip(
                    *(np.append(a, b) for a, b in zip(looks, mean, strict=True)), strict=True
                )
                shown = (f"{m:.2f} ± {w:.2f}" for m, w in pairs)
                text.append(f"| {variant(cell)} | {' | '.join(shown)} |\n")
    if runs := kept("cifar10"):
        cells = cells_of(with_checkpoints(runs, read_rows("cifar10-checkpoints")))
        _save(draw_epochs(runs, read_rows("cifar10-epochs")), "cifar10-epochs")
        _save(draw_ways(cells, CIFAR_PANELS), "cifar10")
        _save(draw_lines(runs, read_rows("cifar10-lines")), "cifar10-lines")
        text.append(f"\n## CIFAR-10 (JPEG re-encodings): {len(runs)} runs\n")
        known = set(TARGETS).union(
            *(run.measured["measures"] for cell in cells for run in cell.runs)
        )
        for columns in CIFAR_COLUMNS:
            text.append(f"\n{table(cells, [name for name in columns if name in known], way)}")
    if runs := kept("ledger"):
        config, usable = study_of("ledger"), ranked_runs(runs)
        by_target = {target: rank_all(usable, config, target) for target in RANKED}
        _save(draw_ledger(by_target), "ledger")
        text.append(f"\n## The ledger: {len(runs)} runs, {len(usable)} of them ranked\n")
        for target in RANKED:
            title = TARGETS[target].title
            text.append(f"\n### {title}\n\n{ranking_table(by_target[target])}")
            text.append(f"\nWithin groups of runs:\n\n{group_table(usable, config, target)}")
    write_whole(RESULTS / "tables.md", "".join(text))


def _save(figure: Figure, name: str) -> None:
    figure.savefig(RESULTS / f"{name}.png", dpi=110)


# The check


def redo(share: float, jobs: int, output: str) -> int:
    """Make a share of the kept runs again and say how far apart they are.

    Code that draws or orders otherwise, or a processor that rounds otherwise, makes rows differ,
    and training takes small differences far: so this is told and is no failure.

    Returns:
        How many could not be made.
    """
    missing = 0
    for name in SMALL:
        chosen = kept(name)[:: max(1, round(1 / share))]
        if not chosen:
            continue
        config = study_of(name, output)
        again = run_study(config, jobs, rows=[run.run for run in chosen], yes=True)
        made = {run.run: run for run in again.runs}
        why = {failure.run: failure.error for failure in again.failed}
        for run in chosen:
            found = made.get(run.run)
            missing += found is None
            text = why[run.run] if found is None else f"{_apart(run, found):.2%} apart"
            sys.stdout.write(f"{name}: {run.run}: {text}\n")
    return missing


def _apart(old: RunResult, new: RunResult) -> float:
    """The largest relative difference of two rows."""
    pairs = [
        (old.measured[kind][name]["value"], new.measured[kind][name]["value"])
        for kind in ("targets", "measures")
        for name in old.measured[kind]
        if name in new.measured[kind]
    ]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return max((abs(a - b) / max(abs(a), abs(b), 1e-3) for a, b in known), default=0.0)


def main() -> int:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description="Ledgers, figures and a check of the evidence.")
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("--output", help="where the studies ran, if not in their own folder")
    commands.add_parser("figures")
    again = commands.add_parser("redo")
    again.add_argument("--share", type=float, default=0.1)
    again.add_argument("--jobs", type=int, default=2)
    again.add_argument("--output", default="runs/experiments-small")
    given = parser.parse_args()
    try:
        if given.command == "collect":
            for name in STUDIES:
                sys.stdout.write(f"{name}: {collect(name, given.output)} runs\n")
            for name in ("alignment", "cifar10"):
                collect_whole_runs(name, given.output)
        elif given.command == "figures":
            figures()
        else:
            return 1 if redo(given.share, given.jobs, given.output) else 0
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
