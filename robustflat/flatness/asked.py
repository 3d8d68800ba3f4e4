"""Owns what is asked for: measures by name, each with its options; presets and sweeps."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from robustflat.config.schema import ATTACK
from robustflat.config.values import read_word
from robustflat.errors import UserError
from robustflat.evaluate.attacks.ascent import title
from robustflat.evaluate.threat import Threat
from robustflat.flatness.closure import attack_of
from robustflat.flatness.decorator import Measure
from robustflat.flatness.measures import find
from robustflat.flatness.options import Options, with_options
from robustflat.perturb import InputPerturbation, parse_norm


def settle(
    measures: Sequence[str],
    eps: float | None,
    norm: str | float,
    attack: InputPerturbation | str | None,
    given: Mapping[str, Any],
    usual_attack: str = ATTACK,
) -> dict[Measure, Options]:
    """Each measure's options: the defaults, a preset's changes, then the user's.

    A measure that is asked for with several values of an option that acts on it comes once for
    each, and then, as a preset that was changed, it says so in its name.

    Raises:
        UserError: if a measure or option is unknown or impossible.
    """
    if isinstance(measures, str):
        measures = [measures]
    if not measures:
        raise UserError("No flatness measure was asked for. See `robustflat list measures`.")
    try:
        if isinstance(attack, InputPerturbation):
            eps, chosen = eps or 0.0, attack
        else:
            threat = Threat.said(norm, eps)
            eps, chosen = threat.eps, attack_of(attack or usual_attack, threat)
        base = Options(attack=chosen)
        settings: dict[str, tuple[Measure, Options]] = {}
        for spec in measures:
            measure, own = find(spec), _said(spec.partition(" with ")[2])
            changes = dict(measure.changes)
            if measure.attack is not None and attack is None:
                changes["attack"] = measure.attack(parse_norm(norm), eps)
            published = with_options(base, changes)
            for values, swept in _points(measure, {**given, **own}):
                options = with_options(published, values)
                shown = [key for key in sorted(values) if key in swept or key in own]
                if measure.preset:
                    shown = [
                        key for key in sorted(values)
                        if measure.heeds(key) and getattr(options, key) != getattr(published, key)
                    ]  # fmt: skip
                label = [f"{key}={values[key]}" for key in shown]
                if measure.attack is not None and attack is not None:
                    label.append(f"attack={title(chosen)}")
                name = called(measure.name, label)
                settings.setdefault(name, (replace(measure, name=name), options))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    return dict(settings.values())


def called(name: str, settings: Sequence[str]) -> str:
    """A measure with further settings, by alphabet: "worst_clean with radius=0.1, steps=5"."""
    bare, _, before = name.partition(" with ")
    together = sorted([*re.split(r", (?=\w+=)", before), *settings] if before else settings)
    return f"{bare} with {', '.join(together)}" if together else name


def _points(
    measure: Measure, given: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Every setting of the options that were given, and which of them are swept."""
    swept: dict[str, list[Any]] = {}
    for key, value in given.items():
        if isinstance(value, list | tuple):
            if not value:
                raise UserError(f"{key} is to be swept over no value. Say at least one.")
            swept[key] = list(dict.fromkeys(value)) if measure.heeds(key) else [value[0]]
    named = [key for key in swept if measure.heeds(key)]
    for values in itertools.product(*swept.values()):
        yield {**given, **dict(zip(swept, values, strict=True))}, named


def _said(text: str) -> dict[str, Any]:
    """The options of "radius=0.1, ball=row"."""
    said: dict[str, Any] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(
                f"A measure's own options are written as in 'worst_clean with radius=0.1, steps=5',"
                f" got {text!r}."
            )
        said[key] = read_word(value)
    return said
