"""Owns charts for papers, by matplotlib: as PNG, SVG or PDF."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from robustflat.errors import UserError
from robustflat.report.chart import Axis, Chart, Series, drawn
from robustflat.report.palette import colour

_STYLES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
_MARKERS = {"circle": "o", "circle-open": "o", "square": "s"}


def draw(figures: Sequence[Chart], columns: int = 2) -> Picture:
    """Figures in panels, row by row.

    Args:
        figures: at least one.
        columns: how many panels stand side by side.

    Raises:
        UserError: if there is none.
    """
    if not figures:
        raise UserError("There is nothing to draw.")
    columns = min(columns, len(figures))
    rows = [figures[at : at + columns] for at in range(0, len(figures), columns)]
    heights = [max(_height(figure) for figure in row) for row in rows]
    picture = Picture(figsize=(5.4 * columns, sum(heights)), layout="constrained")
    panels = picture.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for panel, figure in zip(panels.flatten(), figures, strict=False):
        panel.set_title(figure.title, fontsize=10, loc="left")
        _chart(panel, figure)
    for panel in panels.flatten()[len(figures) :]:
        panel.set_visible(False)
    return picture


def save(picture: Picture, path: Path, dpi: int = 150) -> None:
    """Write a picture to a file of matplotlib's formats, by its ending.

    Raises:
        UserError: if it cannot be written, or the ending is none of them.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(path, dpi=dpi)
    except (OSError, ValueError) as error:
        raise UserError(f"The picture cannot be written to {path}: {error}.") from None


def _height(figure: Chart) -> float:
    if not figure.y.ticks:
        return 3.8
    rows = [*figure.y.ticks, *(y for s in figure.series for y in s.y if y is not None)]
    return 1.4 + 0.36 * (max(rows) - min(rows) + 1)


def _chart(panel: Axes, chart: Chart) -> None:
    for series in chart.series:
        _series(panel, series, chart)
    _axis(panel.xaxis, chart.x)
    _axis(panel.yaxis, chart.y)
    if chart.y.ticks:
        panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.2)
    if any(series.name and series.listed for series in chart.series):
        panel.legend(frameon=False, fontsize=8)


def _series(panel: Axes, series: Series, chart: Chart) -> None:
    shade = colour(series.run)
    x, y = (np.array(drawn(v, a), float) for v, a in ((series.x, chart.x), (series.y, chart.y)))
    style: dict[str, Any] = {"color": shade, "linestyle": _STYLES[series.line or "solid"]}
    if series.line is None:
        style["linestyle"] = "none"
    if series.mark is not None:
        face = "none" if series.mark == "circle-open" else shade
        style |= {"marker": _MARKERS[series.mark], "markersize": 5, "markerfacecolor": face}
    if series.faint:
        style |= {"linewidth": 6, "alpha": 0.2, "solid_capstyle": "round"}
    panel.plot(x, y, label=series.name if series.name and series.listed else "_", **style)
    for i in range(len(x)):
        lost = all(not 0 <= j < len(x) or math.isnan(y[j]) for j in (i - 1, i + 1))
        if series.mark is None and (series.x[i] == series.dot or lost):
            panel.plot(x[i], y[i], "o", color=shade, markersize=6 if not lost else 3)
    for said, at in zip(series.text or (), zip(x, y, strict=True), strict=False):
        over: dict[str, Any] = {
            "xytext": (0, 5),
            "textcoords": "offset points",
            "ha": "center",
            "fontsize": 7,
        }
        panel.annotate(said, at, **over)
    if series.low is None or series.high is None:
        return
    along = chart.x if series.sideways else chart.y
    low, high = (np.array(drawn(ends, along), float) for ends in (series.low, series.high))
    if series.sideways:
        for at, *ends in zip(y, low, high, strict=True):
            panel.plot(ends, [at, at], color=shade, alpha=0.6, linewidth=1.5)
    elif series.line is None:
        for at, *ends in zip(x, low, high, strict=True):
            panel.plot([at, at], ends, color=shade, alpha=0.25, linewidth=1)
    else:
        panel.fill_between(x, low, high, color=shade, alpha=0.15, linewidth=0)


def _axis(side: Any, axis: Axis) -> None:
    side.set_label_text(" ".join(filter(None, (axis.label, "%" if axis.unit == "%" else ""))))
    if axis.log:
        side.axes.set(**{f"{side.axis_name}scale": "log"})
    if axis.ticks:
        side.set_ticks(
            list(axis.ticks), [text.replace("<br>", "\n") for text in axis.ticks.values()]
        )
        side.axes.tick_params(side.axis_name, labelsize=8, length=0)
    if axis.zero:
        line = side.axes.axhline if side.axis_name == "y" else side.axes.axvline
        line(0, color="#5f5f66", linewidth=0.8)
