"""Owns the statistics of a study: Kendall's tau, its bootstrap interval, and the granulated tau."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustflat.study.schema import SEED

LEVEL = 0.95
RESAMPLES = 2000
Floats = NDArray[np.float64]
Levels = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tau:
    """Kendall's tau-b over all runs.

    Attributes:
        value: in [-1, 1]; 1 if the measure orders the runs as the target does, None where one of
            them is the same for all runs, or there are fewer than two.
        low: lower end of the bootstrap interval.
        high: its upper end.
        p_value: of the hypothesis that there is no association (two-sided).
        runs: how many had both numbers.
    """

    value: float | None
    low: float | None
    high: float | None
    p_value: float | None
    runs: int


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Granulated tau along one factor.

    Attributes:
        tau: the mean over the groups of runs that differ in this factor only; None without any.
        groups: how many there are.
        pairs: of runs, in all groups.
    """

    tau: float | None
    groups: int
    pairs: int


@dataclass(frozen=True, kw_only=True)
class Granulated:
    """Granulated tau (Jiang et al. 2020, section 4.2).

    Attributes:
        axes: by factor.
        average: of the axes that have pairs, the seed's left out, for it is no hyper-parameter.
    """

    axes: dict[str, Axis]
    average: float | None


def tau(measure: Sequence[float], target: Sequence[float], *, seed: int = 0) -> Tau:
    """How alike a measure and a target order the runs.

    Tau-b is (concordant - discordant pairs) over the geometric mean of the numbers of pairs that
    are not tied in the measure and in the target. The interval is the percentile bootstrap over
    runs: each is drawn with replacement, both its numbers together. Two draws of one run are tied
    in both numbers and hence are no pair.

    Args:
        measure: one number a run.
        target: one number a run.
        seed: of the draws.

    Returns:
        Tau with its interval and its p-value.
    """
    # Here, because it takes a second, which every worker would spend.
    from scipy.stats import kendalltau

    x, y = np.asarray(measure, float), np.asarray(target, float)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Tau(value=None, low=None, high=None, p_value=None, runs=len(x))
    value, p_value = kendalltau(x, y)
    draws = bootstrap(x, y, RESAMPLES, np.random.default_rng(seed))
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(draws, [tail, 100 - tail]) if len(draws) else (None, None)
    return Tau(
        value=float(value),
        low=_finite(low),
        high=_finite(high),
        p_value=_finite(p_value),
        runs=len(x),
    )


def bootstrap(x: Floats, y: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    """Tau-b of resampled runs; draws in which a variable is constant have none and are left out.

    With w_i the number of times that run i is drawn, s and t the matrices of the signs of x_i - x_j
    and y_i - y_j: tau-b = w'(s*t)w / sqrt(w'|s|w w'|t|w).
    """
    count = len(x)
    s, t = (np.sign(v[:, None] - v[None, :]) for v in (x, y))
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
    agreeing, in_x, in_y = (
        np.einsum("ri,ij,rj->r", drawn, m, drawn, optimize=True) for m in (s * t, abs(s), abs(t))
    )
    pairs = np.sqrt(in_x * in_y)
    return agreeing[pairs > 0] / pairs[pairs > 0]


def granulated(
    measure: Sequence[float],
    target: Sequence[float],
    levels: Sequence[Levels],
    nested: Mapping[str, str] | None = None,
) -> Granulated:
    """Tau between runs that differ in one factor only, so that no other factor explains it.

    For each factor, the runs are put into groups that agree in all other factors; psi is the mean
    over the groups of (concordant - discordant) / pairs, a tie counting in the denominator alone.

    A factor that is nested in another (a strength in its method: 0.01 means one thing to AWP and
    another to SAM) has no levels in common between levels of that other factor. So the axis of the
    other factor compares runs whatever their level of the nested one.

    Args:
        measure: one number a run.
        target: one number a run.
        levels: of each run: its level of every factor, factors in the same order.
        nested: factors that are nested, and what they are nested in.

    Returns:
        Tau along every factor, and their average.
    """
    factors = list(levels[0]) if levels else []
    axes = {f: _axis(f, measure, target, levels, factors, nested or {}) for f in factors}
    known = [a.tau for f, a in axes.items() if a.tau is not None and f != SEED]
    return Granulated(axes=axes, average=math.fsum(known) / len(known) if known else None)


def _axis(
    factor: str,
    measure: Sequence[float],
    target: Sequence[float],
    levels: Sequence[Levels],
    factors: Sequence[str],
    nested: Mapping[str, str],
) -> Axis:
    fixed = [f for f in factors if factor not in _above(f, nested)]
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for run, level in enumerate(levels):
        groups[tuple(level[f] for f in fixed)].append(run)
    taus, pairs = [], 0
    for runs in groups.values():
        differing = [
            (i, j) for i, j in combinations(runs, 2) if levels[i][factor] != levels[j][factor]
        ]
        if differing:
            signs = [
                _sign(measure[i] - measure[j]) * _sign(target[i] - target[j]) for i, j in differing
            ]
            taus.append(sum(signs) / len(signs))
            pairs += len(signs)
    return Axis(tau=math.fsum(taus) / len(taus) if taus else None, groups=len(taus), pairs=pairs)


def _above(factor: str, nested: Mapping[str, str]) -> list[str]:
    """The factor itself and all that it is nested in, however deep."""
    chain = [factor]
    while chain[-1] in nested:
        chain.append(nested[chain[-1]])
    return chain


def _sign(number: float) -> int:
    return int(number > 0) - int(number < 0)


def _finite(number: Any) -> float | None:
    return None if number is None or not math.isfinite(number) else float(number)
