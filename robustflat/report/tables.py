"""Tables on the terminal: runs compared, one evaluation in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from robustflat.runs.comparison import Cell, Row, columns

LABELS = {
    "worst_clean": "worst clean",
    "worst_robust": "worst robust",
    "average_clean": "avg clean",
    "average_robust": "avg robust",
}


def comparison_table(rows: Sequence[Row]) -> Table:
    """One line for every run; shares in percent, gaps in percentage points."""
    table = Table(title="Runs compared", title_justify="left")
    table.add_column("run")
    table.add_column("method")
    names = columns(rows)
    for name in names:
        table.add_column(Text(LABELS.get(name, name)), justify="right", no_wrap=True)
    for row in rows:
        cells = [_text(row.cells.get(name)) for name in names]
        table.add_row(Text(row.run), Text(row.method), *cells)
    table.caption_justify = "left"
    table.caption = (
        "clean, attacks: test images, best checkpoint (last if only that was attacked). "
        "robust gap: train - test, last checkpoint. best - last: robust test accuracy. loss gap: "
        "test - train. The other columns: increase of the training loss around the last weights; "
        "lower is flatter."
    )
    return table


def evaluation_table(report: dict[str, Any]) -> Table:
    """The attacks of one evaluation at one checkpoint."""
    table = Table(title=Text(report["title"]), title_justify="left")
    table.add_column("attack")
    for name in ("still correct", "95% interval", "attacked", "broken", "seconds"):
        table.add_column(name, justify="right")
    result = report["result"]
    low, high = result["clean_interval"]
    table.add_row("none (clean)", f"{result['clean_accuracy']:.2%}", f"{low:.1%} .. {high:.1%}")
    for name, attack in result["attacks"].items():
        low, high = attack["interval"]
        table.add_row(
            Text(name),
            f"{attack['accuracy']:.2%}",
            f"{low:.1%} .. {high:.1%}",
            str(attack["attacked"]),
            str(attack["broken"]),
            f"{attack['seconds']:.1f}",
        )
    return table


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    if cell.value is None:
        return "not finite"
    return f"{cell.value:.1%}" if cell.share else f"{cell.value:.3f}"
