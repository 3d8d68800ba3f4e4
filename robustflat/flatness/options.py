"""Owns the settings of the flatness measures, their defaults and their checks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Gt, Lt
from pydantic import AfterValidator, InstanceOf, StrictBool, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from robustflat.config.reading import explained
from robustflat.config.values import Count, NonNegative, NormName, Number
from robustflat.errors import UserError, nearest
from robustflat.perturb import SCALES, Ball, InputPerturbation, parse_norm
from robustflat.perturb.ball import Group
from robustflat.perturb.scales import Scale, check_selection

BallName = Literal["global", "global_relative", "tensor", "row", "adaptive"]
Distribution = Literal["sphere", "ball", "normal"]
Estimator = Literal["hutchinson", "hutchpp", "xtrace"]

# The group in which a ball is taken, and the scale T of delta = T * u.
BALLS: dict[BallName, tuple[Group, str]] = {
    "global": ("global", "one"),
    "global_relative": ("global", "global_norm"),
    "tensor": ("tensor", "tensor_norm"),
    "row": ("row", "row_norm"),
    "adaptive": ("global", "magnitude"),
}
# Weights, where nobody says which: those that sharpness moves, as AWP does, and norms are taken of;
# and those of all derivatives.
MOVED, DIFFERENTIATED = "matrices", "all"
WORST_RADIUS = 5e-3
AVERAGE_RADIUS = 0.1


def _selection(text: str) -> str:
    check_selection(text)
    return text


def _weight_norm(norm: str | float) -> str | float:
    if parse_norm(norm) not in (1, 2, math.inf):
        raise ValueError("must be l2, linf or l1")
    return norm


@dataclass(frozen=True, kw_only=True)
class Options:
    """How flatness is measured.

    Args:
        attack: makes the adversarial examples of the robust loss.
        examples: measure on the first so many; None for all.
        parameters: "all", "matrices" (more than one dimension), "norm" (those of normalisation
            layers), "no_norm" (all others) or "re:PATTERN". None is "matrices" for sharpness, as
            AWP moves them, and "all" for the rest.
        ball: the weights' ball. "tensor" and "row" (filter): radius relative to the L2 norm of
            each tensor or filter; "global_relative": of all weights; "global": in the units of the
            weights; "adaptive": T = |w| for every entry (ASAM's), unchanged by a rescaling of
            layers that leaves the function as it is.
        weight_norm: "l2", "linf" or "l1". With linf a relative radius bounds every entry by
            radius times the root mean square of its group, so that a corner of the ball is as
            far away as the surface of the L2 ball.
        radius: of the ball. None is 0.005 for worst- and ascent-direction (AWP's gamma) and 0.1
            for average-direction: a random direction needs the longer step to be seen at all.
        steps: gradient steps of the worst-direction search.
        step_size: of these, in radii. Steps of a whole radius turn the iterate along the ball's
            surface and converge fastest.
        restarts: worst direction: how many starts. The first is the ascent direction's end, so
            worst-direction sharpness is never the smaller; the others are random.
        samples: average direction: how many directions.
        distribution: of these, uniform on the "sphere" or in the "ball", or "normal" with the
            radius as the standard deviation of every entry of u; in a ball that is relative to a
            norm, such that its expected square is the ball's.
        m: measure sharpness separately for every m examples and average (m-sharpness); None takes
            all together.
        normalise_logits: measure the loss of (z - mean z) / ||z - mean z|| (Andriushchenko et al.
            2023), whose scale says nothing.
        k: number of eigenvalues at each end.
        tolerance: of eigenvalues, relative to the largest.
        max_hvps: most Hessian-vector products spent on one end of the spectrum.
        probes: Hessian-vector products (for the Fisher trace: gradients) of a trace estimate.
        estimator: of the trace: "hutchinson", which also gives every layer's; "hutchpp" or
            "xtrace" (by curvlinops), far more accurate where few eigenvalues stand out, run three
            times with ``probes`` products each for their error to be known.
        lanczos_steps: Hessian-vector products of each run of the spectral density.
        lanczos_runs: how many are averaged.
        rho: radius of the PAC-Bayes bound, in the units of the weights.
        confidence: of the PAC-Bayes bound, 1 - delta.
        train_size: examples that the model was trained on, for that bound; None: all images of
            the data, of which ``examples`` may choose fewer to measure on.
    """

    attack: InstanceOf[InputPerturbation]
    examples: Count | None = None
    parameters: Annotated[str, AfterValidator(_selection)] | None = None
    ball: BallName = "tensor"
    weight_norm: Annotated[NormName, AfterValidator(_weight_norm)] = "l2"
    radius: NonNegative | None = None
    steps: Count = 10
    step_size: NonNegative = 1.0
    restarts: Count = 2
    samples: Count = 10
    distribution: Distribution = "sphere"
    m: Count | None = None
    normalise_logits: StrictBool = False
    k: Count = 1
    tolerance: NonNegative = 1e-4
    max_hvps: Count = 200
    probes: Count = 30
    estimator: Estimator = "hutchinson"
    lanczos_steps: Count = 30
    lanczos_runs: Count = 3
    rho: NonNegative = 0.05
    confidence: Annotated[Number, Gt(0), Lt(1)] = 0.95
    train_size: Count | None = None

    def __post_init__(self) -> None:
        if self.k > self.max_hvps:
            raise ValueError(
                f"max_hvps must be at least k, as every eigenvalue takes a product, got "
                f"{self.max_hvps} for {self.k} eigenvalues"
            )
        if self.estimator != "hutchinson" and self.probes < 3:
            raise ValueError(
                f"The trace estimator {self.estimator} needs probes >= 3, got {self.probes}"
            )

    def radius_or(self, default: float) -> float:
        """The radius, or a measure's own default."""
        return default if self.radius is None else self.radius

    def weight_ball(self, default_radius: float) -> Ball:
        """The ball that u is taken from."""
        return Ball(
            parse_norm(self.weight_norm), self.radius_or(default_radius), BALLS[self.ball][0]
        )

    def deviations(self, weights: list[Tensor]) -> list[float]:
        """Standard deviation of the entries of a normal u, in radii."""
        group, name = BALLS[self.ball]
        if name.endswith("_norm") and parse_norm(self.weight_norm) != math.inf:
            return _per_entry(group, weights)
        return [1.0] * len(weights)

    @property
    def scale(self) -> Scale:
        """T of delta = T * u."""
        group, name = BALLS[self.ball]
        relative = name.endswith("_norm")
        if relative and parse_norm(self.weight_norm) == math.inf:
            return partial(_root_mean_square, SCALES[name], group)
        return SCALES[name]

    def to_dict(self) -> dict[str, Any]:
        """Every setting, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"attack": repr(self.attack)}


def _root_mean_square(
    norm: Scale, group: Group, names: list[str], weights: list[Tensor]
) -> list[Tensor] | None:
    """An L2 norm of each group over the root of its number of entries."""
    scale = norm(names, weights)
    assert scale is not None
    return [t * share for t, share in zip(scale, _per_entry(group, weights), strict=True)]


def _per_entry(group: Group, weights: list[Tensor]) -> list[float]:
    """One over the root of the number of entries of each group."""
    total = sum(w.numel() for w in weights)
    entries = {
        "row": [w.numel() // (w.shape[0] if w.ndim > 1 else 1) for w in weights],
        "tensor": [w.numel() for w in weights],
        "global": [total for _ in weights],
    }[group]
    return [1 / math.sqrt(max(n, 1)) for n in entries]


def check_names(given: Iterable[str]) -> None:
    """Refuse what is no option.

    Raises:
        UserError: with all that are.
    """
    known = sorted(field.name for field in fields(Options))
    for name in given:
        if name not in known:
            raise UserError(
                f"Flatness has no option {name!r}.{nearest(name, known)} Options: "
                f"{', '.join(known)}."
            )


def with_options(base: Options, changes: Mapping[str, Any]) -> Options:
    """``base`` with some options changed.

    Raises:
        UserError: for an unknown option or an impossible value.
    """
    check_names(changes)
    try:
        return replace(base, **changes)
    except ValidationError as error:
        raise explained(error, "flatness options") from None
