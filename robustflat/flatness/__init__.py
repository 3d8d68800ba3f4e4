"""How flat the weight landscape is: sharpness, curvature, mechanism and landscapes."""

from robustflat.flatness.figure import Cost, Figure, Passes, Progress
from robustflat.flatness.grid import Landscape
from robustflat.flatness.landscapes import between, landscape, landscape_cost
from robustflat.flatness.measures import MEASURES, Measure, measure
from robustflat.flatness.measuring import cost, flatness
from robustflat.flatness.options import BALLS, Options

__all__ = [
    "BALLS",
    "MEASURES",
    "Cost",
    "Figure",
    "Landscape",
    "Measure",
    "Options",
    "Passes",
    "Progress",
    "between",
    "cost",
    "flatness",
    "landscape",
    "landscape_cost",
    "measure",
]
