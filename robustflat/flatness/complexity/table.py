"""Owns the list of the measures of complexity: name, which loss, and what each costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from robustflat.flatness.complexity import bayes, margins, norms
from robustflat.flatness.curvature import hutchinson_passes
from robustflat.flatness.figure import Figure, Passes
from robustflat.flatness.options import Options
from robustflat.flatness.subject import LossKind, Subject


@dataclass(frozen=True)
class Complexity:
    """A measure of complexity.

    Attributes:
        name: as users call it.
        compute: measures it; the first line of its docstring is the formula.
        loss: which loss it is of; one that is not "clean" needs the attack's images.
        passes: what it costs beside those.
        curvature: whether it takes the Hessian.
    """

    name: str
    compute: Callable[[Subject, Options, LossKind, str], Figure]
    loss: LossKind = "clean"
    passes: Callable[[Options], Passes] = lambda options: Passes()
    curvature: bool = False


def _forward(number: int) -> Callable[[Options], Passes]:
    return lambda options: Passes(forward=number)


def _sigma(options: Options) -> Passes:
    return Passes(forward=1 + bayes.HALVINGS * options.samples)


def _slope(options: Options) -> Passes:
    return Passes(gradient=1)


def _lipschitz(options: Options) -> Passes:
    return Passes(forward=1, input_gradient=margins.LIPSCHITZ.steps + 2)


def _probes(options: Options) -> Passes:
    return hutchinson_passes(options)


COMPLEXITY: tuple[Complexity, ...] = (
    Complexity("parameter_norm", norms.parameter_norm),
    Complexity("spectral_product", norms.spectral_product),
    Complexity("spectral_sum", norms.spectral_sum),
    Complexity("frobenius_product", norms.frobenius_product),
    Complexity("frobenius_sum", norms.frobenius_sum),
    Complexity("distance_spectral", norms.distance_spectral),
    Complexity("distance_frobenius", norms.distance_frobenius),
    Complexity("path_norm", norms.path_norm),
    Complexity("logit_margin", margins.logit_margin, passes=_forward(1)),
    Complexity("logit_margin_robust", margins.logit_margin, "robust_fixed", _forward(1)),
    Complexity("logit_margin_p10", margins.logit_margin_p10, passes=_forward(1)),
    Complexity("logit_margin_p10_robust", margins.logit_margin_p10, "robust_fixed", _forward(1)),
    Complexity("probability_margin", margins.probability_margin, passes=_forward(1)),
    Complexity(
        "probability_margin_robust", margins.probability_margin, "robust_fixed", _forward(1)
    ),
    Complexity("kl_robust", margins.kl_robust, "robust_fixed", _forward(2)),
    Complexity(
        "boundary_thickness",
        margins.boundary_thickness,
        "robust_fixed",
        _forward(2 + margins.SEGMENT),
    ),
    Complexity("local_lipschitz", margins.local_lipschitz, passes=_lipschitz),
    Complexity("pac_bayes_sigma", bayes.pac_bayes_sigma, passes=_sigma),
    Complexity("pac_bayes_magnitude", bayes.pac_bayes_magnitude, passes=_sigma),
    Complexity("fisher_rao", bayes.fisher_rao, passes=_slope),
    Complexity("fisher_rao_robust", bayes.fisher_rao, "robust_fixed", _slope),
    Complexity("relative_flatness", bayes.relative_flatness, passes=_forward(1)),
    Complexity("relative_flatness_robust", bayes.relative_flatness, "robust_fixed", _forward(1)),
    Complexity("weight_curvature", bayes.weight_curvature, passes=_probes, curvature=True),
    Complexity(
        "weight_curvature_robust",
        bayes.weight_curvature,
        "robust_fixed",
        _probes,
        curvature=True,
    ),
)
