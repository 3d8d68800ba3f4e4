"""Owns the picture and the table of robust accuracy over several radii."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from robustflat.evaluate.radii import RadiusCurve
from robustflat.evaluate.threat import radius
from robustflat.report.chart import Axis, Chart, Series
from robustflat.report.tables import WITHSTOOD, grid, withstood


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
    rows = [
        [radius(p.eps), *withstood(p.accuracy, p.interval, p.attacked, p.broken, p.seconds)]
        for p in curve.points
    ]
    title = f"{name}: {curve.count} images, {curve.norm}"
    return grid(title, ["eps", *WITHSTOOD], rows, texts=())
