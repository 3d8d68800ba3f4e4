"""Owns the grid: one checked run configuration, with its factors and name, for every point."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from robustflat.config import ConfigError, RunConfig, check_config
from robustflat.errors import UserError
from robustflat.flatness import cost
from robustflat.study.schema import StudyConfig

Keys = tuple[str | int, ...]
Places = dict[Keys, str]
# The index of a value for every key of the grid.
Chosen = dict[str, int]
Level = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a study.

    Attributes:
        name: of the run, made of its factors.
        factors: its level of every factor; None where it has none.
        config: the whole run.
    """

    name: str
    factors: dict[str, Level]
    config: RunConfig


def expand(study: StudyConfig, places: Places | None = None) -> list[Point]:
    """Every run of a study, checked.

    Runs use one CPU thread unless their configuration says otherwise, for several run at once.

    Args:
        study: with the base run as a mapping.
        places: where the keys stand: those below ("base",) in the base run, and ("grid", key, i).

    Raises:
        ConfigError: listing what is wrong, and with which grid points.
    """
    source = f"study {study.name}"
    root = str(Path(study.output) / study.name / "runs")
    wrong: dict[str, list[Chosen]] = defaultdict(list)
    points: list[Point] = []
    combinations = list(_combinations(study))
    for chosen in combinations:
        try:
            values, where = _values(study, chosen, places or {})
            config = check_config({**values, "name": "run", "output": root}, where, source)
        except ConfigError as error:
            for line in _lines(error):
                wrong[line].append(chosen)
            continue
        for line in _unmeasurable(study, config):
            wrong[line].append(chosen)
        levels = {f: _level(config, paths) for f, paths in study.factor_paths().items()}
        name = _name(levels)
        config = check_config({**config.model_dump(mode="json"), "name": name}, {}, source)
        points.append(Point(name=name, factors=levels, config=config))
    wrong = wrong or _indistinct(study, points, combinations)
    if wrong:
        count = len({tuple(chosen.values()) for found in wrong.values() for chosen in found})
        head = f"{source}: {count} of {len(combinations)} grid points cannot be run:"
        lines = [f"{line} [{_which(study, found)}]" for line, found in wrong.items()]
        raise ConfigError("\n".join([head, *lines]))
    return points


def _combinations(study: StudyConfig) -> Iterator[Chosen]:
    """For each point the index of its value for every key of the grid."""
    for indices in product(*(range(len(values)) for values in study.grid.values())):
        yield dict(zip(study.grid, indices, strict=True))


def _values(study: StudyConfig, chosen: Chosen, places: Places) -> tuple[dict[str, Any], Places]:
    """The base's values with a point's own put in, and where each of them stands."""
    values = {"threads": 1, **copy.deepcopy(study.base)}
    where = {keys[1:]: place for keys, place in places.items() if keys[0] == "base"}
    for key, index in chosen.items():
        keys = tuple(key.split("."))
        stands = places.get(("grid", key, index), f"grid.{key}")
        _put(values, keys, copy.deepcopy(study.grid[key][index]), stands)
        where = {k: place for k, place in where.items() if k[: len(keys)] != keys}
        where |= {
            (*keys, *k[3:]): place for k, place in places.items() if k[:3] == ("grid", key, index)
        }
        where.setdefault(keys, stands)
    return values, where


def _put(values: dict[str, Any], keys: tuple[str, ...], value: Any, place: str) -> None:
    target = values
    for depth, key in enumerate(keys[:-1]):
        inner = target.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"  {place}: {'.'.join(keys)} goes below {'.'.join(keys[: depth + 1])}, which is "
                f"{inner!r} and has no keys of its own."
            )
        target = inner
    target[keys[-1]] = value


def _unmeasurable(study: StudyConfig, config: RunConfig) -> list[str]:
    """What would only be found out after the training."""
    problems = []
    if config.threat is None:
        problems.append(
            "  attack is none, so there is no norm and eps to measure a robust gap at. Configure "
            "an attack; objective standard trains on clean images all the same."
        )
    else:
        options: dict[str, Any] = dict(config.flatness.options)
        try:
            cost(
                study.measures,
                1,
                eps=config.threat[1],
                norm=config.threat[0],
                **options,
            )
        except UserError as error:
            problems.append(f"  flatness.options: {error}")
    return problems


def _level(config: RunConfig, paths: tuple[str, ...]) -> Level:
    """What the configuration has at the first of the paths that it has."""
    for path in paths:
        value: Any = config.model_dump(mode="json")
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return _scalar(value)
    return None


def _scalar(value: Any) -> Level:
    return value if isinstance(value, (str, int, float)) else _short(value)


def _name(levels: Mapping[str, Level]) -> str:
    """Such as awp-strength0.01-seed0: texts stand for themselves, numbers follow their factor."""
    parts = [
        level if isinstance(level, str) else f"{factor}{plain(level).replace('+', '')}"
        for factor, level in levels.items()
        if level is not None
    ]
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-._")
    return text or "run"


def plain(level: Level) -> str:
    """A level as people write it."""
    return f"{level:.6g}" if isinstance(level, float) else str(level)


def _indistinct(
    study: StudyConfig, points: list[Point], combinations: list[Chosen]
) -> dict[str, list[Chosen]]:
    """Factors that no run has; else points that no factor distinguishes."""
    alike: dict[str, list[Chosen]] = defaultdict(list)
    for point, chosen in zip(points, combinations, strict=True):
        alike[point.name].append(chosen)
    unknown = {
        f"  factors.{factor}: no run has {' or '.join(paths)}. Check the key path.": combinations
        for factor, paths in study.factors.items()
        if all(point.factors[factor] is None for point in points)
    }
    return unknown or {
        f"  all factors ({', '.join(study.factor_paths())}) are the same, {name}. Name what "
        "differs under factors, as in factors: {steps: weights.steps}, or remove one.": found
        for name, found in alike.items()
        if len(found) > 1
    }


def _which(study: StudyConfig, found: list[Chosen]) -> str:
    """These grid points in words, without the keys whose value does not matter."""
    kept = list(study.grid)
    for key in study.grid:
        rest = [k for k in kept if k != key]
        fewer = {tuple(chosen[k] for k in rest) for chosen in found}
        if len({tuple(c[k] for k in kept) for c in found}) == len(fewer) * len(study.grid[key]):
            kept = rest
    if not kept:
        return "all grid points"
    titles = dict.fromkeys(
        ", ".join(f"{k}={_short(study.grid[k][chosen[k]])}" for k in kept) for chosen in found
    )
    return "; ".join(titles)


def _lines(error: ConfigError) -> list[str]:
    first, *rest = str(error).splitlines()
    return rest or [first]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + " ".join(f"{k}={_short(v)}" for k, v in value.items()) + ")"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
