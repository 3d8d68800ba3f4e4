"""The rows in which runs are compared, read from the JSON files in their folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from robustflat.config import RunConfig
from robustflat.config.choice import Built
from robustflat.errors import UserError
from robustflat.train.folder import RunFolder


@dataclass(frozen=True)
class Cell:
    """A figure, its interval or standard error, and whether it is a share (shown in percent)."""

    value: float | None
    low: float | None = None
    high: float | None = None
    share: bool = True


@dataclass(frozen=True)
class Row:
    """One run: its name, what was done, and its figures by column."""

    run: str
    method: str
    seed: int
    cells: dict[str, Cell]


def compare(folders: Sequence[RunFolder]) -> list[Row]:
    """One row for every run.

    Columns, where they were measured: clean and robust accuracy on test images at the best
    checkpoint (robust by attack; AutoAttack's figure is the worst case over all attacks run),
    ``robust gap`` (train minus test robust accuracy at the last checkpoint), ``best - last``
    (robust test accuracy), and the flatness measures.

    Raises:
        UserError: if a run has not been evaluated.
    """
    return [_row(folder) for folder in folders]


def columns(rows: Sequence[Row]) -> list[str]:
    """All columns of the rows, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row.cells))


def method_of(config: RunConfig) -> str:
    """A run's method in words, such as "adversarial + awp(gamma=0.01)"."""
    objective = config.objective.name
    words = {"adversarial": "AT", "trades": "TRADES", "mart": "MART"}.get(objective, objective)
    weights = config.weights
    if weights.name == "none":
        return words
    return f"{words} + {_call(weights)}"


def _call(section: Built) -> str:
    """A section as a call: its first key, which says how strong it is, and what is not usual."""
    unusual = section.model_dump(exclude_defaults=True)
    shown = {k: getattr(section, k) for k in section.own if k == section.own[0] or k in unusual}
    shown |= {k: v for k, v in unusual.items() if k in ("when", "step")}
    said = (f"{k}={_call(v) if isinstance(v, Built) else _plain(v)}" for k, v in shown.items())
    return f"{section.name}({', '.join(said)})"


def read_json(folder: RunFolder, kind: str) -> dict[str, Any] | None:
    """``evaluation.json`` or ``flatness.json`` of a run, if it is there.

    Raises:
        UserError: if the file is damaged.
    """
    path = getattr(folder, kind)
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read: {error}. Run `robustflat {_COMMANDS[kind]} {folder.root}` "
            "again."
        ) from None
    return content


_COMMANDS = {"evaluation": "evaluate", "flatness": "flatness"}


def _row(folder: RunFolder) -> Row:
    config = folder.read_config()
    evaluation, flatness = read_json(folder, "evaluation"), read_json(folder, "flatness")
    if evaluation is None and flatness is None:
        raise UserError(
            f"The run {folder.root} has neither {folder.evaluation.name} nor "
            f"{folder.flatness.name}, so there is nothing to compare. Run `robustflat evaluate "
            f"{folder.root}` first."
        )
    cells: dict[str, Cell] = {}
    for kind, content, read in (
        ("evaluation", evaluation, _evaluation_cells),
        ("flatness", flatness, _flatness_cells),
    ):
        try:
            cells |= {} if content is None else read(content)
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{getattr(folder, kind)} is not what `robustflat {_COMMANDS[kind]}` writes "
                f"({type(error).__name__}: {error}). Run it again on {folder.root}."
            ) from None
    return Row(folder.name, method_of(config), config.seed, cells)


def _flatness_cells(flatness: dict[str, Any]) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for name, figure in flatness["measures"].items():
        if figure["value"] is not None:
            spread = figure["standard_error"]
            low = None if spread is None else figure["value"] - spread
            high = None if spread is None else figure["value"] + spread
            cells[name] = Cell(figure["value"], low, high, share=False)
    return cells


def _evaluation_cells(evaluation: dict[str, Any]) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    tested = [entry for entry in evaluation["checkpoints"].values() if entry["test"]]
    if tested:
        test = tested[0]["test"]
        cells["clean"] = Cell(test["clean_accuracy"], *test["clean_interval"])
        for name, attack in test["attacks"].items():
            if attack["alone"] is not None:
                cells[name] = Cell(attack["alone"], *attack["interval"])
        if len(test["attacks"]) > 1:
            cells[_worst_name(test["attacks"])] = Cell(
                test["robust_accuracy"], *test["robust_interval"]
            )
    last = evaluation["checkpoints"].get("last")
    if last is not None:
        cells["robust gap"] = _cell(last["gap"]["gaps"]["train-test"]["robust_accuracy"])
        loss = last["gap"]["gaps"]["train-test"]["robust_loss"]
        if loss["value"] is not None:  # infinite
            cells["loss gap"] = _cell(loss, share=False)
    if evaluation["overfitting"] is not None:
        cells["best - last"] = _cell(evaluation["overfitting"]["robust_accuracy"])
    return cells


def _worst_name(attacks: dict[str, Any]) -> str:
    standard = {"apgd-ce", "apgd-t", "fab-t", "square"}
    return "AutoAttack" if standard <= set(attacks) else "worst case"


def _cell(figure: dict[str, Any], share: bool = True) -> Cell:
    return Cell(figure["value"], figure["low"], figure["high"], share)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
