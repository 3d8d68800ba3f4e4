"""How well a model withstands attacks: accuracy, AutoAttack and others, sanity checks, the gap."""

from robustflat.evaluate.accuracy import Metrics, measure
from robustflat.evaluate.gap import Figure, Gap, Scores, gap, overfitting, scores
from robustflat.evaluate.intervals import wilson
from robustflat.evaluate.result import AttackResult, Evaluation, merge
from robustflat.evaluate.run import evaluate
from robustflat.evaluate.verify import Verdict, judge

__all__ = [
    "AttackResult",
    "Evaluation",
    "Figure",
    "Gap",
    "Metrics",
    "Scores",
    "Verdict",
    "evaluate",
    "gap",
    "judge",
    "measure",
    "merge",
    "overfitting",
    "scores",
    "wilson",
]
