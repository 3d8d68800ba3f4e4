"""Owns the pictures of landscapes for papers (PNG, PDF, SVG), by matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from scipy.interpolate import PchipInterpolator

from robustflat.errors import UserError
from robustflat.evaluate.threat import Threat
from robustflat.landscapes.record import Grid, Landscape, Quantity
from robustflat.report.chart import KINDS
from robustflat.report.palette import SCALE
from robustflat.report.palette import colour as colour_of
from robustflat.report.paper import save

_STYLES = {"clean": "--", "robust": "-", "robust_fixed": ":"}
# From such a ratio of the highest to the lowest loss, only a logarithmic scale shows both.
STEEP = 30.0
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
    found = {len(landscape.axes) for landscape in landscapes.values()}
    if len(found) != 1:
        raise UserError("A figure shows landscapes that are all lines or all planes, at least one.")
    if quantity not in ("losses", "accuracies"):
        raise UserError(f"quantity must be losses or accuracies, got {quantity!r}.")
    figure = (_lines if found == {1} else _planes)(landscapes, quantity, log)
    inches = figure.get_figwidth()
    title = _title(next(iter(landscapes.values())), quantity)
    figure.suptitle(fill(title, int(11 * inches)), fontsize=11)
    caption = circumstances(list(landscapes.values()))
    figure.supxlabel(fill(caption, int(15 * inches)), fontsize=8, color="#555555")
    return figure


def save_picture(
    landscapes: Mapping[str, Landscape],
    path: str | os.PathLike[str],
    *,
    quantity: Quantity = "losses",
    log: bool | None = None,
    dpi: int = 200,
) -> Path:
    """Write :func:`landscape_figure` to a file of matplotlib's formats, by its ending.

    Raises:
        UserError: if there is nothing to draw, or the file cannot be written.
    """
    figure = landscape_figure(landscapes, quantity=quantity, log=log)
    target = Path(path)
    save(figure, target, dpi)
    return target


def check_ending(path: Path) -> None:
    """Refuse a file that :func:`save_picture` could not write, before anything is drawn.

    Raises:
        UserError: if matplotlib has no format of that ending.
    """
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in formats:
        raise UserError(
            f"{path} cannot be written: it has no ending of a picture. There are "
            f"{', '.join(formats)}, and html."
        )


def _lines(landscapes: Mapping[str, Landscape], quantity: Quantity, log: bool | None) -> Figure:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, landscape) in enumerate(landscapes.items()):
        colour, at = colour_of(index), landscape.axes[0]
        spreads = landscape.spread(quantity)
        for kind, mean in landscape.mean(quantity).items():
            label = _name(name, kind)
            axes.plot(at, mean, _STYLES[kind], color=colour, label=label)
            if kind in spreads:
                low, high = mean - spreads[kind], mean + spreads[kind]
                axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        if len(landscape.points) > 1:
            for label, (x, *_) in landscape.points.items():
                axes.axvline(x, color="#999999", linewidth=0.8, zorder=0)
                axes.annotate(
                    label, (x, 1), (0, 3), xycoords=("data", "axes fraction"),
                    textcoords="offset points", ha="center", va="bottom", fontsize=8,
                )  # fmt: skip
    first = next(iter(landscapes.values()))
    axes.set_xlabel(first.names[0], fontsize=9)
    axes.set_ylabel(_label(quantity))
    if log:
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _planes(landscapes: Mapping[str, Landscape], quantity: Quantity, log: bool | None) -> Figure:
    grids = {name: landscape.mean(quantity) for name, landscape in landscapes.items()}
    kinds = [kind for kind in _STYLES if any(kind in grid for grid in grids.values())]
    known = np.concatenate([grid.ravel() for of in grids.values() for grid in of.values()])
    known = known[np.isfinite(known)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if log is None:
        log = quantity == "losses" and low > 0 and high > STEEP * low
    low = max(low, 1e-6) if log else low
    high = high if high > low else low + 1
    norm: Normalize = (LogNorm if log else Normalize)(low, high)
    shape = (len(landscapes), len(kinds))
    x, y = next(iter(landscapes.values())).axes
    width = 3.3 * min(max((x[-1] - x[0]) / (y[-1] - y[0]), 0.4), 2.5)
    size = ((width + 0.4) * shape[1] + 1.2, 3.6 * shape[0] + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(*shape, squeeze=False, sharex="row", sharey="row")
    for row, (name, landscape) in zip(panels, landscapes.items(), strict=True):
        for panel, kind in zip(row, kinds, strict=True):
            panel.set_title(_name(name, kind), fontsize=10)
            if kind not in grids[name]:
                panel.set_axis_off()
            else:
                _plane(panel, landscape, grids[name][kind], norm)
            panel.set_xlabel(landscape.names[0], fontsize=8)
        row[0].set_ylabel(landscape.names[1], fontsize=8)
    bar = figure.colorbar(ScalarMappable(norm, SCALE), ax=panels, aspect=30, pad=0.02)
    ticks = _ticks(norm)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.set_label(_label(quantity) + " (logarithmic scale)" * log)
    return figure


def _plane(panel: Axes, landscape: Landscape, grid: Grid, norm: Normalize) -> None:
    x, y, fine = _interpolated(landscape.axes, grid, norm)
    shades = norm.inverse(np.linspace(0, 1, _SHADES + 1))
    # The first axis runs along x: matplotlib wants it as the columns.
    image = np.ma.masked_invalid(fine.T).clip(*_limits(norm))
    panel.set_facecolor("#bbbbbb")  # Where the loss is not finite.
    filled = panel.contourf(x, y, image, shades, norm=norm, cmap=SCALE)
    filled.set_edgecolor("face")  # Or the paper shines through between the shades of a PDF.
    lines = panel.contour(x, y, image, _ticks(norm), colors="white", linewidths=0.6)
    panel.clabel(lines, fmt="%g", fontsize=7)
    for number, (a, b) in enumerate(landscape.points.values(), 1):
        panel.plot(a, b, "o", color="white", markeredgecolor="black", markersize=5)
        if len(landscape.points) > 1:
            panel.annotate(
                f"{number}", (a, b), (0, 6), textcoords="offset points", ha="center", fontsize=8,
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
    panel.set_aspect("equal")


def _interpolated(
    axes: tuple[list[float], ...], grid: Grid, norm: Normalize
) -> tuple[Grid, Grid, Grid]:
    """A grid fine enough to look smooth; as it is, where it is not finite somewhere."""
    x, y = map(np.asarray, axes)
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


def _title(found: Landscape, quantity: Quantity) -> str:
    what = _label(quantity).capitalize()
    if found.about.get("directions") == "checkpoints":
        if len(found.axes) == 1:
            return f"{what} on the line through {' and '.join(found.points)}"
        names = ", ".join(f"{name} ({i})" for i, name in enumerate(found.points, 1))
        return f"{what} on the plane through {names}"
    return f"{what} around the weights"


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


def _name(model: str, kind: str) -> str:
    return ", ".join(filter(None, (model, KINDS.get(kind, kind))))


def _label(quantity: Quantity) -> str:
    return "loss" if quantity == "losses" else "accuracy"
