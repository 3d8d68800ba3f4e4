"""Owns tables of runs for papers and programs: Markdown, LaTeX, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from robustflat.errors import UserError
from robustflat.files import json_safe
from robustflat.report.tables import label_of, seeds_of, shown
from robustflat.runs.comparison import Row, columns

_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}  # fmt: skip


def table(rows: Sequence[Row], form: str, digits: int = 3) -> str:
    """Rows as text, a line for each.

    Args:
        rows: of runs, or of groups of runs.
        form: "md", "latex" (for the package booktabs), "csv" or "json". The first two have shares
            in percent, their differences in points (pp); the other two every digit, intervals and
            deviations.
        digits: significant ones of a figure without a deviation; one that has a deviation ends
            where the second digit of the deviation does.

    Raises:
        UserError: if there is no such form, or ``digits`` is not from 1 to 15.
    """
    if form not in FORMS:
        raise UserError(f"--format must be one of text, {', '.join(FORMS)}, got {form!r}.")
    if not 1 <= digits <= 15:
        raise UserError(f"--digits must be from 1 to 15, got {digits}.")
    return FORMS[form](rows, digits)


def _texts(rows: Sequence[Row], digits: int) -> Iterator[list[str]]:
    names = columns(rows)
    unit = {n: next(r.cells[n].unit for r in rows if n in r.cells) for n in names}
    several = any(len(row.seeds) > 1 for row in rows)
    heads = ["run", "method", "seeds" if several else "seed", "weights"]
    yield [*heads, *(label_of(n, rows) + (f" ({unit[n]})" if unit[n] else "") for n in names)]
    for row in rows:
        about = [row.run, row.method, seeds_of(row), row.weights or "-"]
        yield [*about, *(shown(row.cells.get(n), digits, row, units=False) for n in names)]


def _markdown(rows: Sequence[Row], digits: int) -> str:
    head, *body = ([text.replace("|", "\\|") for text in line] for line in _texts(rows, digits))
    rule = ["---"] * 4 + ["---:"] * (len(head) - 4)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *body))


def _latex(rows: Sequence[Row], digits: int) -> str:
    head, *body = (
        " & ".join("".join(_LATEX.get(c, c) for c in text) for text in line) + r" \\"
        for line in _texts(rows, digits)
    )
    shape = "llll" + "r" * len(columns(rows))
    lines = [rf"\begin{{tabular}}{{{shape}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _csv(rows: Sequence[Row], _: int) -> str:
    names = columns(rows)
    parts = ("low", "high", "deviation", "count")
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    write(
        ["run", "method", "seeds", "weights"]
        + [f"{n}{p}" for n in names for p in ("", *(f" {p}" for p in parts))]
    )
    for row in rows:
        line: list[object] = [row.run, row.method, " ".join(map(str, row.seeds)), row.weights]
        for name in names:
            cell = row.cells.get(name)
            line += ["" if cell is None else getattr(cell, part) for part in ("value", *parts)]
        write(line)
    return text.getvalue()


def _json(rows: Sequence[Row], _: int) -> str:
    found = json_safe([asdict(row) for row in rows])
    return json.dumps(found, indent=2, allow_nan=False) + "\n"


FORMS: dict[str, Callable[[Sequence[Row], int], str]] = {
    "md": _markdown, "csv": _csv, "latex": _latex, "json": _json,
}  # fmt: skip
