"""How well a model withstands attacks: accuracy, AutoAttack and others, doubts, the gap."""

from robustflat.evaluate.accuracy import Metrics, measure
from robustflat.evaluate.adversarial import Adversarial
from robustflat.evaluate.evaluation import AttackError, Work, evaluate
from robustflat.evaluate.examples import choose
from robustflat.evaluate.gaps import Figure, Gap, Scores, gap, overfitting, scores
from robustflat.evaluate.intervals import wilson
from robustflat.evaluate.result import AttackResult, Evaluation, SuiteResult, merge
from robustflat.evaluate.team import Team
from robustflat.evaluate.threat import Threat
from robustflat.evaluate.verdict import Verdict, judge

__all__ = [
    "Adversarial", "AttackError", "AttackResult", "Evaluation", "Figure", "Gap", "Metrics",
    "Scores", "SuiteResult", "Team", "Threat", "Verdict", "Work", "choose", "evaluate", "gap",
    "judge", "measure", "merge", "overfitting", "scores", "wilson",
]  # fmt: skip
