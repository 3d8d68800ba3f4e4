"""Owns the grid: one checked run configuration, with its factors and name, for every point."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any

from robustflat.config import ConfigError, RunConfig, check_config
from robustflat.errors import UserError
from robustflat.evaluate.threat import norm_name
from robustflat.flatness import cost
from robustflat.flatness.curvature import curvlinops
from robustflat.perturb import parse_norm
from robustflat.study.ranking import SEED
from robustflat.study.schema import StudyConfig, ThreatConfig, paths
from robustflat.study.walks import Chosen, varied, walks

Keys = tuple[str | int, ...]
Places = dict[Keys, str]
Level = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a study.

    Attributes:
        name: of the run, made of its factors.
        factors: its level of every factor; None where it has none.
        config: the whole run.
        threat: in which it is measured.
    """

    name: str
    factors: dict[str, Level]
    config: RunConfig
    threat: ThreatConfig


def size(study: StudyConfig) -> int:
    """How many combinations are run."""
    if study.design is not None:
        (block,) = study.grid
        return study.design.walks * (1 + len(varied(block))) * len(block.get(SEED, [None]))
    return sum(prod(len(values) for values in block.values()) for block in study.grid)


def expand(
    study: StudyConfig, places: Places | None = None, limit: int | None = None
) -> list[Point]:
    """Every run of a study, checked.

    Runs use one CPU thread unless their configuration says otherwise, for several run at once.

    Args:
        study: with the base run as a mapping.
        places: where the keys stand: those below ("base",) in the base run, and ("grid", block,
            key, i).
        limit: make only the first so many.

    Raises:
        ConfigError: listing what is wrong, and with which grid points.
    """
    source = f"study {study.name}"
    root = str(Path(study.output) / study.name / "runs")
    wrong: dict[str, list[Chosen]] = defaultdict(list)
    points: list[Point] = []
    told: dict[str, list[str]] = {}  # of all points alike but in their training
    combinations = list(islice(_combinations(study), limit))
    for chosen in combinations:
        try:
            values, where = _values(study, chosen, places or {})
            config = check_config({**values, "name": "run", "output": root}, where, source)
        except ConfigError as error:
            for line in _lines(error):
                wrong[line].append(chosen)
            continue
        threat = study.threat or _own_threat(config)
        alike = repr((threat, config.flatness.options))
        if alike not in told:
            told[alike] = _unmeasurable(study, config, threat)
        for line in told[alike]:
            wrong[line].append(chosen)
        if threat is None:
            continue
        levels = {
            factor: _level(config, _given(study, chosen), ways)
            for factor, ways in study.factor_paths().items()
        }
        name = _name(levels)
        named = config.model_copy(update={"name": name})
        points.append(Point(name=name, factors=levels, config=named, threat=threat))
    wrong = wrong or _indistinct(study, points, combinations) or _different(points, combinations)
    if wrong:
        count = len({chosen for found in wrong.values() for chosen in found})
        head = f"{source}: {count} of {len(combinations)} grid points cannot be run:"
        lines = [f"{line} [{_which(study, found)}]" for line, found in wrong.items()]
        raise ConfigError("\n".join([head, *lines]))
    return points


def _combinations(study: StudyConfig) -> Iterator[Chosen]:
    if study.design is not None:
        yield from walks(study.grid[0], study.design)
        return
    for number, block in enumerate(study.grid):
        for indices in product(*(range(len(values)) for values in block.values())):
            yield Chosen(number, dict(zip(block, indices, strict=True)))


def _given(study: StudyConfig, chosen: Chosen) -> dict[str, Any]:
    """What a combination sets, by the grid's key."""
    block = study.grid[chosen.block]
    return {key: block[key][index] for key, index in chosen.index.items()}


def _values(study: StudyConfig, chosen: Chosen, places: Places) -> tuple[dict[str, Any], Places]:
    """The base's values with a point's own put in, and where each of them stands."""
    values = {"threads": 1, **copy.deepcopy(study.base)}
    where = {keys[1:]: place for keys, place in places.items() if keys[0] == "base"}
    for key, value in _given(study, chosen).items():
        at = ("grid", chosen.block, key, chosen.index[key])
        stands = places.get(at, f"grid.{key}")
        ways = paths(key)
        for number, path in enumerate(ways):
            keys = tuple(path.split("."))
            below = at if len(ways) == 1 else (*at, number)
            _put(values, keys, copy.deepcopy(value if len(ways) == 1 else value[number]), stands)
            where = {k: place for k, place in where.items() if k[: len(keys)] != keys}
            where |= {
                (*keys, *k[len(below) :]): place
                for k, place in places.items()
                if k[: len(below)] == below
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


def _own_threat(config: RunConfig) -> ThreatConfig | None:
    """That of the training attack."""
    if config.threat is None:
        return None
    norm, eps = config.threat
    return ThreatConfig(norm=norm_name(parse_norm(norm)), eps=eps)


def _unmeasurable(study: StudyConfig, config: RunConfig, threat: ThreatConfig | None) -> list[str]:
    """What would only be found out after the training."""
    if threat is None:
        why = "  attack is none, so there is no norm and eps to measure a robust gap at."
        return [why + " Say them: threat: {norm: linf, eps: 8/255}."]
    options: dict[str, Any] = dict(config.flatness.options)
    try:
        cost(study.measures, 1, eps=threat.eps, norm=threat.norm, **options)
        if options.get("estimator", "hutchinson") != "hutchinson":
            curvlinops()
    except UserError as error:
        return [f"  flatness.options: {error}"]
    return []


def _level(config: RunConfig, given: Mapping[str, Any], ways: tuple[str, ...]) -> Level:
    """What the configuration has at the first of the paths that it has.

    A whole section that the grid sets is called as it is there, without the defaults.
    """
    whole = config.model_dump(mode="json")
    for way in ways:
        found = []
        for path in paths(way):
            value: Any = whole
            for key in path.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            found.append(value)
        if way in given and (len(found) > 1 or isinstance(given[way], dict)):
            return _short(given[way])
        if any(value is not None for value in found):
            return _scalar(found[0]) if len(found) == 1 else _short(found)
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


def _different(points: list[Point], combinations: list[Chosen]) -> dict[str, list[Chosen]]:
    """Robustness in different balls is not one target."""
    if len({point.threat for point in points}) <= 1:
        return {}
    return {
        "  the training attacks have different norms or eps, in which robustness is no one target. "
        "Say one for all: threat: {norm: linf, eps: 8/255}.": combinations
    }


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
        if points and all(point.factors[factor] is None for point in points)
    }
    return unknown or {
        f"  all factors ({', '.join(study.factor_paths())}) are the same, {name}. Name what "
        "differs under factors, as in factors: {steps: weights.steps}, or remove one.": found
        for name, found in alike.items()
        if len(found) > 1
    }


def _which(study: StudyConfig, found: list[Chosen]) -> str:
    """These grid points in words, without the keys whose value does not matter."""
    titles: list[str] = []
    for number, block in enumerate(study.grid):
        here = [chosen.index for chosen in found if chosen.block == number]
        kept = list(block)
        for key in block:
            rest = [k for k in kept if k != key]
            fewer = {tuple(index[k] for k in rest) for index in here}
            if len({tuple(i[k] for k in kept) for i in here}) == len(fewer) * len(block[key]):
                kept = rest
        if here:
            titles += [
                ", ".join(f"{k}={_short(block[k][index[k]])}" for k in kept) for index in here
            ]
    return "; ".join(dict.fromkeys(title or "all grid points" for title in titles))


def _lines(error: ConfigError) -> list[str]:
    first, *rest = str(error).splitlines()
    return rest or [first]


def _short(value: Any) -> str:
    """A value as the grid's key is told it: a section by its name, then what else it says."""
    if isinstance(value, dict):
        named = [str(value["name"])] if "name" in value else []
        rest = [f"{k}={_short(v)}" for k, v in value.items() if k != "name"]
        return " ".join([*named, *rest])
    text = " ".join(map(_short, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
