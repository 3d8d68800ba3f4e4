"""Reading a configuration: YAML with line numbers, overrides, and all errors at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from robustflat.config.choice import choices
from robustflat.config.schema import RunConfig
from robustflat.config.values import short
from robustflat.errors import UserError
from robustflat.files import write_whole

Path_ = tuple[str | int, ...]
Schema = TypeVar("Schema", bound=BaseModel)

# Where a name says which keys there are.
_CHOSEN = dict(choices(RunConfig))


class ConfigError(UserError):
    """A configuration that cannot be used; the message has one line for every problem."""


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run's configuration.

    Args:
        path: a YAML file.
        overrides: "key.path=value" each; the value is read as YAML and replaces what the file
            says, whole mappings included.

    Raises:
        ConfigError: naming every problem with its file, line and column, and the nearest valid
            key.
    """
    path = Path(path)
    values, places = parse(read_text(path), str(path))
    # Names first: a key said before its section's name is one of that name all the same.
    for override in sorted(overrides, key=lambda o: not _names_a_section(o)):
        apply_override(override, values, places)
    return check_config(values, places, str(path))


def read_text(path: Path, what: str = "") -> str:
    """The text of a configuration.

    Args:
        path: the file.
        what: said of it in messages, such as " (the base of x.yaml)".

    Raises:
        ConfigError: if it is missing or no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"There is no configuration file {path}{what}. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The configuration {path}{what} cannot be read as text: {error}. Check the file."
        ) from None


def check_config(
    values: dict[str, Any], places: dict[Path_, str] | None = None, source: str = "configuration"
) -> RunConfig:
    """Check already parsed values.

    Args:
        values: as YAML gives them.
        places: where each key path stands, for messages.
        source: what to call a key whose place is not known.

    Raises:
        ConfigError: naming every problem.
    """
    return validated(RunConfig, values, places or {}, source)


def validated(schema: type[Schema], values: Any, places: dict[Path_, str], source: str) -> Schema:
    """``values`` as ``schema`` reads them.

    Args:
        schema: of the whole.
        values: as YAML gives them.
        places: where each key path stands, for messages.
        source: what to call a key whose place is not known.

    Raises:
        ConfigError: naming every problem, a line each, with its place and the nearest valid key.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise explained(error, source, places) from None


def explained(
    error: ValidationError, source: str, places: Mapping[Path_, str] | None = None
) -> ConfigError:
    """What pydantic found, a line for each problem; the arguments are those of `validated`."""
    lines = [_explain(problem, places or {}, source) for problem in error.errors()]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return ConfigError("\n".join([f"{source} has {count}:", *lines]))


def write_config(config: RunConfig, path: Path) -> None:
    """Write every key, defaults included, so that the file says all that the run used."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_whole(path, text)


def parse(text: str, source: str) -> tuple[dict[str, Any], dict[Path_, str]]:
    """The values of a YAML mapping, and where each key path stands.

    Raises:
        ConfigError: if it is no YAML, no mapping, or a key stands twice.
    """
    node, values = _load(text, source)
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise ConfigError(
            f"{source}: a configuration is a mapping of keys to values, and this file holds "
            f"{found}. See the files in configs/."
        )
    places: dict[Path_, str] = {}
    _note_places(node, (), places, source)
    return values, places


def _load(text: str, source: str) -> tuple[yaml.Node | None, Any]:
    """The nodes and the values of a text."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        what = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(f"{where}: this is not valid YAML: {what}.") from None
    except RecursionError:
        raise ConfigError(f"{source}: this YAML is nested too deeply to be read.") from None
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        # PyYAML's constructors raise these themselves, for a date such as 2020-13-45.
        raise ConfigError(
            f"{source}: a value in this YAML cannot be read: {error}. Quote it if it is text."
        ) from None


def _note_places(node: yaml.Node | None, at: Path_, places: dict[Path_, str], source: str) -> None:
    problems = [] if node is None else list(_walk(node, at, places, source, {}))
    if problems:
        raise ConfigError("\n".join(problems))


def _walk(
    node: yaml.Node, at: Path_, places: dict[Path_, str], source: str, seen: dict[int, bool]
) -> Iterator[str]:
    """Note the place of every key, and yield a sentence for each key that stands twice.

    A node may stand in several places, by reference, and is walked once; ``seen`` says of each
    whether that is still going on.
    """
    if id(node) in seen:
        if seen[id(node)]:
            yield f"{places.get(at, source)}: {_dotted(at)} contains itself. Write it out."
        return
    seen[id(node)] = True
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, key.value)
            place = f"{source}:{key.start_mark.line + 1}:{key.start_mark.column + 1}"
            if here in places:
                yield (
                    f"{place}: {_dotted(here)} stands twice (first at {places[here]}), and YAML "
                    "would keep only the last. Remove one."
                )
            places[here] = place
            yield from _walk(value, here, places, source, seen)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            here, mark = (*at, i), value.start_mark
            places[here] = f"{source}:{mark.line + 1}:{mark.column + 1}"
            yield from _walk(value, here, places, source, seen)
    seen[id(node)] = False


def apply_override(override: str, values: dict[str, Any], places: dict[Path_, str]) -> None:
    """Put "key.path=value" into ``values``.

    Another ``name`` replaces the keys of a section that belong to its name.

    Raises:
        ConfigError: if it is not of that form, or goes below what is no mapping.
    """
    name, equals, text = override.partition("=")
    keys = tuple(name.split("."))
    if not equals or not all(keys):
        raise ConfigError(
            f"The override {override!r} is not of the form key.path=value, such as "
            "train.epochs=10 or 'weights={name: sam, rho: 0.1}'."
        )
    try:
        node, value = _load(text, override)
    except ConfigError:
        raise ConfigError(
            f"The value of the override {override!r} is not valid YAML. Quote it for the shell, "
            "and write mappings as '{key: value}'."
        ) from None
    _note_places(node, keys, {}, f"override {override}")
    if _names_a_section(override):
        keys, value = keys[:-1], _renamed(keys[:-1], value, values)
    target = values
    for depth, key in enumerate(keys[:-1]):
        inner = target.get(key)
        if inner is None:
            inner = {}
        if isinstance(inner, str) and keys[: depth + 1] in _CHOSEN:
            inner = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"The override {override!r} goes below {'.'.join(keys[: depth + 1])}, which is "
                f"{inner!r} and has no keys of its own."
            )
        # A copy, because another key may refer to the same mapping.
        target[key] = target = dict(inner)
    target[keys[-1]] = value
    for place in [p for p in places if p[: len(keys)] == keys]:
        del places[place]
    places[keys] = f"override {override}"


def _names_a_section(override: str) -> bool:
    keys = tuple(override.partition("=")[0].split("."))
    return keys[-1] == "name" and keys[:-1] in _CHOSEN


def _renamed(at: Path_, name: Any, values: dict[str, Any]) -> Any:
    """The section at ``at`` under another name: what every name of the kind has stays."""
    found: Any = values
    for key in at:
        found = found.get(key) if isinstance(found, dict) else None
    before = {"name": found} if isinstance(found, str) else found
    if not isinstance(before, dict) or before.get("name") == name:
        return {**(before if isinstance(before, dict) else {}), "name": name}
    common = _CHOSEN[tuple(map(str, at))].base.model_fields
    return {k: v for k, v in before.items() if k in common} | {"name": name}


def _explain(problem: Any, places: Mapping[Path_, str], source: str) -> str:
    """One line: place, key, what is wrong and what was got."""
    keys: Path_ = problem["loc"]
    where = source
    for length in range(len(keys), 0, -1):
        if keys[:length] in places:
            where = places[keys[:length]]
            break
    kind, got = problem["type"], problem["input"]
    message = problem.get("ctx", {}).get("text", problem["msg"])
    message = message.removeprefix("Value error, ").rstrip(".")
    if kind == "missing":
        return f"  {where}: {_dotted(keys)} is required and missing."
    if kind in ("unknown_key", "unknown_name"):
        return f"  {where}: {_dotted(keys)} {message if message.endswith('?') else message + '.'}"
    if kind == "rule" or not keys:
        return f"  {where}: {message}."
    said = f" (got {short(got)})" if not isinstance(got, dict) else ""
    separator = " " if message.startswith(("must", "is ")) else ": "
    return f"  {where}: {_dotted(keys)}{separator}{message}{said}."


def _dotted(keys: Path_) -> str:
    return ".".join(str(key) for key in keys)
