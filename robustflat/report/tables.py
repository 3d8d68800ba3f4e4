"""Tables on the terminal: runs compared, one evaluation in full."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from robustflat.runs.comparison import Cell, Row, columns

LABELS = {
    "worst_clean": "worst clean",
    "worst_robust": "worst robust",
    "average_clean": "avg clean",
    "average_robust": "avg robust",
}
_CAPTION = (
    "clean, attacks: test images, best checkpoint unless a line says otherwise; each attack on all "
    "that the model classifies. robust gap: train - test, last checkpoint. best - last: robust "
    "test accuracy. loss gap: test - train. The other lines: increase of the training loss around "
    "the weights; lower is flatter."
)


class Comparison:
    """Runs side by side: a line for every metric, a column for every run.

    Shares are in percent, gaps in percentage points. Runs that do not fit beside each other stand
    in tables below each other, and no name is ever cut.

    Args:
        rows: The runs.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)
        heads = [
            ("method", [row.method for row in rows]),
            ("seed", ["-" if row.seed is None else str(row.seed) for row in rows]),
            ("weights", [row.weights for row in rows]),
        ]
        figures = [
            (_label(name, rows), [_text(row.cells.get(name)) for row in rows])
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
        table = Table(title="Runs compared", title_justify="left")
        table.add_column("run", overflow="fold")
        for row in self._rows[start:end]:
            table.add_column(Text(row.run), justify="right", overflow="fold")
        for name, cells in self._lines:
            table.add_row(Text(name), *map(Text, cells[start:end]))
        return table


def evaluation_table(report: dict[str, Any]) -> Table:
    """The attacks of one evaluation at one checkpoint."""
    table = Table(title=Text(report["title"]), title_justify="left")
    table.add_column("attack", overflow="fold")
    for name in ("still correct", "95% interval", "attacked", "broken", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    result = report["result"]

    def line(name: str, key: str, *more: str) -> None:
        low, high = result[f"{key}_interval"]
        share = f"{result[f'{key}_accuracy']:.2%}"
        table.add_row(Text(name), share, f"{low:.1%} .. {high:.1%}", *more)

    line("none (clean)", "clean")
    for name, attack in result["attacks"].items():
        low, high = attack["interval"]
        table.add_row(
            Text(f"{name} after {attack['after']}" if attack["after"] else name),
            f"{attack['accuracy']:.2%}",
            f"{low:.1%} .. {high:.1%}",
            str(attack["attacked"]),
            str(attack["broken"]),
            f"{attack['seconds']:.1f}",
        )
    if len(result["attacks"]) > 1:
        line("worst case", "robust")
    return table


def _label(name: str, rows: Sequence[Row]) -> str:
    (metric,) = {row.cells[name].metric or name for row in rows if name in row.cells}
    return LABELS.get(metric, metric) + name.removeprefix(metric)


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    if cell.value is None:
        return "not finite"
    return f"{cell.value:.1%}" if cell.share else significant(cell.value)


def significant(value: float) -> str:
    """Three significant digits, without an exponent where there is room for them."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    # Rounding may carry: 0.9996 has three digits as 1.00.
    value = round(value, digits)
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(digits, 0)}f}" if -2 <= digits <= 7 else f"{value:.2e}"
