"""Bounds on settings, which stand in signatures: the schema of YAML reads them there."""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable
from typing import Annotated, Any, ParamSpec, TypeVar, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

NonNegative = Annotated[float, Ge(0)]
Weight = Annotated[float, Ge(0), Lt(math.inf)]  # of a term in a sum
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Le(1)]
Inside = Annotated[float, Gt(0), Lt(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Whole = Annotated[int, Ge(0)]
Count = Annotated[int, Ge(1)]

P = ParamSpec("P")
R = TypeVar("R")
_MEANING = {
    Ge: (operator.ge, ">=", "ge"),
    Gt: (operator.gt, ">", "gt"),
    Le: (operator.le, "<=", "le"),
    Lt: (operator.lt, "<", "lt"),
}


def refuse(of: str, name: str, value: Any, bounds: Iterable[object]) -> None:
    """Refuse a value outside bounds.

    Raises:
        ValueError: naming the argument and its bound.
    """
    for bound in bounds:
        holds, sign, field = _MEANING[type(bound)]
        if not holds(value, getattr(bound, field)):
            raise ValueError(
                f"{of}'s {name} must be {sign} {getattr(bound, field)}, got {value!r}."
            )


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function refuse arguments outside the bounds of its annotations.

    Raises:
        ValueError: at a call, naming the argument and its bound.
    """
    hints = get_type_hints(function, include_extras=True)
    bounds = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            refuse(function.__name__, name, value, bounds[name])
        return function(*args, **kwargs)

    return call
