"""Owns the confidence intervals: Wilson's for proportions, the percentile bootstrap for means."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

Interval = tuple[float, float]
LEVEL = 0.95
# Resampled positions held in memory at once.
_CHUNK = 2_000_000


def wilson(successes: int, total: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval (Wilson 1927) for a proportion.

    The set of p with (successes/total - p)^2 <= z^2 p (1 - p) / total, where z is the normal
    quantile at (1 + level) / 2. Unlike the interval p +- z s it stays in [0, 1] and does not
    shrink to a point at 0 or at 1.

    Args:
        successes: How many succeeded.
        total: Out of how many, at least 1.
        level: Coverage, between 0 and 1.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: If the numbers do not describe a proportion.
    """
    if not (0 <= successes <= total and total > 0 and 0 < level < 1):
        raise ValueError(
            f"A proportion needs 0 <= successes <= total, total > 0 and a level between 0 and 1, "
            f"got {successes} of {total} at level {level}."
        )
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # The ends are exactly 0 and 1 at the borders; rounding must not say otherwise.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == total else (centre + half) / scale
    return low, high


def bootstrap_means(values: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """Means over resamples, drawn with replacement, of the same examples for every row.

    Args:
        values: [K, N], K figures of N examples.
        resamples: R.
        generator: On the CPU.

    Returns:
        float64 [R, K].
    """
    values = values.double()
    count = values.shape[1]
    rows = max(1, _CHUNK // count)
    means = []
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), count)
        drawn = torch.randint(count, shape, generator=generator)
        means.append(torch.stack([row[drawn].mean(1) for row in values], 1))
    return torch.cat(means)


def percentiles(draws: Tensor, level: float = LEVEL) -> Interval:
    """The central `level` of bootstrap draws [R]."""
    tail = (1 - level) / 2
    low, high = torch.quantile(draws.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(low), float(high)
