"""Owns two stricter criteria than tau: conditional mutual information, and the worst sign error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustflat.study.ranking import Floats, Ints, Runs

# The largest of so many permutations is what chance alone reaches in 5 % of cases.
CHANCE_PERMUTATIONS = 19


@dataclass(frozen=True, kw_only=True)
class Information:
    """Conditional mutual information.

    Attributes:
        value: in [0, 1]: the share of the uncertainty about the order of two targets that the order
            of the measures takes away, whatever one or two factors are known; None where there is
            no uncertainty.
        given: the factors, at most two, at which it is least.
        chance: what it reaches there when configurations that agree in the factors given exchange
            their targets, at level 5 %. The plug-in estimate is biased upwards where levels have
            few runs, and so is this.
    """

    value: float | None
    given: tuple[str, ...]
    chance: float | None


@dataclass(frozen=True, kw_only=True)
class Environment:
    """One change of one factor, all others held fixed.

    Attributes:
        factor: which.
        levels: from which to which.
        error: the weighted mean sign error.
        pairs: of runs.
        weight: of these, the sum of their weights.
    """

    factor: str
    levels: tuple[Any, Any]
    error: float
    pairs: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class SignError:
    """How often the measure gets the sign of a change wrong.

    Attributes:
        mean: over environments, each with the same weight; 0.5 is a coin. None without any.
        worst: the environment with the largest error.
        environments: all of them, the worst first.
    """

    mean: float | None
    worst: Environment | None
    environments: tuple[Environment, ...]


def information(runs: Runs) -> Information:
    """Min over sets S of at most two factors of I(V_mu; V_g | U_S) / H(V_g | U_S).

    Jiang et al. 2020, section 4.3: over ordered pairs of runs, V_mu and V_g are the signs of the
    differences of measure and target, U_S both runs' levels of the factors in S. A measure that
    only mirrors one factor tells nothing once that factor is known. Pairs that are tied in either
    number, or of one configuration, are left out. A nested factor is known with what it is in.

    Args:
        runs: with both numbers.
    """
    sets = [s for size in (0, 1, 2) for s in combinations(runs.factors, size)]
    keys = {s: _codes(runs, s) for s in sets}
    found = {s: _normalised(runs, key, np.asarray(runs.target)) for s, key in keys.items()}
    known = {s: value for s, value in found.items() if value is not None}
    if not known:
        return Information(value=None, given=(), chance=None)
    least = min(known, key=lambda s: known[s])
    generator = np.random.default_rng(0)
    drawn = [_normalised(runs, keys[least], t) for t in _exchanged(runs, least, generator)]
    by_chance = [value for value in drawn if value is not None]
    return Information(
        value=known[least], given=least, chance=max(by_chance) if by_chance else None
    )


def sign_error(runs: Runs) -> SignError:
    """The mean over pairs of [1 - sign(change of measure) sign(change of target)] / 2.

    Dziugaite et al. 2020: an environment is a change of one factor from one level to another with
    all others fixed; a measure is judged by its worst environment, not by its mean. A pair weighs
    max(0, 1 - phi)^2, where phi is the chance that noise alone moves the targets as far apart
    (two-sided). phi is theirs with the normal law of the targets' standard errors in the place of
    Hoeffding's bound, which holds for accuracies alone. Without standard errors all pairs weigh 1.

    Args:
        runs: with both numbers.
    """
    mu, g = np.asarray(runs.measure, float), np.asarray(runs.target, float)
    noise = np.array([v or 0.0 for v in runs.noise] or [0.0] * len(g))
    members: dict[int, list[int]] = {}
    for run, c in enumerate(runs.configuration.tolist()):
        members.setdefault(c, []).append(run)
    pooled: dict[tuple[str, Any, Any], list[tuple[int, int]]] = {}
    for factor in runs.factors:
        order = list(dict.fromkeys(level[factor] for level in runs.configurations))
        for a, b in (pair for line in runs.lines(factor) for pair in line):
            levels = sorted((runs.configurations[c][factor] for c in (a, b)), key=order.index)
            pooled.setdefault((factor, levels[0], levels[1]), []).extend(
                (i, j) for i in members[a] for j in members[b]
            )
    environments = []
    for (factor, low, high), pairs in pooled.items():
        i, j = np.array(pairs).T
        weight = _weights(g[i] - g[j], np.hypot(noise[i], noise[j]))
        if weight.sum() > 0:
            wrong = (1 - np.sign(mu[i] - mu[j]) * np.sign(g[i] - g[j])) / 2
            error = float((weight * wrong).sum() / weight.sum())
            environments.append(
                Environment(
                    factor=factor,
                    levels=(low, high),
                    error=error,
                    pairs=len(pairs),
                    weight=float(weight.sum()),
                )
            )
    environments.sort(key=lambda e: -e.error)
    if not environments:
        return SignError(mean=None, worst=None, environments=())
    mean = math.fsum(e.error for e in environments) / len(environments)
    return SignError(mean=mean, worst=environments[0], environments=tuple(environments))


def _weights(change: Floats, noise: Floats) -> Floats:
    from scipy.stats import norm

    with np.errstate(divide="ignore", invalid="ignore"):
        phi = 2 * norm.sf(np.abs(change) / noise)
    # Two equal targets without noise say nothing either way.
    certain = np.where(change == 0, 1.0, 0.0)
    weight: Floats = np.clip(1 - np.where(noise > 0, phi, certain), 0, None) ** 2
    return weight


def _cells(runs: Runs, factors: Sequence[str]) -> Ints:
    """A number for each run's levels of these factors and of what they are nested in."""
    known = list(dict.fromkeys(f for factor in factors for f in runs.own(factor)))
    seen: dict[tuple[Any, ...], int] = {}
    rows = [tuple(level[f] for f in known) for level in runs.levels]
    return np.array([seen.setdefault(row, len(seen)) for row in rows], dtype=np.int64)


def _codes(runs: Runs, factors: Sequence[str]) -> Ints:
    """A number for every combination of both runs' levels, runs by runs."""
    cell = _cells(runs, factors)
    pairs: Ints = cell[:, None] * (cell.max(initial=0) + 1) + cell[None, :]
    return pairs


def _normalised(runs: Runs, key: Ints, target: NDArray[Any]) -> float | None:
    mu, g = (np.sign(v[:, None] - v[None, :]) for v in (np.asarray(runs.measure), target))
    c = runs.configuration
    used = (mu != 0) & (g != 0) & (c[:, None] != c[None, :])
    _, cell = np.unique(key[used], return_inverse=True)
    outcome = 2 * (mu[used] > 0).astype(int) + (g[used] > 0)
    counts = np.bincount(4 * cell + outcome, minlength=4 * (cell.max(initial=-1) + 1))
    table = counts.reshape(-1, 2, 2).astype(float)
    total = table.sum()
    if total == 0:
        return None
    of_g, of_mu, of_cell = table.sum(1), table.sum(2), table.sum((1, 2))
    uncertainty = _entropy(of_g, total) - _entropy(of_cell, total)
    if uncertainty <= 1e-12:
        return None
    left = _entropy(table, total) - _entropy(of_mu, total)
    return float(max(uncertainty - left, 0.0) / uncertainty)


def _entropy(counts: Floats, total: float) -> float:
    share = counts[counts > 0] / total
    return float(-(share * np.log(share)).sum())


def _exchanged(
    runs: Runs, given: Sequence[str], generator: np.random.Generator
) -> list[NDArray[Any]]:
    """Targets exchanged between configurations that agree in ``given`` and have as many runs."""
    target, c, cell = np.asarray(runs.target, float), runs.configuration, _cells(runs, given)
    alike: dict[tuple[int, int], list[NDArray[Any]]] = {}
    for k in range(int(c.max(initial=-1)) + 1):
        rows = np.flatnonzero(c == k)
        alike.setdefault((int(cell[rows[0]]), len(rows)), []).append(rows)
    drawn = []
    for _ in range(CHANCE_PERMUTATIONS):
        moved = target.copy()
        for blocks in alike.values():
            moved[np.array(blocks)] = target[generator.permutation(np.array(blocks))]
        drawn.append(moved)
    return drawn
