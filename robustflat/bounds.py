"""Bounds on the settings of presets, which the schema of YAML reads off their signatures."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Le(1)]
Inside = Annotated[float, Gt(0), Lt(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Whole = Annotated[int, Ge(0)]
Count = Annotated[int, Ge(1)]
