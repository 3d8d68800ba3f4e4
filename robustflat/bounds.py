"""Bounds on settings, which stand in signatures: the schema of YAML reads them there."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Annotated, ParamSpec, TypeVar, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

NonNegative = Annotated[float, Ge(0)]
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
            for bound in bounds[name]:
                holds, sign, field = _MEANING[type(bound)]
                if not holds(value, getattr(bound, field)):
                    raise ValueError(
                        f"{function.__name__}'s {name} must be {sign} {getattr(bound, field)}, "
                        f"got {value!r}."
                    )
        return function(*args, **kwargs)

    return call
