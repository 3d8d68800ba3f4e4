"""Owns the settings of the flatness measures, their defaults and their checks."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor

from robustflat.errors import UserError
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

    attack: InputPerturbation
    examples: int | None = None
    parameters: str | None = None
    ball: BallName = "tensor"
    weight_norm: str | float = "l2"
    radius: float | None = None
    steps: int = 10
    step_size: float = 1.0
    restarts: int = 2
    samples: int = 10
    distribution: Distribution = "sphere"
    m: int | None = None
    normalise_logits: bool = False
    k: int = 1
    tolerance: float = 1e-4
    max_hvps: int = 200
    probes: int = 30
    estimator: Estimator = "hutchinson"
    lanczos_steps: int = 30
    lanczos_runs: int = 3
    rho: float = 0.05
    confidence: float = 0.95
    train_size: int | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise UserError(f"{name} must be a whole number, got {value!r}.")
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}."
                )
        for name in ("step_size", "tolerance", "rho", "radius", "confidence"):
            value = getattr(self, name)
            if name == "radius" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"{name} must be a number, got {value!r}.")
            if not 0 <= value < math.inf:
                raise UserError(f"{name} must be finite and >= 0, got {value!r}.")
        if not 0 < self.confidence < 1:
            raise UserError(f"confidence must be between 0 and 1, got {self.confidence!r}.")
        if not isinstance(self.normalise_logits, bool):
            raise UserError(
                f"normalise_logits must be true or false, got {self.normalise_logits!r}."
            )
        if self.k > self.max_hvps:
            raise UserError(
                f"max_hvps must be at least k, as every eigenvalue takes a product, got "
                f"{self.max_hvps} for {self.k} eigenvalues."
            )
        try:
            check_selection("all" if self.parameters is None else self.parameters)
        except (ValueError, AttributeError, TypeError):
            raise UserError(
                "parameters must be all, matrices, norm, no_norm or re:PATTERN, got "
                f"{self.parameters!r}."
            ) from None
        if self.estimator != "hutchinson" and self.probes < 3:
            raise UserError(
                f"The trace estimator {self.estimator} needs probes >= 3, got {self.probes}."
            )
        try:
            if parse_norm(self.weight_norm) not in (1, 2, math.inf):
                raise ValueError(
                    f"weight_norm must be 'l2', 'linf' or 'l1', got {self.weight_norm!r}."
                )
        except ValueError as error:
            raise UserError(str(error)) from None

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


_COUNTS = (
    "examples", "steps", "restarts", "samples", "m", "k", "max_hvps", "probes", "lanczos_steps",
    "lanczos_runs", "train_size",
)  # fmt: skip
_CHOICES: dict[str, tuple[str, ...]] = {
    "ball": get_args(BallName),
    "distribution": get_args(Distribution),
    "estimator": get_args(Estimator),
}


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
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UserError(f"Flatness has no option {name!r}.{hint} Options: {', '.join(known)}.")


def with_options(base: Options, changes: Mapping[str, Any]) -> Options:
    """``base`` with some options changed.

    Raises:
        UserError: for an unknown option or an impossible value.
    """
    check_names(changes)
    try:
        return replace(base, **changes)
    except TypeError as error:
        raise UserError(f"A flatness option is of the wrong type: {error}.") from None
