"""Owns what a measure is, and the decorator that makes a function one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from robustflat.flatness.closure import attack_cost
from robustflat.flatness.figure import Figure, Passes
from robustflat.flatness.options import Options
from robustflat.flatness.presets import AttackOf
from robustflat.flatness.subject import LossKind, Subject

# Takes the subject, the options, the kind of loss and its own name.
Compute = Callable[[Subject, Options, LossKind, str], Figure | float]
C = TypeVar("C", bound=Compute)
# Passes; those that several measures share, by a key.
Cost = Passes | Callable[[Options, LossKind], Passes | dict[str, Passes]]

# Of one function by the loss that it is taken of: the ending of the measure's name.
SHARPNESS: dict[str, LossKind] = {
    "_clean": "clean", "_robust": "robust", "_robust_fixed": "robust_fixed",
}  # fmt: skip
CURVED: dict[str, LossKind] = {"": "clean", "_robust": "robust"}
FIXED: dict[str, LossKind] = {"": "clean", "_robust": "robust_fixed"}
_OF: dict[LossKind, str] = {
    "clean": "the clean loss",
    "robust": "the robust loss, examples remade at every weight",
    "robust_fixed": "the robust loss, examples held fixed",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Measure:
    """A measure by name.

    Attributes:
        name: as users call it.
        summary: one line.
        loss: which loss is measured.
        compute: measures it.
        cost: passes over the examples.
        uses: the options that act on it, beside ``examples``; all if None.
        curvature: whether it is defined in eval mode alone, so that a model in train mode is
            refused rather than measured in eval mode; its adversarial examples are held fixed.
        changes: a preset's options; options that the user gives override them.
        attack: a preset's attack; one that the user gives overrides it.
        split: the images that a preset is published for, "train" or "test".
        preset: whether its settings are somebody's; changed, it has another name.
    """

    name: str
    summary: str
    loss: LossKind
    compute: Compute
    cost: Cost
    uses: tuple[str, ...] | None = None
    curvature: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    attack: AttackOf | None = None
    split: str | None = None
    preset: bool = False

    @property
    def is_attacked(self) -> bool:
        """Whether the threat acts on it."""
        return self.loss != "clean" or "attack" in (self.uses or ())

    def heeds(self, option: str) -> bool:
        """Whether an option acts on it."""
        return option == "examples" or self.uses is None or option in self.uses

    def settings(self, options: Options) -> dict[str, Any]:
        """The options that act on it, ready for JSON; not ``examples``, of which fewer may be."""
        own = {f.name for f in fields(Options)} if self.uses is None else {*self.uses}
        own = own - {"attack", "examples"} | ({"attack"} if self.is_attacked else set())
        return {name: value for name, value in options.to_dict().items() if name in own}

    def jobs(self, options: Options) -> dict[str, Passes]:
        """What it costs, by keys that measures have in common where they share the work."""
        own = self.cost if isinstance(self.cost, Passes) else self.cost(options, self.loss)
        if isinstance(own, Passes):
            found = {self.name: own}
        else:
            found = {f"{key}/{self.loss}": passes for key, passes in own.items()}
        if self.loss == "robust_fixed" or (self.loss == "robust" and self.curvature):
            found[f"examples/{options.attack!r}"] = Passes(**attack_cost(options.attack))
        return found

    def run(self, subject: Subject, options: Options) -> Figure:
        """Measure ``subject``."""
        # Not with its settings in the name: all points of a sweep draw the same directions.
        found = self.compute(subject, options, self.loss, self.name.partition(" with ")[0])
        return found if isinstance(found, Figure) else Figure(value=float(found))


# All that are known by name, in the order in which they were written.
MEASURES: dict[str, Measure] = {}


def measure(
    name: str | None = None,
    *,
    loss: LossKind | Mapping[str, LossKind] = "clean",
    cost: Cost | None = None,
    uses: tuple[str, ...] | None = None,
    curvature: bool = False,
) -> Callable[[C], C]:
    """Make a function a measure.

    The function takes a :class:`~robustflat.flatness.subject.Subject`, :class:`Options`, the kind
    of loss and its own name, and returns a :class:`Figure` or a number. Its docstring's first line
    is what is said of it.

    Args:
        name: as users call it; left out, the function is called ``package.module:function``.
        loss: which loss it measures: "clean", "robust" or "robust_fixed"; or several, by the
            endings of the measures' names.
        cost: its passes over the examples, or what gives them from the options and the loss; none
            if None.
        uses: the options that act on it; all if None.
        curvature: whether a model in train mode is to be refused.
    """

    def decorate(compute: C) -> C:
        own = f"{compute.__module__}:{getattr(compute, '__qualname__', '')}"
        said = (compute.__doc__ or "").strip().partition("\n")[0]
        kinds: Mapping[str, LossKind] = {"": loss} if isinstance(loss, str) else loss
        made = [
            Measure(
                name=(own if name is None else name) + ending,
                summary=said if len(kinds) == 1 else f"{said.rstrip('.')}; of {_OF[kind]}",
                loss=kind,
                compute=compute,
                cost=Passes() if cost is None else cost,
                uses=uses,
                curvature=curvature,
            )
            for ending, kind in kinds.items()
        ]
        if name is not None:
            MEASURES.update({one.name: one for one in made})
        compute.measure = made[0]  # type: ignore[attr-defined]
        return compute

    return decorate
