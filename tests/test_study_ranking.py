"""Rank statistics against SciPy, formulas by hand, and their calibration by simulation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau, norm
from scipy.stats import t as student

from robustflat.study import criteria, ranking
from robustflat.study.criteria import information, sign_error
from robustflat.study.ranking import Estimate, Runs, conditional, granulated, holm, tau


def runs(
    measure: Sequence[float],
    target: Sequence[float],
    levels: Sequence[dict[str, Any]] | None = None,
    nested: dict[str, str] | None = None,
    noise: Sequence[float | None] = (),
) -> Runs:
    """Each run a configuration of its own unless levels say otherwise."""
    return Runs(
        measure, target, levels or [{"c": k} for k in range(len(measure))], nested or {}, noise
    )


def grid(shape: Sequence[int], seeds: int = 1) -> list[dict[str, Any]]:
    names = "abcdef"[: len(shape)]
    return [
        {**dict(zip(names, at, strict=True)), "seed": s}
        for at in itertools.product(*map(range, shape))
        for s in range(seeds)
    ]


# Tau


def test_tau_is_scipys_where_every_run_is_a_configuration() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 5, 9):
        x, y = rng.normal(size=(2, count)).round(1)
        found = tau(runs(x, y))
        assert found.value == pytest.approx(kendalltau(x, y).statistic)
        assert (found.configurations, found.pairs) == (count, count * (count - 1) // 2)


def test_tau_counts_pairs_between_configurations_alone() -> None:
    # Within a configuration the two numbers run against each other; between them, together.
    levels = [{"c": c, "seed": s} for c in range(5) for s in (0, 1)]
    measure = [10.0 * c + s for c in range(5) for s in (0, 1)]
    target = [10.0 * c - s for c in range(5) for s in (0, 1)]
    found = tau(runs(measure, target, levels))
    assert (found.value, found.configurations, found.pairs) == (1, 5, 10)
    # Of the four pairs of runs of two configurations, three agree.
    two = [{"c": c, "seed": s} for c in (0, 1) for s in (0, 1)]
    assert tau(runs([0, 1, 2, 3], [0, 3, 2, 4], two)).value == pytest.approx((3 - 1) / 4)


@pytest.mark.parametrize(("x", "y"), [([], []), ([1], [2]), ([1, 1], [1, 2]), ([1, 2], [3, 3])])
def test_tau_of_nothing_to_order_is_not_known(x: list[float], y: list[float]) -> None:
    assert tau(runs(x, y)) == Estimate(value=None)
    assert granulated(runs(x, y))[1].value is None
    assert information(runs(x, y)).value is None


def test_the_p_value_is_the_share_of_all_permutations() -> None:
    x, y = [1.0, 2, 3, 4, 5], [1.0, 3, 2, 5, 4]
    observed = abs(kendalltau(x, y).statistic)
    every = [abs(kendalltau(x, p).statistic) for p in itertools.permutations(y)]
    exact = np.mean([t >= observed - 1e-12 for t in every])
    assert tau(runs(x, y)).p_value == pytest.approx(exact, abs=0.04)
    # Two runs of each configuration are no more evidence than one.
    levels = [{"c": c, "seed": s} for c in range(5) for s in (0, 1)]
    twice = runs(np.repeat(x, 2), np.repeat(y, 2), levels)
    assert tau(twice).p_value == tau(runs(x, y)).p_value
    assert tau(twice).value == tau(runs(x, y)).value


def test_a_perfect_order_is_as_sure_as_its_p_value() -> None:
    for count in (4, 5, 12, 40):
        found = tau(runs(range(count), range(count)))
        assert found.value == pytest.approx(1)
        if count < ranking.MINIMUM:
            assert (found.low, found.high) == (None, None)
            continue
        assert found.low is not None
        assert found.p_value is not None
        assert 0 < found.low < 1
        assert found.high == pytest.approx(1)
        assert found.p_value < 0.05
        # Half a pair short of perfect, with the least variance: 1 / (4 n).
        reach = student.ppf(0.975, count - 2) * math.sqrt(0.25 / count)
        assert found.low == pytest.approx(math.tanh(math.atanh(count / (count + 2)) - reach))
    assert found.p_value == 1 / 1000, "the order itself is one of the permutations"
    lows = [tau(runs(range(n), range(n))).low for n in (5, 12, 40)]
    assert lows == sorted(lows)  # type: ignore[type-var]
    reverse = tau(runs(range(12), range(12, 0, -1)))
    assert (reverse.low, reverse.high) == (pytest.approx(-1), pytest.approx(-lows[1]))  # type: ignore[operator]


# Granulated, conditional


def test_granulated_tau_by_hand() -> None:
    # The measure follows a alone; the gap follows b, and a a little.
    levels = [{"a": a, "b": b} for a in (0, 1) for b in (0, 1)]
    axes, average = granulated(runs([0.0, 0.1, 1.0, 1.1], [0.0, 5.0, 1.0, 4.0], levels))
    # a: from (0,0) to (1,0) both rise; from (0,1) to (1,1) the gap falls. b: both always rise.
    assert (axes["a"].value, axes["b"].value, average.value) == (0, 1, 0.5)
    assert [x.pairs for x in axes.values()] == [2, 2]
    # A tie is neither, and stays in the denominator.
    assert granulated(runs([1, 1, 2], [1, 2, 3]))[0]["c"].value == pytest.approx(2 / 3)


def test_granulated_tau_is_the_formula_of_jiang_et_al() -> None:
    rng = np.random.default_rng(2)
    shape = (3, 2, 4)
    mu, g = rng.normal(size=shape), rng.normal(size=shape)
    levels = [dict(zip("xyz", at, strict=True)) for at in itertools.product(*map(range, shape))]
    axes, average = granulated(runs(list(mu.flat), list(g.flat), levels))
    psis = []
    for axis, name in enumerate("xyz"):
        lines = [np.moveaxis(v, axis, -1).reshape(-1, shape[axis]) for v in (mu, g)]
        psis.append(np.mean([kendalltau(a, b).statistic for a, b in zip(*lines, strict=True)]))
        assert axes[name].value == pytest.approx(psis[-1])
    assert average.value == pytest.approx(np.mean(psis))


def test_lines_count_the_same_and_those_without_a_pair_not_at_all() -> None:
    # b has three runs at a = 0 (order kept), two at a = 1 (reversed), one alone at a = 2.
    levels = [{"a": a, "b": b} for a, b in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 5))]
    axes, _ = granulated(runs([1, 2, 3, 1, 2, 9], [1, 2, 3, 2, 1, 9], levels))
    assert axes["b"].value == pytest.approx((1 - 1) / 2)
    assert (axes["b"].pairs, axes["b"].configurations) == (4, 5)
    # A factor that nothing else is equal for has no line, and leaves the average alone.
    alone = [{"a": a, "d": a, "b": b} for a in (0, 1) for b in (0, 1)]
    axes, average = granulated(runs([1, 2, 5, 6], [1, 2, 8, 7], alone))
    assert axes["a"] == axes["d"] == Estimate(value=None)
    assert average.value == axes["b"].value == 0


def test_a_nested_strength_is_compared_within_its_method() -> None:
    levels = [
        {"method": "none", "strength": None, "seed": 0},
        {"method": "awp", "strength": 1, "seed": 0},
        {"method": "awp", "strength": 2, "seed": 0},
        {"method": "sam", "strength": 1, "seed": 0},
        {"method": "sam", "strength": 1, "seed": 1},
    ]
    measure, gap = [5.0, 4, 3, 6, 7], [5.0, 3, 4, 6, 1]
    axes, average = granulated(runs(measure, gap, levels, {"strength": "method"}))
    # method: none-awp1 +, none-awp2 +, none-sam (+ and -, so 0), awp1-sam 0, awp2-sam 0.
    assert (axes["method"].value, axes["method"].pairs) == (pytest.approx(2 / 5), 5)
    assert (axes["strength"].value, axes["strength"].pairs) == (-1, 1)
    assert "seed" not in axes, "a seed is no hyper-parameter"
    assert average.value == pytest.approx((2 / 5 - 1) / 2)
    crossed, _ = granulated(runs(measure, gap, levels))
    assert crossed["method"].pairs == 1, "without nesting: awp1-sam alone"


def test_a_factors_p_value_exchanges_along_its_lines_alone() -> None:
    # b orders the gap everywhere; a, of far larger effect, has no line of its own.
    levels = [{"a": a, "b": b} for a in range(2) for b in range(4)]
    target = [100.0 * (1 - a) + b for a in range(2) for b in range(4)]
    measure = [100.0 * a + b for a in range(2) for b in range(4)]
    found = runs(measure, target, levels)
    axes, _ = granulated(found)
    assert axes["b"].value == 1
    # Both lines in order or both reversed: 2 of 24^2 permutations.
    assert axes["b"].p_value == pytest.approx(2 / 24**2, abs=0.004)
    # A line of two can only be kept or turned: 2 of 2^4.
    assert axes["a"].p_value == pytest.approx(2 / 2**4, abs=0.03)
    assert tau(found).value is not None
    assert tau(found).value < 0  # type: ignore[operator]


def test_what_is_tied_along_a_line_stays_tied() -> None:
    levels = [{"a": a, "b": b} for a in range(2) for b in range(3)]
    axes, _ = granulated(runs([0, 1, 2, 0, 1, 2], [0, 0, 0, 7, 8, 9], levels))
    assert axes["b"].value == 0.5
    # Of the six orders of the second line two are as extreme; exchanged freely it were fewer.
    assert axes["b"].p_value == pytest.approx(1 / 3, abs=0.05)


def test_tau_conditional_on_each_factor() -> None:
    levels = [{"a": a, "b": b} for a in range(2) for b in range(6)]
    measure = [float(b + 10 * a) for a in range(2) for b in range(6)]
    target = [float(b if a == 0 else -b) + 100 * a for a in range(2) for b in range(6)]
    found = conditional(runs(measure, target, levels))
    each, mean = found["a"]
    assert [each[0].value, each[1].value, mean.value] == pytest.approx([1, -1, 0])
    assert each[0].low is not None
    assert each[0].low > 0
    assert mean.low is not None
    assert mean.high is not None
    assert mean.low < 0 < mean.high
    assert mean.high - mean.low < each[0].high - each[0].low + 1  # type: ignore[operator]
    each, _ = found["b"]
    assert [e.value for e in each.values()] == pytest.approx([1] * 6)
    assert each[0].low is None, "two configurations have no interval"


def test_holm_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, 0.06, 0.06]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


# Calibration

Draw = Callable[[np.random.Generator], Runs]


def nested_noise(
    shape: Sequence[int], seeds: int, rho: float, spread: float = 0.3
) -> tuple[Draw, float]:
    """Runs whose configurations are bivariate normal, seeds scattering about them; its true tau."""
    levels = grid(shape, seeds)

    def draw(rng: np.random.Generator) -> Runs:
        u, e = rng.normal(size=(2, math.prod(shape)))
        v = rho * u + math.sqrt(1 - rho**2) * e
        x, y = (np.repeat(w, seeds) + spread * rng.normal(size=len(levels)) for w in (u, v))
        return Runs(x.tolist(), y.tolist(), levels, {})

    # Of a bivariate normal (Kendall & Gibbons 1990).
    return draw, 2 / math.pi * math.asin(rho / (1 + spread**2))


@pytest.mark.parametrize(("shape", "seeds"), [((2, 3), 3), ((6, 4), 2), ((2, 3, 2), 2)])
def test_a_true_null_is_rejected_at_its_level(
    shape: Sequence[int], seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "PERMUTATIONS", 99)
    draw, _ = nested_noise(shape, seeds, 0.0)
    rng, trials = np.random.default_rng(11), 500
    rejected = {"tau": 0, "average": 0, "axis": 0}
    for _ in range(trials):
        found = draw(rng)
        axes, average = granulated(found)
        for name, estimate in (("tau", tau(found)), ("average", average), ("axis", axes["b"])):
            assert estimate.p_value is not None
            rejected[name] += estimate.p_value <= 0.05
    for name, count in rejected.items():
        assert 0.03 <= count / trials <= 0.07, name


@pytest.mark.parametrize(
    ("shape", "seeds", "rho"),
    [
        ((8,), 3, 0.0),
        ((24,), 2, 0.6),
        ((3, 2, 4), 2, 0.0),
        ((3, 2, 4), 2, 0.6),
        ((2, 2, 2, 2), 2, 0.9),
    ],
)
def test_intervals_cover_the_truth(
    shape: Sequence[int], seeds: int, rho: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "PERMUTATIONS", 0)
    draw, truth = nested_noise(shape, seeds, rho)
    rng, trials = np.random.default_rng(5), 400
    covered = {"tau": 0, "average": 0}
    for _ in range(trials):
        found = draw(rng)
        for name, estimate in (("tau", tau(found)), ("average", granulated(found)[1])):
            assert estimate.low is not None
            assert estimate.high is not None
            covered[name] += estimate.low <= truth <= estimate.high
    for name, count in covered.items():
        assert 0.92 <= count / trials <= 0.98, name


# Stricter criteria


def test_information_is_whole_for_the_target_itself_and_none_for_a_factor() -> None:
    rng = np.random.default_rng(0)
    levels = grid((3, 3, 3), 2)
    target = rng.normal(size=len(levels)).tolist()
    whole = information(runs(target, target, levels))
    assert whole.value == pytest.approx(1)
    assert whole.chance is not None
    assert whole.chance < 0.9
    # A measure that only mirrors a factor: nothing is left of it once the factor is known.
    mirrored = [float(level["a"]) + 1e-3 * rng.normal() for level in levels]
    gap = [float(level["a"]) + 1e-3 * rng.normal() for level in levels]
    found = information(runs(mirrored, gap, levels))
    assert found.value is not None
    assert "a" in found.given
    assert found.value < 0.3
    assert found.chance is not None
    assert found.value < found.chance


def test_two_factors_together_can_be_what_a_measure_mirrors() -> None:
    rng = np.random.default_rng(3)
    levels = grid((2, 2, 6))
    both = [float((level["a"] + level["b"]) % 2) for level in levels]
    measure, gap = ([v + 1e-3 * rng.normal() for v in both] for _ in range(2))
    found = information(runs(measure, gap, levels))
    assert found.given == ("a", "b")
    assert found.value is not None
    assert found.value < 0.2


def test_information_is_the_formula_on_a_table_of_pairs() -> None:
    # One factor of two levels, so S = {} and S = {c}; every run a configuration of its own.
    x, y = [0.0, 1, 2, 3], [0.0, 1, 3, 2]
    # S = {}: of the 12 ordered pairs 10 agree. S = {c} leaves no uncertainty.
    p = 10 / 12
    gain = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    found = information(runs(x, y))
    assert found.given == ()
    assert found.value == pytest.approx(gain / math.log(2))


def test_sign_error_by_hand() -> None:
    levels = [{"a": a, "b": b} for a in (0, 1) for b in (0, 1)]
    # a: (0,0)-(1,0) right, (0,1)-(1,1) wrong; b: right, and a tie in the measure.
    found = sign_error(runs([0.0, 1, 2, 2], [0.0, 3, 2, 2.5], levels))
    errors = {e.factor: e.error for e in found.environments}
    assert errors == {"a": 0.5, "b": 0.25}
    assert found.mean == pytest.approx(0.375)
    assert found.worst is not None
    assert (found.worst.factor, found.worst.levels, found.worst.pairs) == ("a", (0, 1), 2)
    three = sign_error(runs([1.0, 2, 3], [1.0, 3, 2], [{"a": a} for a in range(3)]))
    assert {e.levels: e.error for e in three.environments} == {(0, 1): 0, (0, 2): 0, (1, 2): 1}


def test_sign_error_weighs_by_what_noise_leaves() -> None:
    levels = [{"a": a, "b": b} for b in (0, 1) for a in (0, 1)]
    # At b = 0 the change is wrong and within the noise, at b = 1 right and far beyond it.
    found = sign_error(runs([0.0, 1, 0, 1], [0.0, -0.1, 0, 50], levels, noise=[0.3, 0.4, 0.3, 0.4]))
    (a,) = [e for e in found.environments if e.factor == "a"]
    phi = 2 * norm.sf(0.1 / 0.5)
    assert a.weight == pytest.approx(1 + (1 - phi) ** 2)
    assert a.error == pytest.approx((1 - phi) ** 2 / a.weight)
    noiseless = sign_error(runs([0.0, 1, 0, 1], [0.0, -0.1, 0, 50], levels))
    assert {e.factor: e.error for e in noiseless.environments}["a"] == 0.5
    still = sign_error(runs([0.0, 1], [3.0, 3], [{"a": 0}, {"a": 1}]))
    assert (still.mean, still.worst) == (None, None), "equal targets tell nothing"


def test_runs_of_one_configuration_are_never_compared() -> None:
    levels = [{"a": a, "seed": s} for a in (0, 1) for s in (0, 1)]
    found = sign_error(runs([0, 5, 10, 15], [5, 0, 15, 10], levels))
    assert [(e.factor, e.pairs, e.error) for e in found.environments] == [("a", 4, 0)]
    assert information(runs([0, 5, 10, 15], [5, 0, 15, 10], levels)).value == pytest.approx(1)
    assert criteria.CHANCE_PERMUTATIONS == 19
