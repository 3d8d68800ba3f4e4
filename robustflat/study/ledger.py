"""Owns the ledger: one row a run, as CSV and Parquet, each with the command that remakes it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustflat.errors import UserError
from robustflat.files import write_whole

if TYPE_CHECKING:
    from robustflat.study.result import RunResult


def ledger(runs: Sequence[RunResult], command: str) -> list[dict[str, Any]]:
    """One flat row a run: factors, targets with intervals, measures with errors, cost, command.

    Args:
        runs: finished ones.
        command: which, followed by a run's name, remakes its row.

    Returns:
        Rows with the same keys in the same order; None for what is not known.
    """
    rows = []
    for run in runs:
        measured = run.measured
        row: dict[str, Any] = {"run": run.run}
        row |= {f"factor.{name}": level for name, level in run.factors.items()}
        for name, figure in measured["targets"].items():
            row[f"target.{name}"] = figure["value"]
            row[f"target.{name}.low"], row[f"target.{name}.high"] = figure["low"], figure["high"]
        for name, figure in measured["measures"].items():
            row[f"measure.{name}"] = figure["value"]
            row[f"measure.{name}.error"] = figure["standard_error"]
        for key in (
            "epoch", "weights", "reached_loss", "train_steps", "train_seconds", "passes",
            "measure_seconds",
        ):  # fmt: skip
            row[key] = measured[key]
        row["command"] = f"{command} {run.run}"
        row["config"] = json.dumps(run.config)
        rows.append(row)
    names = list(dict.fromkeys(key for row in rows for key in row))
    return [{name: row.get(name) for name in names} for row in rows]


def save_ledger(runs: Sequence[RunResult], path: Path, command: str) -> list[Path]:
    """Write the ledger as CSV, and beside it as Parquet where pyarrow is installed.

    Args:
        runs: finished ones.
        path: of the CSV file.
        command: see :func:`ledger`.

    Returns:
        What was written.

    Raises:
        UserError: if it cannot be written.
    """
    rows = ledger(runs, command)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["run"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    try:
        write_whole(path, text.getvalue())
        if not rows or find_spec("pyarrow") is None:
            return [path]
        import pyarrow
        from pyarrow import parquet

        columns = {key: _alike([row[key] for row in rows]) for key in rows[0]}
        parquet.write_table(pyarrow.table(columns), path.with_suffix(".parquet"))
    except OSError as error:
        raise UserError(f"The ledger {path} cannot be written: {error}.") from None
    return [path, path.with_suffix(".parquet")]


def _alike(values: list[Any]) -> list[Any]:
    """A column of one type: levels of a factor may be numbers and texts."""
    kinds = {type(v) for v in values if v is not None}
    if len(kinds) <= 1 or kinds <= {int, float}:
        return values
    return [None if v is None else str(v) for v in values]
