"""Owns what a figure says, whoever draws it: series on axes, planes, numbers as read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from robustflat.runs.comparison import Unit

UNITS = {"": "", "%": "%", "pp": " pp"}
Dash = Literal["solid", "dash", "dot", "dashdot"]
Mark = Literal["circle", "circle-open", "square"]
Key = Dash | Mark
Values = Sequence[float | None]
DASHES: dict[str, Dash] = {"robust": "solid", "clean": "dash", "robust_fixed": "dot"}
KINDS = {"clean": "clean", "robust": "robust", "robust_fixed": "robust, examples fixed"}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis.

    Attributes:
        label: what it counts.
        unit: "%" and "pp" show shares times 100.
        log: a logarithmic scale.
        zero: 0 is always in sight.
        ticks: names of places; without them, numbers. The first stands at the top of a y axis.
    """

    label: str = ""
    unit: Unit = ""
    log: bool = False
    zero: bool = False
    ticks: Mapping[float, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What it counts, in which unit."""
        return f"{self.label} ({self.unit})" if self.label and self.unit else self.label + self.unit


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one run, joined by a line or not; None leaves a gap.

    Attributes:
        name: what it is; empty for what only joins others.
        run: its number, which gives the colour.
        x: coordinates ``[N]``, and ``y`` the same.
        low: the lower ends of intervals ``[N]``, and ``high`` the upper ones: along y a band about
            a line, along x (``sideways``) whiskers.
        sideways: whether intervals lie along x.
        line: how the points are joined; None: not.
        mark: what stands at each point; None: nothing.
        dot: the x at which a large dot stands out.
        text: words above each point.
        legend: its name in the legend, which lists each name once; None: ``name``, empty: none.
        faint: a broad pale line, which joins what belongs together.
    """

    name: str
    run: int
    x: Values
    y: Values
    low: Values | None = None
    high: Values | None = None
    sideways: bool = False
    line: Dash | None = "solid"
    mark: Mark | None = None
    dot: float | None = None
    text: Sequence[str] | None = None
    legend: str | None = None
    faint: bool = False

    @property
    def listed(self) -> str:
        """How the legend calls it; empty if it does not."""
        return self.name if self.legend is None else self.legend


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Series on one pair of axes.

    ``key`` says what its lines and marks stand for; ``places`` are names of values of x.
    """

    title: str
    series: Sequence[Series]
    x: Axis
    y: Axis = Axis()
    key: Mapping[Key, str] = field(default_factory=dict)
    places: Mapping[str, float] = field(default_factory=dict)

    @property
    def legend(self) -> list[str]:
        """What the legend says of each series: each name once, by the first that has it."""
        names = [series.listed for series in self.series]
        return [name if name not in names[:i] else "" for i, name in enumerate(names)]


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Values on a grid: a contour map, on pages also a surface.

    Attributes:
        title: what is shown.
        run: whose it is.
        axes: coordinates ``[A], [B]``.
        names: of the axes.
        values: ``[A][B]``, by x, then y; what is not finite is left blank.
        limits: the values of the darkest and the lightest colour.
        points: coordinates of models by label.
        label: of the values.
        log: a logarithmic scale of colours.
    """

    title: str
    run: int
    axes: tuple[Sequence[float], Sequence[float]]
    names: tuple[str, str]
    values: Sequence[Sequence[float]]
    limits: tuple[float, float]
    points: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    label: str = "loss"
    log: bool = False


Figure = Chart | Plane


def drawn(values: Values, axis: Axis) -> list[float | None]:
    """Values as an axis shows them: in percent, None where there is nothing to draw."""
    scale = 100 if axis.unit else 1
    return [
        None if v is None or not math.isfinite(v) or (axis.log and v <= 0) else scale * v
        for v in values
    ]


def is_empty(figure: Figure) -> bool:
    """Whether there is nothing to see."""
    if isinstance(figure, Plane):
        return not any(math.isfinite(v) for row in figure.values for v in row)
    return all(
        x is None or y is None
        for s in figure.series
        for x, y in zip(drawn(s.x, figure.x), drawn(s.y, figure.y), strict=True)
    )


def number(value: float | None, unit: Unit = "", digits: int = 3) -> str:
    """A value to so many significant digits (shares: to a tenth of a percent), with its unit."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if unit:
        return f"{100 * value:.{max(digits - 2, 0)}f}{UNITS[unit]}"
    return significant(value, digits)


def significant(value: float, digits: int = 3) -> str:
    """So many significant digits, without an exponent where there is room for them."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    # Rounding may carry: 0.9996 has three digits as 1.00.
    value = round(value, places)
    places = digits - 1 - math.floor(math.log10(abs(value)))
    room = -2 <= places <= digits + 4
    return f"{value:.{max(places, 0)}f}" if room else f"{value:.{digits - 1}e}"
