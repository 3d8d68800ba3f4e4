"""Owns what an evaluation says: figures, intervals and warnings computed from its record."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from robustflat.errors import UserError
from robustflat.evaluate import outcomes
from robustflat.evaluate.intervals import LEVEL, Interval, wilson
from robustflat.evaluate.outcomes import MISCLASSIFIED, Record


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """What one attack did.

    Attributes:
        accuracy: Share of all examples still correct after this attack and all before it, as
            AutoAttack prints it.
        interval: Wilson's 95 % interval for it.
        alone: Share of all examples still correct after this attack alone; None unless it ran on
            every example that the model classifies, as the first attack does.
        attacked: How many examples it ran on: those that stood when it began.
        broken: How many of those it broke.
        outside: How many of the images it returned lay outside the ball or the box.
        seconds: Time spent, over all runs that this one resumed.
    """

    accuracy: float
    interval: Interval
    alone: float | None
    attacked: int
    broken: int
    outside: int
    seconds: float


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
        outcomes: int8 [N]: position in `attacks` of the one that broke the example, -1 if it still
            stands, -2 if it was misclassified without any attack.
        warnings: Reasons to doubt the figures, and what was left out; one sentence each.
        settings: What the figures depend on: norm, eps, seed, batch_size, samples, shard, classes,
            and, if outcomes were stored, SHA-256 of data, of all labels and of the model (else,
            and for the data of merged shards, None).
    """

    count: int
    clean_accuracy: float
    clean_interval: Interval
    robust_accuracy: float
    robust_interval: Interval
    attacks: dict[str, AttackResult]
    outcomes: Tensor
    warnings: list[str]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All but the per-example outcomes, for JSON: stable keys, no NaN."""
        return {
            "count": self.count,
            "clean_accuracy": self.clean_accuracy,
            "clean_interval": list(self.clean_interval),
            "robust_accuracy": self.robust_accuracy,
            "robust_interval": list(self.robust_interval),
            "confidence": LEVEL,
            "attacks": {
                name: {**asdict(attack), "interval": list(attack.interval)}
                for name, attack in self.attacks.items()
            },
            "warnings": list(self.warnings),
            "settings": dict(self.settings),
        }


def from_record(record: Record) -> Evaluation:
    """The figures of a record."""
    count = len(record.outcomes)
    clean = standing = int((record.outcomes != MISCLASSIFIED).sum())
    attacks = {}
    for index, entry in enumerate(record.entries):
        broken = int((record.outcomes == index).sum())
        standing -= broken
        attacks[entry.name] = AttackResult(
            accuracy=standing / count,
            interval=wilson(standing, count),
            alone=standing / count if entry.attacked == clean else None,
            attacked=entry.attacked,
            broken=broken,
            outside=entry.outside,
            seconds=entry.seconds,
        )
    return Evaluation(
        count=count,
        clean_accuracy=clean / count,
        clean_interval=wilson(clean, count),
        robust_accuracy=standing / count,
        robust_interval=wilson(standing, count),
        attacks=attacks,
        outcomes=record.outcomes.clone(),
        warnings=list(record.warnings),
        settings=dict(record.settings),
    )


def merge(store: str | Path) -> Evaluation:
    """The evaluation of the whole from the outcomes that all its shards saved in a folder.

    Outcomes are joined example by example, so every figure is what counting over all shards gives.

    Args:
        store: The folder that was the `store` of `evaluate(..., shard="i/n")` for every i.

    Returns:
        The evaluation, with `settings["shard"]` None.

    Raises:
        UserError: If there is no shard, one is missing, unfinished, damaged or of another
            evaluation.
    """
    files = sorted(Path(store).glob("outcomes-*-of-*.json"))
    if not files:
        raise UserError(
            f"There are no shards in {store}. Run evaluate with shard='1/4', ... and store={store}."
        )
    return from_record(outcomes.merged([outcomes.load(file) for file in files]))
