"""Owns figures of runs by name, to be shown by a notebook or saved."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Picture

from robustflat.errors import UserError
from robustflat.report import figures, paper
from robustflat.report.chart import Chart, Figure, Plane, is_empty
from robustflat.report.interactive import resolved
from robustflat.report.record import read_records
from robustflat.train.folder import RunFolder


@dataclass(frozen=True)
class Drawing:
    """Charts and planes of one subject; a notebook shows them.

    Attributes:
        name: what they show.
        figures: what is drawn.
    """

    name: str
    figures: Sequence[Figure]

    def picture(self) -> Picture:
        """The charts by matplotlib, of no window; planes are drawn by `robustflat landscape`.

        Raises:
            UserError: if there are only planes.
        """
        return paper.draw([figure for figure in self.figures if isinstance(figure, Chart)])

    def plotly(self) -> list[Any]:
        """The same for Plotly, to be turned and zoomed; planes also as surfaces."""
        from plotly.graph_objects import Figure as Interactive

        found = []
        for figure in self.figures:
            shapes = (False, True) if isinstance(figure, Plane) else (False,)
            found += [
                Interactive(resolved(figure, surface=shape)).update_layout(
                    title_text=figure.title, margin_t=90
                )
                for shape in shapes
            ]
        return found

    def save(self, path: str | Path) -> Path:
        """Write a page (.html) or a picture (.png, .svg, .pdf), by the ending.

        Raises:
            UserError: if it cannot be written, or the ending is none of them.
        """
        target = Path(path)
        if target.suffix == ".html":
            from robustflat.report.page import write_figures

            write_figures(self.figures, target, self.name.capitalize())
        else:
            paper.save(self.picture(), target)
        return target

    def _repr_html_(self) -> str:
        """An SVG, which needs no script."""
        text = io.StringIO()
        self.picture().savefig(text, format="svg")
        return text.getvalue()


def of_folders(folders: Sequence[RunFolder], name: str) -> Drawing:
    """A figure of runs by its name.

    Raises:
        UserError: if there is no such figure, or nothing of it was measured.
    """
    if name not in figures.FIGURES:
        raise UserError(f"There is no figure {name!r}. There are {', '.join(figures.FIGURES)}.")
    found = [f for f in figures.FIGURES[name](read_records(folders)) if not is_empty(f)]
    if not found:
        roots = ", ".join(str(folder.root) for folder in folders)
        raise UserError(
            f"Nothing for the figure {name!r} was measured of {roots}: evaluate it, or measure its "
            "flatness or landscape first."
        )
    return Drawing(name, found)
