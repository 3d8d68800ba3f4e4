"""Owns how a measure ranks a target: Kendall's tau over all runs, along and within every factor.

What is independent is a configuration (all factors but the seed), neither a run of it nor a pair of
runs: intervals and p-values know that runs of one configuration, and pairs that share one, go
together. A study says nothing about factors that it did not vary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
PERMUTATIONS = 999
# With four configurations even a perfect order has p = 2/4! = 0.083.
MINIMUM = 5
SEED = "seed"
# No variance of tau is taken for smaller than this / configurations; that of a perfect order would
# be 0. By simulation the smallest with which intervals of near-perfect orders cover as they say.
_FLOOR = 0.25

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Levels = Mapping[str, Any]
# Two configurations by number.
Pairs = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A rank correlation.

    Attributes:
        value: in [-1, 1]: 1 if the measure orders the runs as the target does. None where it is
            not defined: too few runs, or all the same.
        low: lower end of the 95 % interval; None with fewer than five configurations.
        high: its upper end.
        p_value: of no association (two-sided), from permutations of whole configurations.
        configurations: how many it rests on.
        pairs: of these.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    configurations: int = 0
    pairs: int = 0


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs that have both numbers.

    Args:
        measure: one number a run.
        target: one number a run, larger meaning worse.
        levels: of each run: its level of every factor, factors in the same order.
        nested: factors that are nested, and what they are nested in (a strength in its method:
            0.01 means one thing to AWP and another to SAM).
        noise: the standard error of each target, where known.
    """

    measure: Sequence[float]
    target: Sequence[float]
    levels: Sequence[Levels]
    nested: Mapping[str, str]
    noise: Sequence[float | None] = ()

    @cached_property
    def factors(self) -> list[str]:
        """The factors that make up a configuration."""
        return [f for f in (self.levels[0] if self.levels else ()) if f != SEED]

    @cached_property
    def configuration(self) -> Ints:
        """The number of each run's configuration."""
        seen: dict[tuple[Any, ...], int] = {}
        keys = [tuple(level[f] for f in self.factors) for level in self.levels]
        return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)

    @cached_property
    def configurations(self) -> list[Levels]:
        """The levels of each configuration."""
        return list(dict(zip(self.configuration.tolist(), self.levels, strict=True)).values())

    @cached_property
    def signs(self) -> tuple[Floats, Floats]:
        """The mean over runs of sign(x_i - x_j), configurations by configurations; two arrays."""
        return self._mean(_differences(self.measure)), self._mean(_differences(self.target))

    @cached_property
    def agreement(self) -> tuple[Floats, Floats, Floats]:
        """The same of the product of both signs, and of each one's square."""
        s, t = _differences(self.measure), _differences(self.target)
        return self._mean(s * t), self._mean(s * s), self._mean(t * t)

    def own(self, factor: str) -> list[str]:
        """The factor itself and all that it is nested in, however deep."""
        chain = [factor]
        while chain[-1] in self.nested:
            chain.append(self.nested[chain[-1]])
        return chain

    def lines(self, factor: str) -> list[Pairs]:
        """Pairs of configurations that differ in this factor only, by line of the grid.

        A factor that is nested in this one has no levels in common between this one's, so it may
        differ too. Lines without a pair are left out.
        """
        fixed = [f for f in self.factors if factor not in self.own(f)]
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for c, level in enumerate(self.configurations):
            groups[tuple(level[f] for f in fixed)].append(c)
        found = [
            [
                (i, j)
                for i, j in combinations(members, 2)
                if self.configurations[i][factor] != self.configurations[j][factor]
            ]
            for members in groups.values()
        ]
        return [pairs for pairs in found if pairs]

    def _mean(self, matrix: Floats) -> Floats:
        share = np.zeros((len(self.configuration), int(self.configuration.max(initial=-1)) + 1))
        share[np.arange(len(share)), self.configuration] = 1
        share /= share.sum(0)
        mean: Floats = share.T @ matrix @ share
        return mean


@dataclass(frozen=True, eq=False)
class _Stratum:
    """Lines of pairs of configurations whose mean agreement is wanted; each line counts the same.

    ``scale`` divides every agreement. Strata are fixed and not drawn, so deviations are taken from
    the mean of each.
    """

    lines: list[Pairs]
    scale: float = 1.0


def tau(runs: Runs) -> Estimate:
    """Kendall's tau-b between runs of different configurations.

    (concordant - discordant pairs) over the geometric mean of the numbers of pairs that are not
    tied in the measure and in the target.

    The interval treats configurations as drawn, their runs and pairs going with them: the variance
    of a mean over pairs is sum_c (sum of the deviations of c's pairs)^2 less the square of each,
    counted twice there (dyadic-cluster-robust; Aronow, Samii & Assenova 2015), taken to the scale
    of atanh with Student's t. Resampling configurations agrees for this tau, but counts the own
    noise of every pair three times in a grid, so that intervals of granulated tau become too wide.

    Args:
        runs: with both numbers.
    """
    everything = list(range(len(runs.configurations)))
    return _estimate(runs, [_all_pairs(runs, everything)], [everything])


def granulated(runs: Runs) -> tuple[dict[str, Estimate], Estimate]:
    """Granulated tau (Jiang et al. 2020, section 4.2), so that no other factor explains the order.

    psi of a factor: along every line of the grid on which only that factor changes, (concordant -
    discordant) / pairs, a tie counting in the denominator alone; averaged over the lines. Its
    p-value exchanges configurations along their line only.

    Args:
        runs: with both numbers.

    Returns:
        psi of every factor, and the mean of those that have pairs.
    """
    strata = {f: _Stratum(runs.lines(f)) for f in runs.factors}
    axes = {
        f: _estimate(runs, [s], [_members(line) for line in s.lines]) for f, s in strata.items()
    }
    known = [s for s in strata.values() if s.lines]
    return axes, _estimate(runs, known, [list(range(len(runs.configurations)))])


def conditional(runs: Runs) -> dict[str, tuple[dict[Any, Estimate], Estimate]]:
    """Tau among the runs of one level of a factor, for every level (Kim et al. 2023).

    It tells how a measure does for somebody who has fixed that factor and varies the rest.

    Args:
        runs: with both numbers.

    Returns:
        By factor: tau at each level, and their mean; without p-values.
    """
    found: dict[str, tuple[dict[Any, Estimate], Estimate]] = {}
    for factor in runs.factors:
        members: dict[Any, list[int]] = defaultdict(list)
        for c, level in enumerate(runs.configurations):
            members[level[factor]].append(c)
        strata = {level: _all_pairs(runs, m) for level, m in members.items()}
        each = {level: _estimate(runs, [s]) for level, s in strata.items()}
        known = [strata[level] for level, tau_there in each.items() if tau_there.value is not None]
        found[factor] = (each, _estimate(runs, known))
    return found


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values corrected for their number: the chance of any false finding stays (Holm 1979)."""
    known = sorted((p, k) for k, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, k) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[k] = largest
    return corrected


def _all_pairs(runs: Runs, members: Sequence[int]) -> _Stratum:
    """Every pair of some configurations, for tau-b."""
    pairs = list(combinations(members, 2))
    if not pairs:
        return _Stratum([])
    i, j = np.array(pairs).T
    _, x, y = runs.agreement
    return _Stratum([pairs], math.sqrt(x[i, j].mean() * y[i, j].mean()))


def _members(line: Pairs) -> list[int]:
    return sorted({c for pair in line for c in pair})


def _estimate(
    runs: Runs,
    strata: Sequence[_Stratum],
    exchangeable: Sequence[Sequence[int]] | None = None,
) -> Estimate:
    """The mean agreement over all pairs of ``strata``, with its interval and p-value."""
    flat = [
        (*pair, 1 / (len(strata) * len(s.lines) * len(line)), s.scale, k)
        for k, s in enumerate(strata)
        for line in s.lines
        for pair in line
    ]
    if not flat or any(s.scale == 0 for s in strata):
        return Estimate(value=None)
    columns = np.array(flat).T
    i, j, stratum = columns[0].astype(int), columns[1].astype(int), columns[4].astype(int)
    weight, scale = columns[2], columns[3]
    agreement, moved, _ = runs.agreement
    if not (moved[i, j] > 0).any() or not (runs.agreement[2][i, j] > 0).any():
        return Estimate(value=None)
    agreeing = agreement[i, j] / scale
    value = min(max(float((weight * agreeing).sum()), -1.0), 1.0)
    means = np.bincount(stratum, weight * agreeing) / np.bincount(stratum, weight)
    deviation = weight * (agreeing - means[stratum])
    of_each = np.bincount(np.concatenate([i, j]), np.tile(deviation, 2))
    variance = float((of_each**2).sum() - (deviation**2).sum())
    count = len(np.unique(np.concatenate([i, j])))
    low, high = _interval(value, variance, count)
    return Estimate(
        value=value,
        low=low,
        high=high,
        p_value=None
        if exchangeable is None
        else _p_value(runs, i, j, weight / scale, exchangeable),
        configurations=count,
        pairs=len(flat),
    )


def _interval(value: float, variance: float, count: int) -> tuple[float | None, float | None]:
    if count < MINIMUM:
        return None, None
    from scipy.stats import t as student

    # As if one of the count / 2 pairs that share no configuration were neither: +-1 has an atanh.
    centre = value * count / (count + 2)
    spread = math.sqrt(max(variance * count / (count - 2), _FLOOR / count * (1 - centre**2) ** 2))
    reach = student.ppf((1 + LEVEL) / 2, count - 2) * spread / (1 - centre**2)
    ends = [math.tanh(math.atanh(centre) + side * reach) for side in (-1, 1)]
    return min(ends[0], value), max(ends[1], value)


def _p_value(
    runs: Runs, i: Ints, j: Ints, weight: Floats, exchangeable: Sequence[Sequence[int]]
) -> float:
    """How often configurations that have exchanged their targets agree as much, or more."""
    x, y = runs.signs
    along = weight * x[i, j]
    observed = abs(float(along @ y[i, j]))
    generator = np.random.default_rng(0)
    sizes = {len(group) for group in exchangeable}
    groups = [np.array([g for g in exchangeable if len(g) == size]) for size in sorted(sizes)]
    order = np.arange(len(x))
    reached = 1
    for _ in range(PERMUTATIONS):
        for same_size in groups:
            order[same_size] = generator.permuted(same_size, axis=1)
        reached += abs(float(along @ y[order[i], order[j]])) >= observed - 1e-12
    return reached / (PERMUTATIONS + 1)


def _differences(values: Sequence[float]) -> Floats:
    v = np.asarray(values, float)
    return np.sign(v[:, None] - v[None, :])
