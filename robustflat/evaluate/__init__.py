"""How well a model withstands attacks: accuracy, AutoAttack and others, doubts, the gap."""

from robustflat.evaluate.accuracy import measure
from robustflat.evaluate.adversarial import Adversarial
from robustflat.evaluate.evaluation import AttackError, Work, evaluate
from robustflat.evaluate.examples import choose
from robustflat.evaluate.gaps import Scores, gap, overfitting, scores
from robustflat.evaluate.intervals import wilson
from robustflat.evaluate.result import Evaluation, merge
from robustflat.evaluate.team import Team
from robustflat.evaluate.verdict import judge

__all__ = [
    "Adversarial", "AttackError", "Evaluation", "Scores", "Team", "Work", "choose", "evaluate",
    "gap", "judge", "measure", "merge", "overfitting", "scores", "wilson",
]  # fmt: skip
