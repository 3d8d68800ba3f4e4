"""Owns charts for papers, by matplotlib: as PNG, SVG or PDF."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure as Picture
from matplotlib.lines import Line2D

from robustflat.errors import UserError
from robustflat.report.chart import Axis, Chart, Key, Series, drawn
from robustflat.report.palette import colour

_GREY = "#5f5f66"
_STYLES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
_MARKERS = {"circle": "o", "circle-open": "o", "square": "s"}


def draw(figures: Sequence[Chart], columns: int = 2, title: str = "") -> Picture:
    """Figures in panels, row by row.

    Args:
        figures: at least one.
        columns: how many panels stand side by side.
        title: of all.

    Raises:
        UserError: if there is none.
    """
    if not figures:
        raise UserError("There is nothing to draw.")
    columns = min(columns, len(figures))
    rows = [figures[at : at + columns] for at in range(0, len(figures), columns)]
    heights = [max(_height(figure) for figure in row) for row in rows]
    picture = Picture(figsize=(5.4 * columns, sum(heights)), layout="constrained")
    if title:
        picture.suptitle(title, fontsize=11)
    panels = picture.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for panel, figure in zip(panels.flatten(), figures, strict=False):
        panel.set_title(figure.title, fontsize=10, loc="left", pad=18 if figure.places else None)
        _chart(panel, figure)
    for panel in panels.flatten()[len(figures) :]:
        panel.set_visible(False)
    return picture


def check_ending(path: Path) -> None:
    """Refuse a file that is neither a picture nor a page, before anything is paid.

    Raises:
        UserError: if matplotlib has no format of that ending.
    """
    formats = sorted([*FigureCanvasBase.get_supported_filetypes(), "html"])
    if path.suffix.lower().removeprefix(".") not in formats:
        raise UserError(
            f"{path} cannot be written: it has no ending of a picture or page. There are "
            f"{', '.join(formats)}."
        )


def save(picture: Picture, path: Path) -> None:
    """Write a picture to a file of matplotlib's formats, by its ending.

    Raises:
        UserError: if it cannot be written, or the ending is none of them.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(path, dpi=200)
    except (OSError, ValueError) as error:
        raise UserError(f"The picture cannot be written to {path}: {error}.") from None


def _height(figure: Chart) -> float:
    if not figure.y.ticks:
        return 3.8
    rows = [*figure.y.ticks, *(y for s in figure.series for y in s.y if y is not None)]
    return 1.4 + 0.36 * (max(rows) - min(rows) + 1)


def _chart(panel: Axes, chart: Chart) -> None:
    for series, said in zip(chart.series, chart.legend, strict=True):
        _series(panel, series, chart, said or "_")
    _axis(panel.xaxis, chart.x)
    _axis(panel.yaxis, chart.y)
    for name, at in chart.places.items():
        panel.axvline(at, color=_GREY, linewidth=0.8, zorder=0)
        panel.annotate(
            name, (at, 1), (0, 3), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", va="bottom", fontsize=8,
        )  # fmt: skip
    if chart.y.ticks:
        panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.2)
    handles, names = panel.get_legend_handles_labels()
    found = dict(zip(names, handles, strict=True))
    for style, meaning in chart.key.items():
        line = {"linestyle": "none", **_style(style)}
        found[meaning] = Line2D([], [], color=_GREY, **line)
    if found:
        panel.legend(list(found.values()), list(found), frameon=False, fontsize=8)


def _series(panel: Axes, series: Series, chart: Chart, label: str) -> None:
    shade = colour(series.run)
    x, y = (np.array(drawn(v, a), float) for v, a in ((series.x, chart.x), (series.y, chart.y)))
    style = {"color": shade, "linestyle": "none", **_style(series.line), **_style(series.mark)}
    if series.faint:
        style |= {"linewidth": 6, "alpha": 0.2, "solid_capstyle": "round"}
    panel.plot(x, y, label=label, **style)
    for i in range(len(x)):
        lost = all(not 0 <= j < len(x) or math.isnan(y[j]) for j in (i - 1, i + 1))
        if series.mark is None and (series.x[i] == series.dot or lost):
            panel.plot(x[i], y[i], "o", color=shade, markersize=6 if not lost else 3)
    beside = x if series.high is None else drawn(series.high, chart.x)
    for said, at in zip(series.text or (), zip(beside, y, strict=True), strict=False):
        panel.annotate(said, at, (4, 0), textcoords="offset points", va="center", fontsize=7)
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


def _style(style: Key | None) -> dict[str, Any]:
    """Of a line or a mark, for matplotlib."""
    if style in _STYLES:
        return {"linestyle": _STYLES[style]}
    if style is None:
        return {}
    found = {"marker": _MARKERS[style], "markersize": 5}
    return found | ({"markerfacecolor": "none"} if style == "circle-open" else {})


def _axis(side: Any, axis: Axis) -> None:
    side.set_label_text(axis.title)
    if axis.log:
        side.axes.set(**{f"{side.axis_name}scale": "log"})
    if axis.ticks:
        side.set_ticks(
            list(axis.ticks), [text.replace("<br>", "\n") for text in axis.ticks.values()]
        )
        side.axes.tick_params(side.axis_name, labelsize=8, length=0)
    if axis.zero:
        line = side.axes.axhline if side.axis_name == "y" else side.axes.axvline
        line(0, color=_GREY, linewidth=0.8)
