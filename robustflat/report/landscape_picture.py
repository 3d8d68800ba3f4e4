"""Owns the pictures of landscapes for papers (PNG, PDF, SVG), by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from scipy.interpolate import PchipInterpolator

from robustflat.evaluate.threat import Threat
from robustflat.landscapes.record import Grid, Landscape, Quantity
from robustflat.report import figures, paper
from robustflat.report.chart import Chart, Plane
from robustflat.report.palette import SCALE

# Points of the drawn grid along each axis, shades, and labelled contour lines (about).
_FINE, _SHADES, _LINES = 201, 200, 16


def landscape_figure(
    landscapes: Mapping[str, Landscape],
    *,
    quantity: Quantity = "losses",
    log: bool | None = None,
) -> Figure:
    """Landscapes of one or more models as a matplotlib figure.

    Lines are drawn on one pair of axes, the mean over the directions with a band of one standard
    deviation. Planes have a panel for each model (a row) and loss (side by side), all on one scale
    of colours; between the points that were measured they are interpolated monotonically (PCHIP),
    so that no valley or ridge is shown that was not measured.

    Args:
        landscapes: by the models' names; all lines or all planes.
        quantity: "losses" or "accuracies".
        log: a logarithmic scale; None: where losses of planes differ more than 30 times.

    Returns:
        The figure, of no window: save it with ``savefig``.

    Raises:
        UserError: if there is none, or lines and planes are mixed.
    """
    drawn = figures.landscapes(landscapes, quantity=quantity, log=log)
    planes = [one for one in drawn if isinstance(one, Plane)]
    figure = _planes(planes) if planes else paper.draw([c for c in drawn if isinstance(c, Chart)])
    if planes:
        title = figures.landscape_title(next(iter(landscapes.values())), planes[0].label)
        figure.suptitle(fill(title, int(11 * figure.get_figwidth())), fontsize=11)
    caption = circumstances(list(landscapes.values()))
    width = int(15 * figure.get_figwidth())
    figure.supxlabel(fill(caption, width), fontsize=8, color="#555555")
    return figure


def _planes(planes: Sequence[Plane]) -> Figure:
    rows = [[one for one in planes if one.run == run] for run in {one.run: None for one in planes}]
    shape = (len(rows), max(map(len, rows)))
    low, high = planes[0].limits
    log = planes[0].log
    norm = (LogNorm if log else Normalize)(low, high if high > low else low + 1)
    x, y = planes[0].axes
    width = 3.3 * min(max((x[-1] - x[0]) / (y[-1] - y[0]), 0.4), 2.5)
    size = ((width + 0.4) * shape[1] + 1.2, 3.6 * shape[0] + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(*shape, squeeze=False, sharex="row", sharey="row")
    for row, own in zip(panels, rows, strict=True):
        for panel in row[len(own) :]:
            panel.set_axis_off()
        for panel, plane in zip(row, own, strict=False):
            _plane(panel, plane, norm)
        row[0].set_ylabel(own[0].names[1], fontsize=8)
    bar = figure.colorbar(ScalarMappable(norm, SCALE), ax=panels, aspect=30, pad=0.02)
    ticks = _ticks(norm)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.set_label(planes[0].label + " (logarithmic scale)" * log)
    return figure


def _plane(panel: Axes, plane: Plane, norm: Normalize) -> None:
    x, y, fine = _interpolated(plane, norm)
    shades = norm.inverse(np.linspace(0, 1, _SHADES + 1))
    # The first axis runs along x: matplotlib wants it as the columns.
    image = np.ma.masked_invalid(fine.T).clip(*_limits(norm))
    panel.set_title(plane.title, fontsize=10)
    panel.set_xlabel(plane.names[0], fontsize=8)
    panel.set_facecolor("#bbbbbb")  # Where the loss is not finite.
    filled = panel.contourf(x, y, image, shades, norm=norm, cmap=SCALE)
    filled.set_edgecolor("face")  # Or the paper shines through between the shades of a PDF.
    lines = panel.contour(x, y, image, _ticks(norm), colors="white", linewidths=0.6)
    panel.clabel(lines, fmt="%g", fontsize=7)
    for number, (a, b) in enumerate(plane.points.values(), 1):
        panel.plot(a, b, "o", color="white", markeredgecolor="black", markersize=5)
        if len(plane.points) > 1:
            panel.annotate(
                f"{number}", (a, b), (0, 6), textcoords="offset points", ha="center", fontsize=8,
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
    panel.set_aspect("equal")


def _interpolated(plane: Plane, norm: Normalize) -> tuple[Grid, Grid, Grid]:
    """A grid fine enough to look smooth; as it is, where it is not finite somewhere."""
    x, y, grid = (np.array(values, float) for values in (*plane.axes, plane.values))
    if not np.isfinite(grid).all() or min(grid.shape) < 2:
        return x, y, grid
    fine_x, fine_y = (np.linspace(axis[0], axis[-1], _FINE) for axis in (x, y))
    # On the scale that is shown: a logarithmic picture is smooth in the logarithm.
    shown = np.asarray(norm(np.clip(grid, *_limits(norm))))
    rows = PchipInterpolator(x, shown, axis=0)(fine_x)
    return fine_x, fine_y, np.asarray(norm.inverse(PchipInterpolator(y, rows, axis=1)(fine_y)))


def _ticks(norm: Normalize) -> list[float]:
    """Round values of the colour scale, for the bar and the contour lines alike."""
    low, high = _limits(norm)
    if isinstance(norm, LogNorm) and high / low > 10:
        found = LogLocator(subs=(1, 2, 5), numticks=_LINES).tick_values(low, high)
    else:
        found = MaxNLocator(_LINES, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in found if low <= tick <= high]


def _limits(norm: Normalize) -> tuple[float, float]:
    assert norm.vmin is not None
    assert norm.vmax is not None
    return norm.vmin, norm.vmax


def circumstances(landscapes: Sequence[Landscape]) -> str:
    """Under which threat, on how many images; where they differ, all of it."""
    abouts = [found.about for found in landscapes]
    said = [" or ".join(dict.fromkeys(parts)) for parts in zip(*map(_parts, abouts), strict=True)]
    draws = max(found.draws for found in landscapes)
    if draws > 1:
        said.append(f"mean and standard deviation of {draws} directions")
    return "; ".join(filter(None, said))


def _parts(about: Mapping[str, Any]) -> tuple[str, str, str]:
    """Attack, images and BatchNorm of one; "" for what is not known or not used."""
    attack, count, data = (about.get(key) for key in ("attack", "examples", "data"))
    threat = f"robust: {Threat.of(about['norm'], about['eps'])}, {attack}" if attack else ""
    images = " ".join(filter(None, (str(count), about.get("split"), "images"))) if count else ""
    statistics = {"keep": "kept", "refresh": "refreshed", "interpolate": "interpolated"}
    batchnorm = statistics.get(about.get("batchnorm", ""))
    return (
        threat,
        f"{images} of {data}" if data else images,
        f"BatchNorm statistics {batchnorm}" if batchnorm else "",
    )
