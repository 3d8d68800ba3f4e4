"""Tables on the terminal: runs compared, one evaluation in full."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from robustflat.report.chart import UNITS, significant
from robustflat.runs.comparison import Cell, Row, columns, label

# Confusion matrices of more classes fit on no terminal.
_MATRIX = 20
_CONFUSED = {
    "clean_as": "Taken for, without an attack",
    "attacked_as": "Taken for, under all attacks",
}
_CAPTION = (
    "clean, attacks: test images, best checkpoint unless a line says otherwise; each attack on all "
    "that the model classifies. robust gap: train - test, last checkpoint. best - last: robust "
    "test accuracy. loss gap: test - train. corrupted: mean accuracy. mCE: AlexNet = 100%. The "
    "other lines are measures of flatness, of which `robustflat list measures` says what each is: "
    "a sharpness (worst, ascent, average) is an increase of the loss around the weights, lower is "
    "flatter."
)


def grid(
    title: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    texts: Container[int] = (0,),
    fold: bool = False,
) -> Table:
    """A table for the terminal, in which nothing is taken for markup.

    Args:
        title: above it.
        heads: of the columns.
        rows: their cells.
        texts: which columns hold texts, and are folded where there is no room; numbers stand right.
        fold: whether numbers are folded, too, rather than cut.
    """
    table = Table(title=Text(title), title_justify="left", caption_justify="left")
    for i, head in enumerate(heads):
        if i in texts:
            table.add_column(Text(head), overflow="fold")
        else:
            table.add_column(Text(head), justify="right", no_wrap=not fold, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


class Comparison:
    """Runs side by side: a line for every metric, a column for every run.

    Shares are in percent, gaps in percentage points. Runs that do not fit beside each other stand
    in tables below each other, and no name is ever cut.

    Args:
        rows: The runs, or groups of runs.
        digits: Significant ones.
    """

    def __init__(self, rows: Sequence[Row], digits: int = 3) -> None:
        self._rows = list(rows)
        several = any(len(row.seeds) > 1 for row in rows)
        heads = [
            ("method", [row.method for row in rows]),
            ("seeds" if several else "seed", [seeds_of(row) for row in rows]),
            ("weights", [row.weights for row in rows]),
        ]
        figures = [
            (label_of(name, rows), [shown(row.cells.get(name), digits, row) for row in rows])
            for name in columns(rows)
        ]
        self._lines = [line for line in heads if any(line[1])] + figures

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As many tables as the width of the console asks for."""
        first = max(len(name) for name, _ in self._lines)
        # A border and a space at each side of every column.
        widths = [self._width(i) + 3 for i in range(len(self._rows))]
        left, start = options.max_width - first - 4, 0
        while start < len(self._rows):
            end = start + 1
            while end < len(self._rows) and sum(widths[start : end + 1]) <= left:
                end += 1
            yield self._table(start, end)
            start = end
        yield Text(_CAPTION, style="italic")

    def _width(self, run: int) -> int:
        return max(len(self._rows[run].run), *(len(cells[run]) for _, cells in self._lines))

    def _table(self, start: int, end: int) -> Table:
        heads = ["run", *(row.run for row in self._rows[start:end])]
        lines = ([name, *cells[start:end]] for name, cells in self._lines)
        return grid("Runs compared", heads, lines, fold=True)


def corruptions_table(title: str, result: dict[str, Any]) -> Table:
    """Errors by corruption and severity, with their means."""
    errors: dict[str, list[float]] = result["errors"]
    means = {name: sum(each) / len(each) for name, each in errors.items()}
    rows = [["clean images", *[""] * 5, f"{result['clean_error']:.1%}"]]
    rows += [[n, *(f"{error:.1%}" for error in (*errors[n], means[n]))] for n in errors]
    rows.append([f"mean of {len(errors)}", *[""] * 5, f"{result['mean_error']:.1%}"])
    if result["mce"] is not None:
        rows.append(["mCE (AlexNet = 100%)", *[""] * 5, f"{result['mce']:.1%}"])
    return grid(title, ["error of", *map(str, range(1, 6)), "mean"], rows)


def evaluation_table(title: str, result: dict[str, Any]) -> Table:
    """The attacks of one evaluation at one checkpoint."""
    rows = [["none (clean)", *withstood(result["clean_accuracy"], result["clean_interval"])]]
    for name, attack in result["attacks"].items():
        said = f"{name} after {attack['after']}" if attack["after"] else name
        keys = ("accuracy", "interval", "attacked", "broken", "seconds")
        rows.append([said, *withstood(*(attack[key] for key in keys))])
    if len(result["attacks"]) > 1:
        found = withstood(result["robust_accuracy"], result["robust_interval"])
        rows.append(["worst case", *found])
    return grid(title, ["attack", *WITHSTOOD], rows)


# What is said of an attack.
WITHSTOOD = ("still correct", "95% interval", "attacked", "broken", "seconds")


def withstood(
    accuracy: float,
    interval: Sequence[float],
    attacked: int | None = None,
    broken: int | None = None,
    seconds: float | None = None,
) -> list[str]:
    """The cells under ``WITHSTOOD``; empty where nothing was attacked."""
    low, high = interval
    effort = [] if seconds is None else [str(attacked), str(broken), f"{seconds:.1f}"]
    return [f"{accuracy:.2%}", f"{low:.1%} .. {high:.1%}", *effort]


def class_tables(figures: dict[str, dict[str, Any]]) -> list[Table]:
    """The classes of one evaluation, those that withstand least first; and what is taken for what.

    Args:
        figures: by class, as `robustflat.evaluate.classes.by_class` gives them.
    """
    rows = []
    for name, of in sorted(figures.items(), key=lambda pair: _robust(pair[1])):
        most = sorted(of["attacked_as"].items(), key=lambda pair: -pair[1])[:3]
        shares = [f"{of[key] / of['count']:.1%}" for key in ("clean", "robust")]
        said = ", ".join(f"{other} ({count})" for other, count in most)
        rows.append([name, str(of["count"]), *shares, said])
    heads = ["class", "images", "clean", "robust", "attacked, taken for"]
    table = grid("Classes", heads, rows, texts=(0, 4))
    if len(figures) > _MATRIX:
        return [table]
    return [table, *(_matrix(figures, key, title) for key, title in _CONFUSED.items())]


def weakest(figures: dict[str, dict[str, Any]]) -> str:
    """A sentence on the class of which the smallest share withstands all attacks."""
    name = min(figures, key=lambda name: _robust(figures[name]))
    of = figures[name]
    return (
        f"The weakest class is {name}: {_robust(of):.1%} of its {of['count']} images withstand "
        f"all attacks, {of['clean'] / of['count']:.1%} are classified without one."
    )


def _robust(of: dict[str, Any]) -> float:
    return float(of["robust"] / of["count"])


def _matrix(figures: dict[str, dict[str, Any]], key: str, title: str) -> Table:
    """A row for every class: how many of its images are taken for each."""
    also = {other for of in figures.values() for other in of[key]}
    names = [*figures, *sorted(also - figures.keys())]
    rows = []
    for name, of in figures.items():
        counts = {name: of["count"] - sum(of[key].values()), **of[key]}
        rows.append([name, *(str(counts.get(other, "·")) for other in names)])
    return grid(title, ["is", *names], rows, fold=True)


def gap_table(report: dict[str, Any]) -> Table:
    """The gap at each checkpoint, and best - last; what `robustflat.runs.evaluation.Job` found."""
    gaps = {name: e["gap"] for name, e in report["checkpoints"].items() if e["gap"]}
    splits = list(dict.fromkeys(split for found in gaps.values() for split in found["splits"]))
    rows: list[list[str]] = []

    def number(value: float | None, figure: str, sign: str = "") -> str:
        if value is None:
            return "not finite"
        value += 0.0  # no "-0"
        unit = " pp" if sign else "%"
        share = figure.endswith("accuracy")
        return f"{100 * value:{sign}.2f}{unit}" if share else f"{value:{sign}.3f}"

    def line(name: str, figure: str, found: Sequence[Any], gap: dict[str, float | None]) -> None:
        difference, low, high = (number(gap[key], figure, "+") for key in ("value", "low", "high"))
        values = [number(one[figure]["value"], figure) if one else "" for one in found]
        rows.append([name, figure.replace("_", " "), *values, difference, f"{low} .. {high}"])

    for name, found in gaps.items():
        for figure, gap in found["gaps"]["train-test"].items():
            line(name, figure, [found["splits"].get(split) for split in splits], gap)
    for figure, gap in (report["overfitting"] or {}).items():
        line("best - last", figure, [None] * len(splits), gap)
    title = f"{report['run']}: robust-generalization gap, {report['gap_attack']}"
    heads = ["checkpoint", "figure", *splits, "difference", "95% interval"]
    table = grid(title, heads, rows, texts=(0, 1))
    table.caption = (
        "difference: of accuracies train - test, of losses test - train; of best - last on test "
        "images how much worse the last checkpoint is."
    )
    return table


def label_of(name: str, rows: Sequence[Row]) -> str:
    """A column's name as people read it."""
    (metric,) = {row.cells[name].metric or name for row in rows if name in row.cells}
    return label(metric) + name.removeprefix(metric)


def seeds_of(row: Row) -> str:
    """The seeds of a row."""
    return ", ".join(map(str, row.seeds)) or "-"


def shown(cell: Cell | None, digits: int = 3, row: Row | None = None, *, units: bool = True) -> str:
    """A figure as people read it: a share in percent, a difference of shares in points.

    With a deviation over seeds it ends where the second digit of that does; if fewer seeds than
    the row's have it, their number is told.
    """
    if cell is None:
        return "-"
    if cell.value is None:
        return "not finite"
    few = row is not None and cell.count < len(row.seeds)
    end = UNITS[cell.unit] * units + (f" (n = {cell.count})" if few else "")
    scale = 100 if cell.unit else 1
    value, spread = scale * cell.value, scale * (cell.deviation or 0)
    if spread:
        places = max(0, 1 - math.floor(math.log10(spread)))
        return f"{value:.{places}f} ± {spread:.{places}f}{end}"
    said = f"{value:.{max(digits - 2, 0)}f}" if cell.unit else significant(value, digits)
    return said + (" ± 0" if cell.deviation is not None else "") + end
