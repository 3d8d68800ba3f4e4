"""Owns rows taken together: runs that differ in their seed alone, and the order of rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
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

    Neither capitals nor "_" for a space matter. Rows without the figure come last.

    Raises:
        UserError: if no row has it.
    """
    name, sign = _plain(by.removeprefix("-")), 1 if by.startswith("-") else -1
    known = columns(rows)
    metrics = {column: cell.metric for row in rows for column, cell in row.cells.items()}
    chosen = [column for column in known if _plain(column) == name] or [
        column for column in known if _plain(metrics[column]) == name
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


def _plain(name: str) -> str:
    """A figure's name however it is written: AutoAttack, autoattack; worst_case, worst case."""
    return name.lower().replace("_", " ")


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
        return replace(cells[0], value=None, low=None, high=None, count=len(cells))
    deviation = statistics.stdev(values) if len(values) > 1 else None
    mean, count = statistics.fmean(values), len(values)
    return replace(cells[0], value=mean, low=None, high=None, deviation=deviation, count=count)
