"""Owns the pictures of landscapes: PNG by matplotlib, and a page to explore, complete in itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from html import escape
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from robustflat.errors import UserError
from robustflat.flatness.grid import Grid, Landscape
from robustflat.report.charts import COLOURS, KINDS

Quantity = Literal["losses", "accuracies"]
_STYLES = {"clean": "--", "robust": "-", "robust_fixed": ":"}


def landscape_figure(
    landscapes: Mapping[str, Landscape], *, quantity: Quantity = "losses", log: bool = False
) -> Figure:
    """Landscapes of one or more models as a matplotlib figure.

    Lines are drawn on one pair of axes; of planes, one panel for each model and loss, on one colour
    scale for each loss.

    Args:
        landscapes: by the models' names; all lines or all planes.
        quantity: "losses" or "accuracies".
        log: a logarithmic scale.

    Returns:
        The figure, of no window: save it with ``savefig``.

    Raises:
        UserError: if there is none, or lines and planes are mixed.
    """
    dimensions = _dimensions(landscapes)
    if quantity not in ("losses", "accuracies"):
        raise UserError(f"quantity must be losses or accuracies, got {quantity!r}.")
    return (_lines if dimensions == 1 else _planes)(landscapes, quantity, log)


def save_png(
    landscapes: Mapping[str, Landscape],
    path: str | os.PathLike[str],
    *,
    quantity: Quantity = "losses",
    log: bool = False,
    dpi: int = 150,
) -> Path:
    """Write :func:`landscape_figure` to a file of matplotlib's formats, by its ending."""
    figure = landscape_figure(landscapes, quantity=quantity, log=log)
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=dpi)
    except OSError as error:
        raise UserError(f"The figure cannot be written to {target}: {error}.") from error
    return target


def save_html(
    landscapes: Mapping[str, Landscape],
    path: str | os.PathLike[str],
    *,
    title: str = "Weight-loss landscape",
) -> Path:
    """Write a page in which the landscapes can be read off and compared; it loads nothing.

    Args:
        landscapes: by the models' names; all lines or all planes.
        path: the file.
        title: of the page.

    Raises:
        UserError: if there is none, they are mixed, or the file cannot be written.
    """
    _dimensions(landscapes)
    data = {name: landscape.to_dict() for name, landscape in landscapes.items()}
    # Inside a script element only "</" and "<!--" could end or change its parsing.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    page = resources.files("robustflat.report").joinpath("landscape.html").read_text("utf-8")
    page = page.replace("@TITLE@", escape(title)).replace("@DATA@", text)
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, "utf-8")
    except OSError as error:
        raise UserError(f"The page cannot be written to {target}: {error}.") from error
    return target


def _dimensions(landscapes: Mapping[str, Landscape]) -> int:
    found = {len(landscape.axes) for landscape in landscapes.values()}
    if not found:
        raise UserError("There is no landscape to draw.")
    if len(found) > 1:
        raise UserError("Lines and planes cannot be drawn in one figure. Draw them separately.")
    return found.pop()


def _lines(landscapes: Mapping[str, Landscape], quantity: Quantity, log: bool) -> Figure:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, landscape) in enumerate(landscapes.items()):
        colour = COLOURS[index % len(COLOURS)]
        for kind, values in _grids(landscape, quantity).items():
            axes.plot(
                landscape.axes[0],
                values,
                _STYLES.get(kind, "-."),
                color=colour,
                label=f"{name}, {KINDS.get(kind, kind)}",
            )
        if len(landscape.points) > 1:
            for label, (at,) in ((k, v[:1]) for k, v in landscape.points.items()):
                axes.axvline(at, color=colour, linewidth=0.6, alpha=0.6)
                axes.annotate(label, (at, 1), xycoords=("data", "axes fraction"), va="bottom")
    first = next(iter(landscapes.values()))
    axes.set_xlabel(first.names[0])
    axes.set_ylabel(_quantity_label(quantity))
    if log:
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _planes(landscapes: Mapping[str, Landscape], quantity: Quantity, log: bool) -> Figure:
    kinds = list(
        dict.fromkeys(k for landscape in landscapes.values() for k in _grids(landscape, quantity))
    )
    shape = (len(kinds), len(landscapes))
    figure = Figure(figsize=(3.6 * shape[1] + 0.8, 3.2 * shape[0]), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False)
    for row, kind in zip(panels, kinds, strict=True):
        grids = [_grids(landscape, quantity).get(kind) for landscape in landscapes.values()]
        known = np.concatenate([g[np.isfinite(g)] for g in grids if g is not None])
        low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
        for panel, grid, (name, landscape) in zip(row, grids, landscapes.items(), strict=True):
            panel.set_title(f"{name}, {KINDS.get(kind, kind)}", fontsize=9)
            if grid is not None:
                _plane(panel, landscape, grid, (float(low), float(high)), log)
    return figure


def _plane(
    panel: Axes, landscape: Landscape, grid: Grid, limits: tuple[float, float], log: bool
) -> None:
    low, high = limits
    norm = LogNorm(max(low, 1e-12), max(high, 1e-11)) if log else None
    scale = {"norm": norm} if norm else {"vmin": low, "vmax": high}
    # The first axis runs along x: imshow-like functions want it as the columns.
    mesh = panel.pcolormesh(*landscape.axes, grid.T, shading="nearest", cmap="viridis", **scale)
    if np.isfinite(grid).all() and high > low and min(grid.shape) > 1:
        levels = (np.geomspace(max(low, 1e-12), high, 10) if log else np.linspace(low, high, 10))[
            1:-1
        ]
        panel.contour(*landscape.axes, grid.T, levels=levels, colors="white", linewidths=0.5)
    for label, at in landscape.points.items():
        panel.plot(*at, "o", color="white", markeredgecolor="black", markersize=5)
        if len(landscape.points) > 1:
            panel.annotate(
                label, (at[0], at[1]), xytext=(4, 4), textcoords="offset points", color="white"
            )
    panel.set_xlabel(landscape.names[0])
    panel.set_ylabel(landscape.names[1])
    assert panel.figure is not None
    panel.figure.colorbar(mesh, ax=panel)


def _grids(landscape: Landscape, quantity: Quantity) -> Mapping[str, Grid]:
    return landscape.losses if quantity == "losses" else landscape.accuracies


def _quantity_label(quantity: Quantity) -> str:
    return "loss" if quantity == "losses" else "accuracy"
