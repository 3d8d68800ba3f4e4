"""Sections made from what they build: a callable's arguments, bounds, defaults and docstring."""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Callable, Iterator
from functools import cache
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BaseModel, GetCoreSchemaHandler, create_model, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema
from torch import Tensor
from typing_extensions import Self

from robustflat import registry
from robustflat.config.values import (
    Integer,
    NormName,
    Number,
    Section,
    problem,
    problems,
    short,
)
from robustflat.errors import UserError
from robustflat.perturb import WeightPerturbation
from robustflat.perturb.ball import Norm
from robustflat.plugins import is_plugin
from robustflat.registry import Kind


class Built(Section):
    """A section that stands for a call: ``name`` says of what, the other keys are its arguments."""

    name: str
    kind: ClassVar[Kind]
    own: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:  # the keys are known only from the signature

        def __getattr__(self, key: str) -> Any:
            """The value of a key."""

    def build(self, **offered: Any) -> Any:
        """Make what the section stands for.

        Args:
            **offered: what the caller gives beside the keys, where the callable takes it.

        Raises:
            UserError: if a function of the user's makes something else.
        """
        factory = self.kind.find(self.name)
        taken = inspect.signature(factory).parameters
        own = {key: getattr(self, key) for key in self.own}
        given = {k: v for k, v in offered.items() if k in taken}
        given |= {k: v.build() if isinstance(v, Built) else v for k, v in own.items()}
        try:
            built = factory(**given)
        except ValueError:  # which says what is wrong
            raise
        except Exception as error:
            raise UserError(
                f"{self.name} could not be made: {type(error).__name__}: {error}."
            ) from error
        lacks = [needed for needed in self.kind.needs if not hasattr(built, needed)]
        if lacks and not (built is None and self.name == "none"):
            raise UserError(
                f"{self.name} must return {self.kind.one}s, which have {', '.join(self.kind.needs)}"
                f", got {type(built).__name__} without {', '.join(lacks)}."
            )
        return built

    @model_validator(mode="after")
    def _can_be_built(self) -> Self:
        self.check()
        return self

    def check(self) -> None:
        """Build once, so that what cannot work is told of before anything runs.

        Raises:
            ValueError: saying what.
        """
        self.build()


class Choice:
    """In an annotation: a section, or the bare name, of one of the things of a kind.

    Args:
        kind: where the names are.
        base: what every section of the kind has.
        unnamed: the name where a mapping gives none; None requires one.
    """

    def __init__(self, kind: Kind, base: type[Built] = Built, unnamed: str | None = None) -> None:
        self.kind, self.base, self.unnamed = kind, base, unnamed

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Let pydantic read it."""
        return core_schema.no_info_plain_validator_function(
            self.read,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda section: section.model_dump(mode="json")
            ),
        )

    def read(self, value: Any) -> Built:
        """The section that a value of YAML, or a default, stands for."""
        if isinstance(value, Built):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict):
            raise ValueError("must be a name or a mapping")
        name = value.get("name", self.unnamed)
        if name is None:
            raise problems([problem("missing", "Field required", ("name",))])
        if not isinstance(name, str):
            raise problems([problem("told", "must be a name", ("name",), name)])
        try:
            made = section(self.kind.find(name), name, self.kind, self.base)
        except UserError as error:
            raise problems([problem("unknown_name", str(error), ("name",))]) from None
        return made.model_validate({**value, "name": name})


@cache
def section(factory: Callable[..., Any], name: str, kind: Kind, base: type[Built]) -> type[Built]:
    """The section of one callable.

    Args:
        factory: whose signature is read.
        name: as YAML calls it.
        kind: what it makes.
        base: what the section has beside.
    """
    signature = inspect.signature(factory)
    hints = _hints(factory)
    keys: dict[str, Any] = {"name": (Literal[name], name)}
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.name in kind.offered:
            continue
        _check_key(name, parameter, base)
        default = ... if parameter.default is parameter.empty else parameter.default
        keys[parameter.name] = (_readable(hints.get(parameter.name, Any)), default)
    made = create_model(name, __base__=base, __doc__=inspect.getdoc(factory), **keys)
    made.kind, made.own = kind, tuple(k for k in keys if k != "name")
    return made


def _check_key(name: str, parameter: inspect.Parameter, base: type[Built]) -> None:
    """Refuse what a section cannot have as a key.

    Raises:
        UserError: if the name is taken, or the default is nothing that YAML can say.
    """
    if hasattr(base, parameter.name) or parameter.name in base.model_fields:
        raise UserError(
            f"{name} has an argument called {parameter.name}, which every section has a meaning "
            "for already. Rename it."
        )
    plain = (bool, int, float, str, tuple, list, dict, type(None))
    if parameter.default is not parameter.empty and not isinstance(parameter.default, plain):
        raise UserError(
            f"{name} has the default {short(parameter.default)} for {parameter.name}, which YAML "
            "cannot say. Use None, a number, a text or a list."
        )


def choices(
    schema: type[BaseModel], at: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Choice]]:
    """The key paths of a schema at which a :class:`Choice` stands, and which."""
    for key, field in schema.model_fields.items():
        found = choice_of(field)
        if found is not None:
            yield (*at, key), found
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from choices(field.annotation, (*at, key))


def choice_of(field: FieldInfo, *, in_lists: bool = False) -> Choice | None:
    """The choice that a field takes, where it is optional too; ``in_lists``: or a list of."""
    optional = get_origin(field.annotation) in (Union, types.UnionType)
    inner = get_args(field.annotation) if optional or in_lists else ()
    found = field.metadata + [m for a in inner for m in getattr(a, "__metadata__", ())]
    return next((m for m in found if isinstance(m, Choice)), None)


def plugins(value: Section, at: tuple[str, ...] = ()) -> dict[str, str]:
    """Every package.module:function that a configuration names, by its key path."""
    found: dict[str, str] = {}
    for key in type(value).model_fields:
        inner = getattr(value, key)
        for i, one in enumerate(inner) if isinstance(inner, tuple) else [(None, inner)]:
            here = (*at, key) if i is None else (*at, key, str(i))
            if isinstance(one, Section):
                found |= plugins(one, here)
            elif isinstance(one, str) and key in _NAMING and is_plugin(one):
                found[".".join(here).removesuffix(".name")] = one
    return found


# Keys whose text may be imported; no other is.
_NAMING = ("name", "measures", "flatness")


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function, or of a class's constructor."""
    try:
        if inspect.isclass(factory):
            of_class = get_type_hints(factory, include_extras=True)
            return of_class | get_type_hints(factory.__init__, include_extras=True)
        return get_type_hints(factory, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


def _readable(annotation: Any) -> Any:
    """The annotation with what YAML needs: fractions for floats, no booleans for whole numbers."""
    simple = {float: Number, int: Integer, Norm: NormName}
    if annotation in simple:
        return simple[annotation]
    if annotation is WeightPerturbation:
        return Annotated[Built, Choice(registry.weights)]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *bounds = arguments
        return operator.getitem(Annotated, (_readable(inner), *bounds))
    if origin in (Union, types.UnionType):
        return Union[tuple(_readable(a) for a in arguments if a is not Tensor)]  # noqa: UP007
    if origin in (tuple, list, dict):
        return origin[tuple(a if a is ... else _readable(a) for a in arguments)]
    if origin is Literal or annotation in (bool, str, type(None), Any):
        return annotation
    return Any
