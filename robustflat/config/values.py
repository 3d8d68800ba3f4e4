"""The kinds of value a configuration holds, and how YAML's spellings of them are read."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_FRACTION = re.compile(rf"\s*({_NUMBER})\s*/\s*({_NUMBER})\s*")


def read_number(value: Any) -> Any:
    """A float from a number, from text such as "2e-3" (text to YAML 1.1) or a fraction "8/255".

    Raises:
        ValueError: for booleans, other text, and fractions over zero.
    """
    if isinstance(value, bool):
        raise ValueError("must be a number, not a boolean")
    if isinstance(value, str):
        fraction = _FRACTION.fullmatch(value)
        if fraction:
            over, under = (float(part) for part in fraction.groups())
            if under == 0:
                raise ValueError("is a fraction over zero")
            return over / under
        if not re.fullmatch(_NUMBER, value.strip()):
            raise ValueError("must be a number or a fraction such as 8/255")
        return float(value)
    return value


def read_norm(value: Any) -> Any:
    """The name of a norm, or its exponent p as a number."""
    if isinstance(value, str) and value.lower() in ("linf", "l2", "l1"):
        return value.lower()
    if value == math.inf:
        return "linf"
    try:
        p = float(read_number(value))
    except (ValueError, TypeError, OverflowError):
        p = math.nan
    if not p >= 1:
        raise ValueError("must be linf, l2, l1 or a number p >= 1")
    return p


def _not_boolean(value: Any) -> Any:
    if isinstance(value, (bool, str)):
        raise ValueError("must be a whole number")
    return value


Number = Annotated[float, BeforeValidator(read_number), Field(allow_inf_nan=False)]
NonNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Whole = Annotated[int, BeforeValidator(_not_boolean), Field(ge=0)]
Count = Annotated[int, BeforeValidator(_not_boolean), Field(ge=1)]
Norm = Annotated[str | float, BeforeValidator(read_norm)]


class Section(BaseModel):
    """One mapping of the configuration: unknown keys are errors, values are never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
