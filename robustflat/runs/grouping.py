"""Owns rows taken together: runs that differ in their seed alone, and the order of rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import takewhile

from robustflat.errors import UserError
from robustflat.runs.comparison import Cell, Row, columns


def by_seed(rows: Sequence[Row]) -> list[Row]:
    """One row for all runs of one setting: means, deviations over the seeds, and their number.

    Args:
        rows: of runs. What a setting is, their ``setting`` says; rows without one stay alone.

    Returns:
        Rows in the order of their first runs. A cell has the mean of the runs that have it, its
        sample standard deviation (None of a single one) and their number, and no interval.
    """
    settings: dict[str, list[Row]] = {}
    for i, row in enumerate(rows):
        settings.setdefault(row.setting or f"alone {i}", []).append(row)
    short = [_name(group) for group in settings.values()]
    return [
        Row(
            run=name if short.count(name) == 1 else ", ".join(row.run for row in group),
            method=group[0].method,
            seeds=tuple(seed for row in group for seed in row.seeds),
            cells={name: _together(name, group) for name in columns(group)},
            weights=" and ".join(dict.fromkeys(row.weights for row in group)),
            setting=group[0].setting,
        )
        for name, group in zip(short, settings.values(), strict=True)
    ]


def ordered(rows: Sequence[Row], by: str) -> list[Row]:
    """Rows by a figure, the largest first, or the smallest if ``by`` begins with "-".

    Rows without the figure come last.

    Raises:
        UserError: if no row has it.
    """
    name, sign = by.removeprefix("-"), 1 if by.startswith("-") else -1
    known = columns(rows)
    chosen = [column for column in known if column == name] or [
        column
        for column in known
        if any(r.cells[column].metric == name for r in rows if column in r.cells)
    ]
    if not chosen:
        raise UserError(
            f"--sort {by!r} names no figure of these runs. There are: {', '.join(known)}."
        )

    def place(row: Row) -> float:
        values = [row.cells[c].value for c in chosen if c in row.cells]
        found = [v for v in values if v is not None and math.isfinite(v)]
        return sign * found[0] if found else math.inf

    return sorted(rows, key=place)


def _name(group: Sequence[Row]) -> str:
    if len(group) == 1:
        return group[0].run
    names = [row.run for row in group]
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in alike) + "*"


def _together(name: str, group: Sequence[Row]) -> Cell:
    cells = [row.cells[name] for row in group if name in row.cells]
    values = [cell.value for cell in cells if cell.value is not None]
    if len(values) < len(cells):  # one is not finite, and so is the mean
        return Cell(None, share=cells[0].share, metric=cells[0].metric, count=len(cells))
    deviation = statistics.stdev(values) if len(values) > 1 else None
    mean = statistics.fmean(values)
    return Cell(
        mean, share=cells[0].share, metric=cells[0].metric, deviation=deviation, count=len(values)
    )
