"""The kinds of value a configuration holds, and how YAML's spellings of them are read."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from robustflat.errors import nearest

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


def read_word(text: Any) -> Any:
    """The whole number, number, fraction or truth value that a word is; else the word itself."""
    for read in (int, read_number):
        try:
            return read(text) if isinstance(text, str) else text
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


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


def _whole(value: Any) -> Any:
    if isinstance(value, (bool, str)):
        raise ValueError("must be a whole number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("must be a whole number of at most 18 digits")
    return value


Number = Annotated[float, BeforeValidator(read_number), Field(allow_inf_nan=False)]
Integer = Annotated[int, BeforeValidator(_whole)]
NonNegative = Annotated[Number, Ge(0)]
Positive = Annotated[Number, Gt(0)]
Share = Annotated[Number, Ge(0), Le(1)]
Whole = Annotated[Integer, Ge(0)]
Count = Annotated[Integer, Ge(1)]
NormName = Annotated[str | float, BeforeValidator(read_norm)]

# References can make a value far larger than its text.
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxlong, _REPR.maxother = 2, 80, 80, 80


def short(value: Any) -> str:
    """A value as messages show it."""
    text = _REPR.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def problem(
    kind: str, text: str, loc: tuple[str | int, ...] = (), got: Any = None
) -> InitErrorDetails:
    """A problem at ``loc``; of kind "rule" if the text says itself which keys it speaks of."""
    told = PydanticCustomError(kind, "{text}", {"text": text})
    return InitErrorDetails(type=told, loc=loc, input={} if got is None else got)


def problems(details: list[InitErrorDetails]) -> ValidationError:
    """One error of all these."""
    return ValidationError.from_exception_data("configuration", details)


class Section(BaseModel):
    """One mapping of the configuration: unknown keys are errors, values are never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    # Keys of earlier versions, and how what they said is written now.
    moved: ClassVar[dict[str, str]] = {}
    # Keys that one may look for, and where that is to be had.
    elsewhere: ClassVar[dict[str, str]] = {}

    @model_validator(mode="wrap")
    @classmethod
    def _say_which_keys_there_are(cls, values: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(values)
        except ValidationError as error:
            found = error.errors(include_url=False)
        told = []
        for one in found:
            kind, loc, got = one["type"], one["loc"], one["input"]
            text = one.get("ctx", {}).get("text", one["msg"])
            if kind == "extra_forbidden" and len(loc) == 1:
                kind, text = "unknown_key", cls._about_unknown(str(loc[0]), got)
            told.append(problem(kind, text, loc, got))
        raise problems(told)

    @classmethod
    def _about_unknown(cls, key: str, got: Any) -> str:
        if key in cls.moved:
            return f"has moved. {cls.moved[key]}"
        if key in cls.elsewhere:
            return f"is no setting. {cls.elsewhere[key]}"
        valid = sorted(cls.model_fields)
        hint = nearest(key, valid) or f" Valid keys: {', '.join(valid)}."
        said = "" if isinstance(got, dict) else f" (got {short(got)})"
        return f"is not a known key{said}.{hint}"
