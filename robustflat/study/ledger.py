"""Owns the ledger: one row a run, as CSV and Parquet, each with the command that remakes it.

A ledger is also read: a study takes from it the runs that it would otherwise make itself.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustflat.config import ConfigError, RunConfig, check_config
from robustflat.errors import UserError, missing
from robustflat.files import write_text, writing
from robustflat.study.folder import circumstances
from robustflat.train.folder import flattened, free_to_change

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
        row |= {f"images.{split}": count for split, count in measured["images"].items()}
        row["circumstances"] = json.dumps(measured["circumstances"])
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
    write_text(path, text.getvalue())
    if not rows or find_spec("pyarrow") is None:
        return [path]
    import pyarrow
    from pyarrow import parquet

    columns = {key: _alike([row[key] for row in rows]) for key in rows[0]}
    with writing(path):
        parquet.write_table(pyarrow.table(columns), path.with_suffix(".parquet"))
    return [path, path.with_suffix(".parquet")]


class Ledger:
    """The rows of a ledger file, by what was trained.

    Args:
        path: of a CSV or Parquet file that :func:`save_ledger` wrote.

    Raises:
        UserError: if it cannot be read, or is no ledger.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._rows = path, {}
        for row in _read(path):
            with suppress(ConfigError):  # of another version, so it is another run
                self._rows[_trained(check_config(json.loads(row["config"])))] = row

    def measured(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """What a row says of the run of a job; None if there is none.

        Args:
            job: of :func:`robustflat.study.folder.job_of`.

        Raises:
            UserError: if the run was measured otherwise, so that its row fits no others.
        """
        row = self._rows.get(_trained(check_config(job["config"])))
        if row is None:
            return None
        here, there = circumstances(job), json.loads(row["circumstances"])
        other = [
            f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
            for key in {**here, **there}
            if there.get(key) != here.get(key)
        ]
        if other:
            raise UserError(
                f"The ledger {self._path} has {job['config']['name']}, but measured otherwise: "
                f"{', '.join(other)}. Rows of both would not compare. Measure as there, or leave "
                "the ledger out and make all runs."
            )
        ends = (".error", ".low", ".high")
        names = [key for key in row if key.startswith(("measure.", "target."))]
        names = [key for key in names if not key.endswith(ends)]
        measures = {n[8:]: n for n in names if n.startswith("measure.")}
        targets = {n[7:]: n for n in names if n.startswith("target.")}
        return {
            "run": job["config"]["name"],
            "epoch": int(row["epoch"]),
            "weights": row["weights"],
            "reached_loss": {"True": True, "False": False}.get(str(row["reached_loss"])),
            "circumstances": circumstances(job),
            "images": {k[7:]: int(v) for k, v in row.items() if k.startswith("images.")},
            "targets": {
                name: {
                    "value": _number(row[key]),
                    "low": _number(row[f"{key}.low"]),
                    "high": _number(row[f"{key}.high"]),
                }
                for name, key in targets.items()
            },
            "measures": {
                name: {"value": _number(row[key]), "standard_error": _number(row[f"{key}.error"])}
                for name, key in measures.items()
            },
            "train_steps": int(row["train_steps"]),
            **{key: float(row[key]) for key in ("passes", "train_seconds", "measure_seconds")},
        }


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file.

    Raises:
        UserError: if it is no ledger.
    """
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            rows = parquet.read_table(path).to_pylist()
        else:
            rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    except ImportError:
        raise missing(f"{path} (unlike the CSV file)", "pyarrow", "study") from None
    except (OSError, ValueError) as error:
        raise UserError(f"The ledger {path} cannot be read: {error}.") from None
    wanted = {"config", "circumstances", "epoch", "weights", "train_steps", "passes"}
    if rows and not wanted <= set(rows[0]):
        raise UserError(
            f"{path} is no ledger of a study: it has no column "
            f"{min(wanted - set(rows[0]))!r}. Name a ledger.csv that `robustflat study` wrote."
        )
    return rows


def _trained(config: RunConfig) -> str:
    """What makes a training this one and no other; how it is measured its circumstances say."""
    keys = dict(flattened(config.model_dump(mode="json", exclude={"name"})))
    told = {".".join(key): value for key, value in keys.items() if not free_to_change(key)}
    return json.dumps(told, sort_keys=True)


def _number(value: Any) -> float | None:
    return None if value in (None, "") else float(value)


def _alike(values: list[Any]) -> list[Any]:
    """A column of one type: levels of a factor may be numbers and texts."""
    kinds = {type(v) for v in values if v is not None}
    if len(kinds) <= 1 or kinds <= {int, float}:
        return values
    return [None if v is None else str(v) for v in values]
