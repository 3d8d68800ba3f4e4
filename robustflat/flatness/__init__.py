"""How flat the weight landscape is: sharpness, curvature, mechanism."""

from robustflat.flatness.decorator import MEASURES, Measure, measure
from robustflat.flatness.figure import Cost, Figure, Passes, Progress
from robustflat.flatness.measuring import cost, flatness
from robustflat.flatness.options import Options

__all__ = [
    "MEASURES", "Cost", "Figure", "Measure", "Options", "Passes", "Progress", "cost", "flatness",
    "measure",
]  # fmt: skip
