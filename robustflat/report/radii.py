"""Owns the picture and the table of robust accuracy over several radii."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from robustflat.evaluate.radii import RadiusCurve
from robustflat.evaluate.threat import radius
from robustflat.report.chart import Axis, Chart, Series


def chart(found: Mapping[str, RadiusCurve]) -> Chart:
    """A line for every subject, with its 95 % intervals.

    Args:
        found: by the name of the subject; all in one norm.
    """
    series = [
        Series(
            name=name, run=i, mark="circle",
            x=[point.eps for point in curve.points],
            y=[point.accuracy for point in curve.points],
            low=[point.interval[0] for point in curve.points],
            high=[point.interval[1] for point in curve.points],
        )
        for i, (name, curve) in enumerate(found.items())
    ]  # fmt: skip
    norms = ", ".join(dict.fromkeys(curve.norm for curve in found.values()))
    return Chart(
        title="Robust accuracy over the radius, with 95% intervals",
        series=series,
        x=Axis(label=f"eps, {norms}, in image units", zero=True),
        y=Axis(unit="%", zero=True),
    )


def radius_table(name: str, curve: RadiusCurve) -> Table:
    """A row for every radius."""
    table = Table(title=Text(f"{name}: {curve.count} images, {curve.norm}"), title_justify="left")
    for head in ("eps", "still correct", "95% interval", "attacked", "broken", "seconds"):
        table.add_column(head, justify="right", no_wrap=True)
    for point in curve.points:
        low, high = point.interval
        table.add_row(
            radius(point.eps), f"{point.accuracy:.2%}", f"{low:.1%} .. {high:.1%}",
            str(point.attacked), str(point.broken), f"{point.seconds:.1f}",
        )  # fmt: skip
    return table
