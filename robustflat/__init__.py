"""Train image classifiers that withstand adversarial inputs, and show why they do."""

from robustflat.errors import UserError
from robustflat.evaluate import evaluate
from robustflat.flatness import flatness, landscape
from robustflat.objectives import adversarial, gkl, ikl, mart, mlcat, rebat, standard, trades
from robustflat.perturb import (
    Ascent,
    Ball,
    InputPerturbation,
    WeightPerturbation,
    amp,
    asam,
    awp,
    awp_global,
    fgsm,
    gsam,
    msam,
    no_perturbation,
    nsam,
    pgd,
    random_weights,
    sam,
)

__version__ = "0.1.0"

__all__ = [
    "Ascent",
    "Ball",
    "InputPerturbation",
    "UserError",
    "WeightPerturbation",
    "adversarial",
    "amp",
    "asam",
    "awp",
    "awp_global",
    "evaluate",
    "fgsm",
    "flatness",
    "gkl",
    "gsam",
    "ikl",
    "landscape",
    "mart",
    "mlcat",
    "msam",
    "no_perturbation",
    "nsam",
    "pgd",
    "random_weights",
    "rebat",
    "sam",
    "standard",
    "trades",
]
