"""Owns the reading of a study from YAML: its base run put in, every problem with its place."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from robustflat.config import ConfigError
from robustflat.config.reading import _apply as apply_override
from robustflat.config.reading import _explain as explain
from robustflat.config.reading import _parse as parse
from robustflat.study.grid import Places, expand
from robustflat.study.schema import StudyConfig


def read_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read and check a study with all its grid points; nothing is trained.

    Args:
        path: a YAML file; a ``base`` in it that is a path is relative to it.
        overrides: "key.path=value" each, as for a run; those below ``base.`` change the base run.

    Returns:
        The study, its base run a mapping.

    Raises:
        ConfigError: naming every problem with its file and line.
    """
    path = Path(path)
    values, places = parse(_text(path), str(path))
    for override in overrides:
        if not override.startswith("base."):
            apply_override(override, values, places)
    if isinstance(values.get("base"), str):
        base = path.parent / values["base"]
        values["base"], below = parse(_text(base, f" (the base of {path})"), str(base))
        places |= {("base", *keys): place for keys, place in below.items()}
    for override in overrides:
        if override.startswith("base."):
            apply_override(override, values, places)
    study = check_study(values, places, str(path))
    expand(study, places)
    return study


def check_study(
    values: dict[str, Any], places: Places | None = None, source: str = "study"
) -> StudyConfig:
    """Check already parsed values, but for the grid points.

    Args:
        values: as YAML gives them.
        places: where each key stands, for messages.
        source: what to call a key whose place is not known.

    Raises:
        ConfigError: naming every problem.
    """
    try:
        return StudyConfig.model_validate(values)
    except ValidationError as error:
        lines = [_line(problem, places or {}, source) for problem in error.errors()]
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise ConfigError("\n".join([f"{source} has {count}:", *lines])) from None


def _line(problem: Any, places: Places, source: str) -> str:
    if problem["type"] != "extra_forbidden":
        return explain(problem, places, source)
    (key,) = problem["loc"]
    valid = sorted(StudyConfig.model_fields)
    near = difflib.get_close_matches(str(key), valid, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Valid keys: {', '.join(valid)}."
    return f"  {places.get((key,), source)}: {key} is not a known key. {hint}"


def _text(path: Path, what: str = "") -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"There is no configuration file {path}{what}. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The configuration {path}{what} cannot be read as text: {error}. Check the file."
        ) from None
