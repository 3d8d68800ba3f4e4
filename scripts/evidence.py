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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from robustflat.errors import UserError
from robustflat.files import write_whole
from robustflat.study import StudyConfig, read_study, run_study
from robustflat.study.folder import StudyFolder, job_of
from robustflat.study.grid import expand
from robustflat.study.ledger import Ledger, ledger
from robustflat.study.ranking import SEED, Estimate, Runs, granulated, holm, tau
from robustflat.study.result import RunResult
from robustflat.study.targets import TARGETS

ROOT = Path(__file__).parents[1]
STUDIES = ("ledger", "strength", "why-sam")
RESULTS = ROOT / "docs/results/evidence"
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#777777"
COLOURS = {"none": GREY, "awp": BLUE, "sam": ORANGE, "amp": GREEN}
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
        rows = ledger(found, f"robustflat study configs/study/{name}.yaml --row")
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_whole(RESULTS / f"{name}.csv", text.getvalue())
    return len(found)


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

    Two or three seeds are too few for a spread of each cell's own.
    """
    groups = [np.array(cell.values(name)) for cell in cells]
    freedom = sum(len(g) - 1 for g in groups if len(g))
    if freedom < 1:
        return lambda cell: float("nan")
    squares = sum(float(((g - g.mean()) ** 2).sum()) for g in groups if len(g))
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
            texts.append(f"{mean:.1f} ± {width:.1f}" if share else f"{mean:.3g} ± {width:.2g}")
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
        for method in ("awp", "sam", "amp"):
            here = [cell for cell in cells if cell.level("method") == method]
            axes.errorbar(
                [float(str(cell.level("strength"))) for cell in here],
                [float(np.mean(cell.values(name))) for cell in here],
                [width(cell) for cell in here],
                color=COLOURS[method],
                marker="o",
                capsize=3,
                lw=1.4,
                ms=4,
                label={"awp": "awp (gamma)", "sam": "sam (rho)", "amp": "amp (epsilon)"}[method],
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
        }.get(name, name.replace("_", " "))
    return TARGETS[name].title + (", %" if TARGETS[name].percent else "")


# The ledger


@dataclass(frozen=True)
class Ranked:
    """How a measure ranks a target: over all pairs, and over pairs that differ in one factor."""

    whole: Estimate
    within: Estimate
    axes: dict[str, Estimate]
    corrected: float | None = None


def rankings(runs: Sequence[RunResult], config: StudyConfig, target: str) -> dict[str, Ranked]:
    """Every measure's ranking of a target, p-values corrected for the number of measures."""
    found: dict[str, Ranked] = {}
    for name in config.measures:
        data = both_numbers(runs, config, name, target)
        axes, within = granulated(data)
        found[name] = Ranked(tau(data), within, axes)
    corrected = holm([ranked.whole.p_value for ranked in found.values()])
    return {
        name: Ranked(ranked.whole, ranked.within, ranked.axes, p)
        for (name, ranked), p in zip(found.items(), corrected, strict=True)
    }


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


def draw_ledger(by_target: dict[str, dict[str, Ranked]]) -> Figure:
    """Kendall's tau of every measure with its interval; beside it within factors."""
    first = by_target[RANKED[0]]
    order = sorted(first, key=lambda n: -(first[n].whole.value or 0.0))
    figure = Figure(figsize=(11, 0.21 * len(order) + 1.6), layout="constrained")
    for k, (axes, target) in enumerate(zip(figure.subplots(1, 3), RANKED, strict=True)):
        ranked = by_target[target]
        _forest(axes, [ranked[n].whole for n in order], -0.17, BLUE, "all pairs")
        _forest(axes, [ranked[n].within for n in order], 0.17, ORANGE, "one factor changes")
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


def ranking_table(ranked: dict[str, Ranked]) -> str:
    """A Markdown table of the measures, the surest first."""
    lines = [
        "| measure | tau, all pairs | p (Holm) | one factor changes | holds in | reverses in |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(ranked, key=lambda n: -abs(ranked[n].whole.value or 0.0)):
        one = ranked[name]
        sign = 1 if (one.within.value or 0.0) > 0 else -1
        sure = {
            f: sign * (e.value or 0.0)
            for f, e in one.axes.items()
            if e.low is not None and e.high is not None and not e.low <= 0 <= e.high
        }
        holds = ", ".join(f for f, v in sure.items() if v > 0)
        reverses = ", ".join(f for f, v in sure.items() if v < 0)
        p = "" if one.corrected is None else f"{one.corrected:.3f}"
        lines.append(
            f"| {name} | {_interval(one.whole)} | {p} | {_interval(one.within)} | {holds} "
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
    if runs := kept("ledger"):
        config, usable = study_of("ledger"), ranked_runs(runs)
        by_target = {target: rankings(usable, config, target) for target in RANKED}
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
    for name in STUDIES:
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
