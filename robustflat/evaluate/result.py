"""Owns what an evaluation says: figures, intervals and warnings computed from its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from robustflat.errors import UserError
from robustflat.evaluate import doubts
from robustflat.evaluate.classes import by_class, confusion
from robustflat.evaluate.intervals import LEVEL, Interval, wilson
from robustflat.evaluate.record import Record, file_for, load, merged
from robustflat.files import json_safe


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """What one attack did.

    Attributes:
        accuracy: Share of all examples still correct after this attack and those that it follows,
            as AutoAttack prints it.
        interval: Wilson's 95 % interval for it.
        alone: The same where it follows none: the share still correct after this attack alone.
        after: The attack on whose survivors it ran; None if on all that the model classifies.
        attacked: How many examples it ran on: those that stood when it began.
        broken: How many of those it broke.
        outside: How many of the images it returned lay outside the ball or the box.
        seconds: Time spent, over all runs that this one resumed.
        options: All its parameters.
    """

    accuracy: float
    interval: Interval
    alone: float | None
    after: str | None
    attacked: int
    broken: int
    outside: int
    seconds: float
    options: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """What the attacks did that were asked for together, such as AutoAttack.

    Attributes:
        accuracy: Share of all examples that none of them broke.
        interval: Wilson's 95 % interval for it.
        attacks: Their names, in their order.
    """

    accuracy: float
    interval: Interval
    attacks: list[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        count: Number of examples N.
        clean_accuracy: Share classified correctly without any attack.
        clean_interval: Wilson's 95 % interval for it.
        robust_accuracy: Share that no attack broke: the worst case per example.
        robust_interval: Wilson's 95 % interval for it.
        attacks: By name, in the order they ran.
        suites: By what was asked for: "pgd-20", "autoattack", ...
        outcomes: int16 [N]: position in `attacks` of the first one that broke the example, -1 if
            it still stands, -2 if it was misclassified without any attack.
        positions: int64 [N]: where each example stands in the data.
        labels: int64 [N].
        predictions: int64 [N]: what the model takes each for, without any attack.
        attacked: int64 [N]: what it takes the first image for that an attack broke the example
            with; `predictions` where none did.
        warnings: Reasons to doubt the figures, and what was left out; one sentence each.
        settings: What the figures depend on: norm, eps, seed, batch_size, samples, shard, classes,
            whether the search was compiled, and, if outcomes were stored, SHA-256 of data, of all
            labels and of the model (else, and for the data of merged shards, None).
    """

    count: int
    clean_accuracy: float
    clean_interval: Interval
    robust_accuracy: float
    robust_interval: Interval
    attacks: dict[str, AttackResult]
    suites: dict[str, SuiteResult]
    outcomes: Tensor
    positions: Tensor
    labels: Tensor
    predictions: Tensor
    attacked: Tensor
    warnings: list[str]
    settings: dict[str, Any]

    def confusion(self, *, attacked: bool = False) -> Tensor:
        """How many examples of each label (row) the model takes for each class, int64 [C, C].

        Args:
            attacked: Under all attacks together, as `attacked` has it; else without any.
        """
        found = self.attacked if attacked else self.predictions
        return confusion(self.labels, found, self.settings["classes"])

    def by_class(self, names: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
        """Figures of every class; see `robustflat.evaluate.classes.by_class`."""
        return by_class(self.labels, self.outcomes, self.predictions, self.attacked, names)

    def to_dict(self) -> dict[str, Any]:
        """All but the per-example outcomes, for JSON: stable keys, no NaN."""
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        shown |= {kind: {name: asdict(one) for name, one in shown[kind].items()}
                  for kind in ("suites", "attacks")}  # fmt: skip
        kept = {key: value for key, value in shown.items() if not isinstance(value, Tensor)}
        return {"confidence": LEVEL, **json_safe(kept)}


def from_record(record: Record) -> Evaluation:
    """The figures of a record; attacks that have not ended are left out."""
    count = len(record.right)

    def share(standing: Tensor) -> tuple[float, Interval]:
        return int(standing.sum()) / count, wilson(int(standing.sum()), count)

    attacks = {}
    for index, entry in record.finished():
        accuracy, interval = share(record.standing(index))
        attacks[entry.name] = AttackResult(
            accuracy=accuracy,
            interval=interval,
            alone=accuracy if entry.after is None else None,
            after=None if entry.after is None else record.entries[entry.after].name,
            attacked=entry.attacked,
            broken=len(entry.broke),
            outside=entry.outside,
            seconds=entry.seconds,
            options=dict(entry.identity),
        )
    suites = {}
    for name, which in record.suites.items():
        if all(record.entries[i].finished for i in which):
            accuracy, interval = share(record.standing(which[-1]))
            names = [record.entries[i].name for i in which]
            suites[name] = SuiteResult(accuracy=accuracy, interval=interval, attacks=names)
    outcomes = record.outcomes()
    (clean, clean_interval), (robust, robust_interval) = share(record.right), share(outcomes == -1)
    return Evaluation(
        count=count,
        clean_accuracy=clean,
        clean_interval=clean_interval,
        robust_accuracy=robust,
        robust_interval=robust_interval,
        attacks=attacks,
        suites=suites,
        outcomes=outcomes,
        positions=record.positions,
        labels=record.labels,
        predictions=record.predictions,
        attacked=record.attacked(),
        warnings=doubts.of_record(record),
        settings=dict(record.settings),
    )


def merge(store: str | Path, data: str | None = None) -> Evaluation:
    """The evaluation of the whole from the outcomes that all its shards saved in a folder.

    Outcomes are joined example by example, so every figure is what counting over all shards gives.

    Args:
        store: The folder that was the `store` of `evaluate(..., shard="i/n")` for every i. What it
            has of an evaluation of the whole counts too.
        data: SHA-256 of all images, which no shard knows, if it is known.

    Returns:
        The evaluation, with `settings["shard"]` None.

    Raises:
        UserError: If there is no shard, one is missing, unfinished, damaged or of another
            evaluation.
    """
    files = sorted(Path(store).glob("outcomes-*-of-*.json"))
    if not files:
        raise UserError(
            f"There are no shards in {store}: evaluate every one first (--shard 1/4, 2/4, ...), "
            "with the options that are said now."
        )
    record = merged([load(file) for file in files])
    record.settings["data"] = data
    whole = file_for(store, None)
    if whole.is_file():
        record.take(load(whole))
    return from_record(record)
