"""Owns the schema of a study: a base run, a grid over it, and what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from robustflat.config.schema import FlatnessConfig, Measure
from robustflat.config.values import Count, NonNegative, Section, Whole
from robustflat.errors import nearest
from robustflat.study.ranking import SEED
from robustflat.study.targets import ATTACKED, TARGETS

# Where each weight perturbation keeps its size.
STRENGTHS = (
    "weights.gamma", "weights.epsilon", "weights.rho", "weights.radius", "weights.inner.rho",
    "weights.inner.gamma",
)  # fmt: skip
METHOD, STRENGTH = "method", "strength"
# Given by the study itself.
_OWN = ("name", "output")


def paths(key: str) -> list[str]:
    """The key paths of a grid's key: one, or several that are set together."""
    return [path.strip() for path in key.split(",")]


def _known_target(name: str) -> str:
    if name not in TARGETS:
        hint = nearest(name, TARGETS, 3)
        raise ValueError(f"is no target.{hint} Targets: {', '.join(TARGETS)}")
    return name


def _base(value: Any) -> Any:
    if not isinstance(value, (str, dict)):
        raise ValueError("must be the path of a run's configuration or a mapping")
    return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, dict)) else value


Paths = Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]
Block = Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]


class ThreatConfig(Section):
    """The ball in which every run is attacked when it is measured."""

    norm: str
    eps: NonNegative


class Walks(Section):
    """A part of a grid that is too large: random walks of ``walks`` starts (Morris 1991).

    A walk changes every key once, in random order, each time to another value, those that were used
    least first. So any first few walks use all values about equally, and every walk has one pair of
    configurations for each key that differ in that key alone. Seeds are all run everywhere.
    """

    walks: Count
    seed: Whole = 0


class StudyConfig(Section):
    """A grid of runs, and what is ranked by what.

    ``grid`` maps key paths of a run's configuration to the values that they take; every combination
    is one run. A key of several paths, ``optimizer.name, optimizer.lr``, takes listed combinations,
    ``[[sgd, 0.1], [adamw, 0.001]]``. A list of such mappings is the union of their combinations.
    ``design`` runs a part of a grid that is one mapping.

    ``factors`` names what distinguishes the runs: each is read off a run's configuration at the
    first of its key paths that is there (and is none otherwise). ``nested`` says which factor has a
    meaning only within a level of another. Left out, the factors are the method and the strength
    (nested in it) of the weight perturbation, and every other key of the grid.

    Everything is measured at the last checkpoint, on un-augmented training and on test images, with
    ``attack`` in the ball of ``threat`` (that of the training attack if left out). ``attacks`` are
    run on test images beside it, and give the target ``attacked_accuracy``.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output: str = "runs"
    base: Annotated[Any, BeforeValidator(_base)]
    grid: Annotated[tuple[Block, ...], BeforeValidator(_as_list), Field(min_length=1)]
    design: Walks | None = None
    factors: dict[str, Paths] = Field(default_factory=dict)
    nested: dict[str, str] = Field(default_factory=dict)
    measures: Annotated[tuple[Measure, ...], Field(min_length=1)] = FlatnessConfig().measures
    targets: Annotated[
        tuple[Annotated[str, AfterValidator(_known_target)], ...], Field(min_length=1)
    ] = ("gap_robust_accuracy", "gap_robust_loss", "test_robust_accuracy")
    attack: Annotated[str, Field(pattern=r"^pgd-\d+(-\d+)?$")] = "pgd-20"
    attacks: tuple[str, ...] = ()
    threat: ThreatConfig | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> StudyConfig:
        problems = [
            f"grid.{path} cannot be varied: the study names its runs and puts them into its own "
            "folder. Remove it"
            for key in self.keys()
            for path in paths(key)
            if path in _OWN
        ]
        problems += [
            f"measures names {name} twice. Leave one of them out"
            for name in dict.fromkeys(self.measures)
            if self.measures.count(name) > 1
        ]
        for block in self.grid:
            for key, values in block.items():
                count = len(paths(key))
                wrong = [v for v in values if not isinstance(v, list) or len(v) != count]
                if count > 1 and wrong:
                    problems.append(
                        f"grid.{key} takes lists of {count} values, one for each path, got "
                        f"{wrong[0]!r}"
                    )
        if self.design is not None and len(self.grid) > 1:
            problems.append(
                "design walks through one mapping of keys, and grid is a list of "
                f"{len(self.grid)}. Make it one, or remove design"
            )
        if ATTACKED in self.targets and not self.attacks:
            problems.append(
                f"targets has {ATTACKED}, which nothing measures: name the attacks, as in attacks: "
                "[autoattack], or leave it out"
            )
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

    def keys(self) -> list[str]:
        """The keys of all blocks of the grid, in the order in which they come up."""
        return list(dict.fromkeys(key for block in self.grid for key in block))

    def factor_paths(self) -> dict[str, tuple[str, ...]]:
        """Each factor, and the key paths at which a run's configuration is asked for its level."""
        if self.factors:
            return _ordered(self.factors)
        found: dict[str, tuple[str, ...]] = {}
        keys = self.keys()
        ends = ["+".join(path.rpartition(".")[2] for path in paths(key)) for key in keys]
        for key, end in zip(keys, ends, strict=True):
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
