"""Owns robust accuracy over several radii: each attacks what the smaller ones left."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustflat.errors import UserError
from robustflat.evaluate.attacks import Request, plan
from robustflat.evaluate.clean import classes_of
from robustflat.evaluate.evaluation import Work, evaluate
from robustflat.evaluate.examples import Data, choose
from robustflat.evaluate.intervals import LEVEL, Interval, wilson
from robustflat.evaluate.threat import Task, Threat


@dataclass(frozen=True, kw_only=True)
class Point:
    """Robust accuracy at one radius.

    Attributes:
        eps: In image units; 0 is without an attack.
        accuracy: Share of all examples that no attack of this or a smaller radius broke.
        interval: Wilson's 95 % interval for it.
        attacked: How many examples stood when this radius began.
        broken: How many of those its attacks broke.
        seconds: Time spent.
    """

    eps: float
    accuracy: float
    interval: Interval
    attacked: int
    broken: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RadiusCurve:
    """The result of `over_radii`.

    Attributes:
        norm: "linf", "l2" or "l1".
        count: Number of examples.
        points: From 0 to the largest radius.
        warnings: Reasons to doubt the figures, each once.
    """

    norm: str
    count: int
    points: tuple[Point, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        points = [{**vars(point), "interval": list(point.interval)} for point in self.points]
        return {
            "norm": self.norm, "count": self.count, "confidence": LEVEL, "points": points,
            "warnings": list(self.warnings),
        }  # fmt: skip


def over_radii(
    model: nn.Module,
    data: Data,
    radii: Sequence[float],
    attacks: Sequence[Request] = ("autoattack",),
    norm: str | float = "linf",
    seed: int = 0,
    *,
    store: Path | None = None,
    work: Work | None = None,
) -> RadiusCurve:
    """Robust accuracy at several radii, which falls from each to the next by construction.

    An image that breaks an example within one radius is within every larger one: so what is broken
    stays broken, and each radius attacks only what the smaller ones left. It may therefore be lower
    than what the same attacks find at that radius alone, never higher.

    Args:
        model: As of `evaluate`.
        data: As of `evaluate`.
        radii: In any order; 0 is added.
        attacks: As of `evaluate`, of which those for one radius alone (stored examples, what
            `rf.pgd(...)` returns) cannot work here.
        norm: "linf", "l2" or "l1".
        seed: Of every attack.
        store: A folder that keeps what was found, so that a killed curve goes on where it stood.
        work: How it is done.

    Raises:
        UserError: If anything given cannot work.
    """
    threats = [Threat.of(norm, eps) for eps in sorted({float(eps) for eps in radii} - {0.0})]
    if not threats:
        raise UserError("A curve needs at least one radius above 0.")
    work, examples = Work() if work is None else work, choose(data)
    classes = classes_of(model, examples)
    for threat in threats:
        plan(attacks, Task(**vars(threat), classes=classes, shape=examples.shape),
             work.precision, examples)  # fmt: skip

    def at(threat: Threat, left: torch.Tensor, requests: Sequence[Request]) -> Any:
        # With other radii before it, a radius has others left.
        digest = hashlib.sha256(left.numpy().tobytes()).hexdigest()[:12]
        path = None if store is None else store / f"eps-{threat.eps!r}-{digest}.json"
        return evaluate(
            model, examples.part(left), requests, threat.norm, threat.eps, seed, store=path,
            work=work,
        )  # fmt: skip

    total, left = len(examples), torch.arange(len(examples))
    found = at(Threat.of(norm, 0.0), left, ())
    left = left[found.outcomes == -1]
    points = [_point(0.0, total, total, len(left), 0.0)]
    warnings = list(found.warnings)
    for threat in threats:
        before, seconds = len(left), 0.0
        if before:
            found = at(threat, left, attacks)
            left = left[found.outcomes == -1]
            warnings += found.warnings
            seconds = sum(one.seconds for one in found.attacks.values())
        points.append(_point(threat.eps, total, before, len(left), seconds))
    return RadiusCurve(
        norm=threats[0].norm_name,
        count=total,
        points=tuple(points),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _point(eps: float, total: int, attacked: int, left: int, seconds: float) -> Point:
    return Point(
        eps=eps, accuracy=left / total, interval=wilson(left, total), attacked=attacked,
        broken=attacked - left, seconds=seconds,
    )  # fmt: skip
