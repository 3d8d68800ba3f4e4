"""Owns figures for pages: charts and planes as Plotly's JSON, with names for colours.

A colour is written ``@name@`` and looked up where the figure is drawn, in the theme of the screen.
"""

from __future__ import annotations

import base64
import gzip
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

from robustflat.report.chart import Axis, Figure, Mark, Plane, Series, drawn
from robustflat.report.palette import LIGHT, SCALE, themes

_Json = dict[str, Any]
_VIEW = {"aspectmode": "cube", "camera": {"eye": {"x": 1.6, "y": 1.6, "z": 0.9}}}
_ROW = 34  # Height of a named place, in pixels.


def library() -> str:
    """Plotly's script, all of it, to be put into a page: by gzip, in base 64."""
    found = resources.files("plotly") / "package_data" / "plotly.min.js"
    return base64.b64encode(gzip.compress(found.read_bytes(), mtime=0)).decode()


def plotly(figure: Figure, *, surface: bool = False) -> _Json:
    """A figure for Plotly: ``data``, ``layout``.

    Args:
        figure: what is shown.
        surface: a plane as a surface in space.
    """
    if isinstance(figure, Plane):
        return _surface(figure) if surface else _contour(figure)
    data = [
        trace
        for series, said in zip(figure.series, figure.legend, strict=True)
        for trace in _traces(series, figure.x, figure.y, listed=bool(said))
    ]
    rows = list(figure.y.ticks)
    if not rows:
        side = _axis(figure.y)
        values = [v for trace in data for v in trace["y"] if v is not None]
        if figure.y.log and values:
            decades = math.log10(max(values) / min(values))
            # 1, 2, 5 where powers alone are too few.
            few = {"dtick": "D2", "tickformat": "~g"}
            side |= few if decades < 2.5 else {"dtick": math.ceil(decades / 6)}
        axes = {"xaxis": _axis(figure.x), "yaxis": side, "hovermode": "x"}
        marks = [
            {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper",
             "line": {"color": "@soft@", "width": 1},
             "label": {"text": _plain(name), "textangle": 0, "textposition": "end",
                       "xanchor": "left", "yanchor": "top"}}
            for name, at in figure.places.items()
        ]  # fmt: skip
        return {"data": data, "layout": {**_layout(340), **axes, "shapes": marks}}
    # From top to bottom, with a row to spare.
    places = [y for series in figure.series for y in series.y if y is not None]
    first, last = min(*rows, *places) - 0.6, max(*rows, *places) + 0.6
    height, ends = round(60 + _ROW * (last - first)), {"range": [last, first]}
    axes = {"xaxis": _axis(figure.x), "yaxis": _axis(figure.y) | ends, "hovermode": "closest"}
    layout = {**_layout(height), **axes}
    if any(series.text for series in figure.series):
        layout["margin"]["r"] = 40  # for words beside what stands at the edge
    return {"data": data, "layout": layout}


def resolved(figure: Figure, theme: str = "light", *, surface: bool = False) -> _Json:
    """The same with the colours of a theme, for Plotly outside of a page."""

    def look(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: look(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [look(inner) for inner in value]
        if isinstance(value, str) and value.startswith("@"):
            _, name, alpha = value.split("@")
            return themes()[theme][name] + alpha
        return value

    found: _Json = look(plotly(figure, surface=surface))
    return found


def _colour(run: int, alpha: str = "") -> str:
    return f"@{run % len(LIGHT)}@{alpha}"


def _layout(height: int) -> _Json:
    return {
        "height": height,
        "margin": {"l": 8, "r": 10, "t": 8, "b": 8},
        "font": {"color": "@ink@", "size": 13, "family": "system-ui, sans-serif"},
        "paper_bgcolor": "@page@",
        "plot_bgcolor": "@page@",
        "hoverlabel": {"bgcolor": "@page@", "font": {"color": "@ink@"}, "namelength": -1},
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.01,
            "yanchor": "bottom",
            "traceorder": "normal",
        },
        "showlegend": True,
    }


def _axis(axis: Axis) -> _Json:
    found: _Json = {
        "title": {
            "text": axis.label if axis.unit == "%" else axis.title,
            "standoff": 8,
            "font": {"size": 13},
        },
        "automargin": True,
        "gridcolor": "@line@",
        "linecolor": "@line@",
        "zeroline": axis.zero,
        "zerolinecolor": "@soft@",
        "ticksuffix": "%" if axis.unit == "%" else "",
    }
    if axis.log:
        found |= {"type": "log", "exponentformat": "power", "nticks": 6}
    if axis.zero:
        found["rangemode"] = "tozero"
    if axis.ticks:
        found |= {"tickvals": list(axis.ticks), "ticktext": list(axis.ticks.values())}
        found |= {"tickfont": {"size": 12}, "zeroline": False, "showgrid": False}
    return found


def _traces(series: Series, x_axis: Axis, y_axis: Axis, *, listed: bool) -> list[_Json]:
    xs, ys = drawn(series.x, x_axis), drawn(series.y, y_axis)
    unit = (x_axis if series.sideways else y_axis).unit
    value = "%{x:.1f}" if series.sideways else "%{y:.4~g}"
    trace: _Json = {
        "type": "scatter",
        "mode": "+".join(
            m for m, on in (("lines", series.line), ("markers", _marked(series))) if on
        ),
        "name": series.listed,
        "legendgroup": series.listed,
        "x": xs,
        "y": ys,
        "showlegend": listed,
        "connectgaps": False,
        "meta": {"run": series.run, "name": series.name},
        "line": {"color": _colour(series.run), "dash": series.line or "solid", "width": 2},
        "marker": {"color": _colour(series.run), "opacity": 1, **_marks(series)},
        "hovertemplate": f"{value}{unit and ' ' + unit}<extra>{_plain(series.name)}</extra>",
    }
    if series.faint:
        trace["line"] |= {"color": _colour(series.run, "33"), "width": 8}
        trace |= {"hoverinfo": "skip", "hovertemplate": None}
    texts = [] if series.text is None else [_texts(series, x_axis, ys)]
    if series.low is None or series.high is None:
        return [trace, *texts]
    along = x_axis if series.sideways else y_axis
    low, high = drawn(series.low, along), drawn(series.high, along)
    if series.sideways:
        trace["error_x"] = _whiskers(xs, low, high) | {"color": _colour(series.run, "99")}
        return [trace, *texts]
    if series.line is None:
        trace["error_y"] = _whiskers(ys, low, high) | {"color": _colour(series.run, "99")}
        return [trace]
    edge = {
        "type": "scatter", "mode": "lines", "x": xs, "hoverinfo": "skip", "showlegend": False,
        "line": {"width": 0, "color": _colour(series.run)}, "meta": {"run": series.run},
        "connectgaps": False, "name": "",
    }  # fmt: skip
    fill = {"fill": "tonexty", "fillcolor": _colour(series.run, "26")}
    return [{**edge, "y": low}, {**edge, "y": high, **fill}, trace]


def _texts(series: Series, x_axis: Axis, ys: Sequence[float | None]) -> _Json:
    """Words at the right of each point, or of its whisker."""
    return {
        "type": "scatter", "mode": "text", "name": "", "showlegend": False, "hoverinfo": "skip",
        "x": drawn(series.high or series.x, x_axis), "y": ys,
        "text": [f"\u00a0{text}" for text in series.text or ()],
        "textposition": "middle right", "textfont": {"size": 11}, "cliponaxis": False,
        "meta": {"run": series.run},
    }  # fmt: skip


def _marked(series: Series) -> bool:
    return series.mark is not None or series.dot is not None or len(series.x) == 1


def _marks(series: Series) -> _Json:
    """Symbols, large where a dot stands out; points between gaps are never lost."""
    symbol: Mark = series.mark or "circle"
    if series.mark is not None:
        return {"symbol": symbol, "size": 9}
    return {"symbol": symbol, "size": [11 if x == series.dot else 4 for x in series.x]}


def _whiskers(at: Sequence[Any], low: Sequence[Any], high: Sequence[Any]) -> _Json:
    def reach(ends: Sequence[Any], sign: int) -> list[float]:
        return [
            0.0 if v is None or end is None else sign * (end - v)
            for v, end in zip(at, ends, strict=True)
        ]

    sides = {"array": reach(high, 1), "arrayminus": reach(low, -1)}
    return {"type": "data", "symmetric": False, **sides, "thickness": 2, "width": 4}


def _grid(plane: Plane) -> tuple[_Json, float, float]:
    """Coordinates, values and their bar, and the ends of the colours; rows lie along y.

    Plotly has no logarithmic colours: the logarithm is drawn, under the names of the values.
    """
    rows = [drawn(row, Axis(log=plane.log)) for row in zip(*plane.values, strict=True)]
    low, high = plane.limits
    bar: _Json = {"title": {"text": plane.label, "side": "right"}, "thickness": 12}
    shared: _Json = {
        "x": list(plane.axes[0]), "y": list(plane.axes[1]), "z": rows, "customdata": rows,
        "colorbar": bar, "colorscale": SCALE.capitalize(), "meta": {"run": plane.run},
    }  # fmt: skip
    if plane.log:
        shared["z"] = [[None if v is None else math.log10(v) for v in row] for row in rows]
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        names = [m * 10.0**power for power in powers for m in (1, 2, 5)]
        shown = [v for v in names if low <= v <= high]
        bar |= {"tickvals": [math.log10(v) for v in shown], "ticktext": [f"{v:g}" for v in shown]}
        low, high = math.log10(low), math.log10(high)
    return shared, low, high if high > low else low + 1e-9


def _contour(plane: Plane) -> _Json:
    shared, low, high = _grid(plane)
    names = [_plain(name) for name in plane.names]
    tip = "<br>".join((f"{names[0]} %{{x:.3g}}", f"{names[1]} %{{y:.3g}}", "%{customdata:.4~g}"))
    map_ = {
        "type": "contour", **shared, "zmin": low, "zmax": high, "connectgaps": False,
        "hovertemplate": f"{tip}<extra></extra>", "autocontour": False,
        "contours": {"start": low, "end": high, "size": (high - low) / 12},
        "line": {"width": 0.6, "color": "#ffffff", "smoothing": 0},
    }  # fmt: skip
    several = len(plane.points) > 1
    models = {
        "type": "scatter", "mode": "markers+text" if several else "markers",
        "x": [at[0] for at in plane.points.values()],
        "y": [at[1] for at in plane.points.values()],
        "text": list(plane.points), "textposition": "top center", "textfont": {"color": "#ffffff"},
        "marker": {"color": "#ffffff", "size": 9, "line": {"color": "#000000", "width": 1.5}},
        "hovertemplate": "%{text}<extra></extra>", "meta": {"run": plane.run},
    }  # fmt: skip
    axes = [
        _axis(Axis(label=name)) | {"showgrid": False, "constrain": "domain"} for name in plane.names
    ]
    layout = {**_layout(400), "xaxis": axes[0], "yaxis": axes[1], "showlegend": False}
    return {"data": [map_, models], "layout": layout}


def _surface(plane: Plane) -> _Json:
    shared, low, high = _grid(plane)
    hill = {"type": "surface", **shared, "cmin": low, "cmax": high}
    names = dict(zip(("x", "y", "z"), (*plane.names, plane.label), strict=True))
    scene: dict[str, _Json] = {
        f"{axis}axis": {
            "title": {"text": name, "font": {"size": 11}}, "color": "@ink@", "gridcolor": "@line@",
            "backgroundcolor": "@page@",
        }
        for axis, name in names.items()
    }  # fmt: skip
    scene["zaxis"]["range"] = [low, high]  # one height, so that runs can be compared
    if plane.log:
        scene["zaxis"] |= {key: shared["colorbar"][key] for key in ("tickvals", "ticktext")}
    layout = {**_layout(440), "scene": {**scene, **_VIEW}}
    return {"data": [hill], "layout": layout}


def _plain(text: str) -> str:
    """Text in which Plotly sees no markup and no placeholder."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("%{", "%&#123;")
