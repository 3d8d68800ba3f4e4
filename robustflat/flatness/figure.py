"""Owns what a measurement returns, and what it costs, in a form that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from robustflat.files import json_safe

# In forward passes: a matrix product has two in its backward pass (one if only the input's gradient
# is wanted), and a Hessian-vector product differentiates those three, which it needs as a graph.
UNITS = {"forward": 1.0, "input_gradient": 2.0, "gradient": 3.0, "hvp": 6.0}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number.

    Attributes:
        value: the number.
        standard_error: of its estimation by random directions, probes or chunks; None where
            nothing random enters the value or one draw tells nothing of its spread.
        details: everything else, ready for JSON; the measure's documentation names its keys.
    """

    value: float
    standard_error: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Keys ``value``, ``standard_error`` and ``details``; NaN and infinity become null."""
        safe: dict[str, Any] = json_safe(vars(self))
        return safe


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Passes over the whole set of examples, by kind.

    Attributes:
        forward: without gradient.
        input_gradient: forward, and backward to the images.
        gradient: forward, and backward to the weights.
        hvp: backward through a graph of the gradient, for a Hessian-vector product.
    """

    forward: float = 0.0
    input_gradient: float = 0.0
    gradient: float = 0.0
    hvp: float = 0.0

    @property
    def units(self) -> float:
        """All of them in forward passes (see ``UNITS``)."""
        return math.fsum(UNITS[kind] * number for kind, number in asdict(self).items())

    def __add__(self, other: Passes) -> Passes:
        mine, theirs = asdict(self), asdict(other)
        return Passes(**{kind: mine[kind] + theirs[kind] for kind in mine})

    def times(self, factor: float) -> Passes:
        """So many times as much."""
        return Passes(**{kind: factor * number for kind, number in asdict(self).items()})

    def to_dict(self) -> dict[str, float]:
        """The kinds, and ``units``."""
        return {**asdict(self), "units": self.units}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What measurements cost, known before they start; an upper bound for eigenvalues.

    Attributes:
        examples: how many examples one pass sees.
        measures: what each measure would cost alone.
        total: what all cost together, work that they share counted once.
    """

    examples: int
    measures: dict[str, Passes]
    total: Passes

    def __str__(self) -> str:
        each = ", ".join(f"{name} {p.units:.0f}" for name, p in self.measures.items())
        return (
            f"At most {self.total.units:.0f} forward-pass equivalents over {self.examples} "
            f"examples: {each}."
        )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a measurement has come.

    Attributes:
        measure: the one at work.
        done: forward-pass equivalents spent.
        total: these and those that are planned; while eigenvalues are sought, an upper bound.
    """

    measure: str
    done: float
    total: float


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error; None for one value alone. What is not finite stays so."""
    array = np.array(values, dtype=np.float64)
    with np.errstate(all="ignore"):
        error = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else None
        return float(array.mean()), None if error is None else float(error)
