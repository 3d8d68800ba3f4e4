"""Owns charts as inline SVG: lines, values with intervals, and planes; colours come from CSS."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from robustflat.report.markup import Html, join, node

# One colour for each run, in every figure.
COLOURS = ("#3366aa", "#dd7722", "#338855", "#aa3366", "#775599", "#887733", "#229999", "#555555")
DASHES = {"clean": "7 4", "robust": None, "robust_fixed": "2 4"}
KINDS = {"clean": "clean", "robust": "robust", "robust_fixed": "robust, examples fixed"}

Unit = Literal["", "%", "pp"]
Shape = Literal["dot", "ring", "square"]
_WIDTH, _HEIGHT = 480, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 40
_CHARACTER = 6.6  # Width of an average character of the 12 px text, in user units.
_ROW, _HEADING = 19, 24
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve: its name, the run it belongs to, and where a dot stands out (an x)."""

    name: str
    run: int
    x: Sequence[float]
    y: Sequence[float | None]
    dash: str | None = None
    dot: float | None = None


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A value with its interval, and what it says when pointed at."""

    value: float
    low: float | None
    high: float | None
    run: int
    tip: str
    shape: Shape = "dot"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of marks, joined by a line if there are several; ``note`` stands at its right."""

    marks: Sequence[Mark]
    label: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows under a heading."""

    label: str
    entries: Sequence[Entry]


def colour(run: int) -> str:
    """The CSS classes of a run's marks: its colour, and the run itself for showing and hiding."""
    return f"c{run % len(COLOURS)} run-{run}"


def palette() -> str:
    """CSS that gives the classes of :func:`colour` their colours, lighter ones on dark screens."""
    light = " ".join(f".c{i} {{ --c: {c}; }}" for i, c in enumerate(COLOURS))
    parts = [[int(c[at : at + 2], 16) for at in (1, 3, 5)] for c in COLOURS]
    lighter = ["#" + "".join(f"{round(p + 0.4 * (255 - p)):02x}" for p in rgb) for rgb in parts]
    dark = " ".join(f".c{i} {{ --c: {c}; }}" for i, c in enumerate(lighter))
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}"


def figure(title: str, chart: Html) -> Html:
    """A chart under its title."""
    return node("figure", node("figcaption", title), chart)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    unit: Unit = "",
    log: bool = False,
    zero: bool = False,
) -> Html:
    """Curves on one pair of axes; points that are missing, or have no logarithm, leave a gap.

    Args:
        title: what is shown.
        lines: the curves.
        x_label: what the x axis counts.
        unit: "%" and "pp" show shares times 100.
        log: a logarithmic y axis.
        zero: y = 0 is always in sight and has a line.
    """
    points = [list(_usable(line, log)) for line in lines]
    xs = [x for found in points for x, _ in found]
    ys = [y for found in points for _, y in found] + ([0.0] if zero and not log else [])
    if not xs:
        return figure(title, node("p", "Nothing finite to draw.", class_="missing"))
    x0, x1 = min(xs), max(xs)
    to_x = _Scale((x0, x1) if x1 > x0 else (x0 - 0.5, x1 + 0.5), _LEFT, _WIDTH - _RIGHT)
    y_ticks = log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    to_y = _Scale((y_ticks[0], y_ticks[-1]), _HEIGHT - _BOTTOM, _TOP, log=log)
    drawn: list[Html] = []
    for tick in y_ticks:
        kind = "zero" if zero and tick == 0 else "grid"
        drawn.append(_rule(_LEFT, to_y(tick), _WIDTH - _RIGHT, to_y(tick), kind))
        drawn.append(_text(_LEFT - 7, to_y(tick) + 4, number(tick, unit, short=True), "end"))
    for tick in ticks(*to_x.limits, whole=True):
        if to_x.limits[0] <= tick <= to_x.limits[1]:
            drawn.append(_text(to_x(tick), _HEIGHT - _BOTTOM + 17, f"{tick:g}", "middle"))
    drawn.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, x_label, "middle"))
    drawn += [_curve(line, found, to_x, to_y) for line, found in zip(lines, points, strict=True)]
    drawn.append(node("line", class_="cursor", y1=_TOP, y2=_HEIGHT - _BOTTOM))
    left, right = to_x.limits
    return figure(
        title,
        _svg(
            title, _HEIGHT, drawn, class_="lines", data_unit=unit or None, data_left=repr(left),
            data_right=repr(right), data_from=_LEFT, data_to=_WIDTH - _RIGHT, data_label=x_label,
        ),
    )  # fmt: skip


def interval_chart(title: str, groups: Sequence[Group], *, unit: Unit = "") -> Html:
    """Values as dots and their intervals as whiskers, in rows under headings.

    Args:
        title: what is shown.
        groups: the rows, from top to bottom.
        unit: as in :func:`line_chart`.
    """
    rows = [entry for group in groups for entry in group.entries]
    marks = [mark for entry in rows for mark in entry.marks]
    if not marks:
        return figure(title, node("p", "Nothing finite to draw.", class_="missing"))
    ends = [v for m in marks for v in (m.low, m.value, m.high) if v is not None]
    x_ticks = ticks(min(ends), max(ends))
    left = 12 + _CHARACTER * max(len(entry.label) for entry in rows)
    right = _WIDTH - 14 - _CHARACTER * max(len(entry.note) for entry in rows)
    to_x = _Scale((x_ticks[0], x_ticks[-1]), left, right)
    bottom = 6 + sum(_HEADING + _ROW * len(group.entries) for group in groups)
    drawn: list[Html] = []
    for tick in x_ticks:
        drawn.append(_rule(to_x(tick), 0, to_x(tick), bottom, "grid"))
        text = number(tick, unit, short=True)
        drawn.append(_text(to_x(tick), bottom + 16, text, "middle"))
    at = 0.0
    for group in groups:
        at += _HEADING
        shown = group.label if len(group.label) <= 64 else group.label[:63] + "…"
        drawn.append(_text(4, at - 8, shown, "start", "heading"))
        for entry in group.entries:
            drawn.append(_entry(entry, at + _ROW / 2 - 3, to_x))
            at += _ROW
    return figure(title, _svg(title, bottom + 24, drawn))


def plane(
    title: str,
    axes: Sequence[Sequence[float]],
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    limits: tuple[float, float],
    points: Sequence[tuple[str, float, float]] = (),
    unit: Unit = "",
) -> Html:
    """A grid of values as colours, dark for low and light for high.

    Args:
        title: what is shown.
        axes: coordinates along x and y.
        names: of the axes.
        values: by x, then y; not finite ones are grey.
        limits: the values of the darkest and the lightest colour.
        points: labels and coordinates of models.
        unit: as in :func:`line_chart`.
    """
    size, left = 320.0, 70.0
    wide, high = size / len(axes[0]), size / len(axes[1])
    drawn: list[Html] = []
    for i, x in enumerate(axes[0]):
        for j, y in enumerate(axes[1]):
            tip = f"{names[0]} {x:.3g}, {names[1]} {y:.3g}: {number(values[i][j], unit)}"
            place = {"x": f"{left + i * wide:.2f}", "y": f"{size - (j + 1) * high:.2f}"}
            # A little larger than the cell, so that no seams show.
            area = {"width": f"{wide + 0.4:.2f}", "height": f"{high + 0.4:.2f}"}
            fill = _viridis(values[i][j], *limits)
            drawn.append(node("rect", node("title", tip), fill=fill, **place, **area))
    centres = [
        _Scale((axis[0], axis[-1]), low, end)
        for axis, low, end in (
            (axes[0], left + wide / 2, left + size - wide / 2),
            (axes[1], size - high / 2, high / 2),
        )
    ]
    for label, x, y in points:
        px, py = centres[0](x), centres[1](y)
        drawn.append(node("circle", node("title", label), class_="model", cx=px, cy=py, r=4))
    for at in (0, -1):
        x, y = axes[0][at], axes[1][at]
        drawn.append(_text(centres[0](x), size + 16, f"{x:.3g}", "middle"))
        drawn.append(_text(left - 6, centres[1](y) + 4, f"{y:.3g}", "end"))
    drawn.append(_text(left + size / 2, size + 34, f"{names[0]} (x), {names[1]} (y)", "middle"))
    ends = " to ".join(number(limit, unit) for limit in limits)
    drawn.append(_text(left + size / 2, size + 52, f"dark to light: {ends}", "middle"))
    return figure(title, _svg(title, size + 60, drawn))


def number(value: float | None, unit: Unit = "", *, short: bool = False) -> str:
    """A value as people read it; ``short`` for the ticks of an axis."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if unit:
        text = f"{100 * value:.6g}" if short else f"{100 * value:.1f}"
        return f"{text}%" if unit == "%" else f"{text} pp"
    return f"{value:.6g}" if short else f"{value:.3g}"


def ticks(low: float, high: float, *, whole: bool = False, count: int = 5) -> list[float]:
    """Round numbers, evenly spaced, the first at or below ``low``, the last at or above ``high``.

    Args:
        low: the least value.
        high: the greatest.
        whole: no fractions unless the range itself is below 2.
        count: about how many.
    """
    if not high > low:
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    if whole and high - low >= 2:
        step = max(1.0, math.floor(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around positive values; 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if last - first > 2:
        return [10.0**e for e in range(first, last + 1)]
    every = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    start = max((i for i, t in enumerate(every) if t <= low * (1 + 1e-9)), default=0)
    stop = next((i for i, t in enumerate(every) if t >= high * (1 - 1e-9)), len(every) - 1)
    return every[start : max(stop, start + 1) + 1]


class _Scale:
    """From values between ``limits`` to user units between two ends."""

    def __init__(
        self, limits: tuple[float, float], start: float, end: float, *, log: bool = False
    ) -> None:
        self.limits = limits
        self._read = math.log10 if log else float
        self._from, self._to = start, end

    def __call__(self, value: float) -> float:
        low, high = (self._read(limit) for limit in self.limits)
        share = (self._read(value) - low) / (high - low) if high > low else 0.5
        return round(self._from + share * (self._to - self._from), 2)


def _usable(line: Line, log: bool) -> Iterator[tuple[float, float]]:
    for x, y in zip(line.x, line.y, strict=True):
        if y is not None and math.isfinite(y) and (y > 0 or not log):
            yield x, y


def _curve(line: Line, found: list[tuple[float, float]], to_x: _Scale, to_y: _Scale) -> Html:
    """The curve with its values, for reading off; a lone point is a dot."""
    known = dict(found)
    path, pen, dots = "", "M", []
    for i, x in enumerate(line.x):
        if x not in known:
            pen = "M"
            continue
        path += f"{pen}{to_x(x)} {to_y(known[x])}"
        alone = pen == "M" and (i + 1 == len(line.x) or line.x[i + 1] not in known)
        if alone or x == line.dot:
            dots.append(node("circle", cx=to_x(x), cy=to_y(known[x]), r=4 if x == line.dot else 2))
        pen = "L"
    drawn = node(
        "path", node("title", line.name), d=path, stroke_dasharray=line.dash,
        data_name=line.name, data_x=" ".join(map(repr, known)),
        data_y=" ".join(map(repr, known.values())),
    )  # fmt: skip
    return node("g", drawn, *dots, class_=colour(line.run))


def _entry(entry: Entry, y: float, to_x: _Scale) -> Html:
    drawn: list[Html] = []
    if len(entry.marks) > 1:
        places = [to_x(mark.value) for mark in entry.marks]
        drawn.append(_rule(min(places), y, max(places), y, "join"))
    for mark in entry.marks:
        x = to_x(mark.value)
        parts = [node("title", mark.tip)]
        if mark.low is not None and mark.high is not None:
            parts.append(_rule(to_x(mark.low), y, to_x(mark.high), y, "whisker"))
        if mark.shape == "square":
            parts.append(node("rect", x=x - 4, y=y - 4, width=8, height=8))
        else:
            ring = "ring" if mark.shape == "ring" else None
            parts.append(node("circle", cx=x, cy=y, r=4.5, class_=ring))
        drawn.append(node("g", *parts, class_="mark"))
    label = _text(8, y + 4, entry.label, "start") if entry.label else None
    note = _text(_WIDTH - 4, y + 4, entry.note, "end", "note") if entry.note else None
    return node("g", label, *drawn, note, class_=colour(entry.marks[0].run))


def _svg(title: str, height: float, drawn: Sequence[Html], **more: str | float | None) -> Html:
    box = f"0 0 {_WIDTH} {height:g}"
    return node("svg", join(drawn), viewBox=box, role="img", aria_label=title, **more)


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return node("line", class_=kind, x1=x1, y1=y1, x2=x2, y2=y2)


def _text(x: float, y: float, text: str, anchor: str, kind: str | None = None) -> Html:
    return node("text", text, x=x, y=y, text_anchor=anchor, class_=kind)


def _viridis(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return "#888888"
    share = min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.0
    at = min(int(share * 4), 3)
    mixed = (
        round(a + (b - a) * (share * 4 - at))
        for a, b in zip(_VIRIDIS[at], _VIRIDIS[at + 1], strict=True)
    )
    return "#" + "".join(f"{part:02x}" for part in mixed)
