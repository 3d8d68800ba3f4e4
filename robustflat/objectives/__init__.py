"""The training objectives of the literature."""

from robustflat.objectives.base import FromFunction, Objective
from robustflat.objectives.plain import adversarial, mart, mlcat, standard, trades
from robustflat.objectives.remembering import gkl, ikl, rebat

__all__ = [
    "FromFunction", "Objective", "adversarial", "gkl", "ikl", "mart", "mlcat", "rebat",
    "standard", "trades",
]  # fmt: skip
