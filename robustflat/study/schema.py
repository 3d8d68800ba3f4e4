"""Owns the schema of a study: a base run, a grid over it, and what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from robustflat.config.values import Section
from robustflat.flatness.measures import find

Target = Literal["robust_accuracy", "robust_loss", "clean_accuracy", "clean_loss"]
# Where each weight perturbation keeps its size.
STRENGTHS = ("weights.gamma", "weights.epsilon", "weights.rho", "weights.radius")
METHOD, STRENGTH, SEED = "method", "strength", "seed"
# Given by the study itself.
_OWN = ("name", "output")


def _known_measure(name: str) -> str:
    find(name)
    return name


def _base(value: Any) -> Any:
    if not isinstance(value, (str, dict)):
        raise ValueError("must be the path of a run's configuration or a mapping")
    return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]


class StudyConfig(Section):
    """A grid of runs, and what is ranked by what.

    ``grid`` maps key paths of a run's configuration to the values that they take; every
    combination is one run. ``factors`` names what distinguishes the runs: each is read off a run's
    configuration at the first of its key paths that is there (and is none otherwise). ``nested``
    says which factor has a meaning only within a level of another. Left out, the factors are the
    method and the strength (nested in it) of the weight perturbation, and every other key of the
    grid.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output: str = "runs"
    base: Annotated[Any, BeforeValidator(_base)]
    grid: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]
    factors: dict[str, Paths] = Field(default_factory=dict)
    nested: dict[str, str] = Field(default_factory=dict)
    measures: Annotated[
        tuple[Annotated[str, AfterValidator(_known_measure)], ...], Field(min_length=1)
    ] = ("worst_clean", "worst_robust", "average_clean", "average_robust")
    attacks: tuple[str, ...] = ("pgd-20",)
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = ("robust_accuracy", "robust_loss")

    @model_validator(mode="after")
    def _fits_together(self) -> StudyConfig:
        problems = [
            f"grid.{key} cannot be varied: the study names its runs and puts them into its own "
            "folder. Remove it"
            for key in self.grid
            if key in _OWN
        ]
        problems += [
            f"nested.{inner} is {outer!r}, and both must be factors: "
            f"{', '.join(self.factor_paths()) or 'there are none'}"
            for inner, outer in self.nested.items()
            if not {inner, outer} <= set(self.factor_paths())
        ]
        for start in self.nested:
            seen = [start]
            while seen[-1] in self.nested and len(seen) <= len(self.nested):
                seen.append(self.nested[seen[-1]])
            if len(seen) > len(self.nested):
                problems.append(f"nested.{start} is nested in itself. Remove one of the two")
                break
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def factor_paths(self) -> dict[str, tuple[str, ...]]:
        """Each factor, and the key paths at which a run's configuration is asked for its level."""
        if self.factors:
            return _ordered(self.factors)
        found: dict[str, tuple[str, ...]] = {}
        ends = [key.rpartition(".")[2] for key in self.grid]
        for key, end in zip(self.grid, ends, strict=True):
            if key == "weights" or (key in STRENGTHS or key == "weights.name"):
                found.setdefault(METHOD, ("weights.name",))
                found.setdefault(STRENGTH, STRENGTHS)
            else:
                unique = ends.count(end) == 1 and end not in ("name", METHOD, STRENGTH)
                found[end if unique else key] = (key,)
        return _ordered(found)

    def nesting(self) -> dict[str, str]:
        """Which factor is nested in which; a strength in its method unless something is said."""
        both = {METHOD, STRENGTH} <= set(self.factor_paths())
        return dict(self.nested) or ({STRENGTH: METHOD} if both else {})


def _ordered(factors: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The same order whatever that of the file, for runs are named by their factors and found again
    by their names: method and strength first, the seed last.
    """  # noqa: D205
    rank = {METHOD: 0, STRENGTH: 1, SEED: 3}
    return {name: factors[name] for name in sorted(factors, key=lambda f: (rank.get(f, 2), f))}
