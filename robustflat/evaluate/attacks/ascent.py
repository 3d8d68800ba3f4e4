"""Owns the package's own perturbations as attacks: FGSM and PGD, by name or as they are made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.evaluate.attacks.base import Attack, check_options
from robustflat.evaluate.threat import Task, Threat, norm_name
from robustflat.perturb import InputPerturbation, fgsm, pgd

_PGD = re.compile(r"pgd(?:-(?P<steps>\d+)(?:-(?P<restarts>\d+))?)?(?::(?P<loss>\w+))?")
_PGD_OPTIONS = ("steps", "restarts", "loss", "step_size", "start", "keep")


def by_name(name: str, options: dict[str, Any], task: Task) -> Attack | None:
    """FGSM or PGD from its name and options; None if it is neither.

    Raises:
        UserError: If an option is unknown or cannot work here.
    """
    made = pgd_by_name(name, task, options)
    return None if made is None else perturbation(made, task, None if options else name)


def pgd_by_name(
    name: str, threat: Threat, options: Mapping[str, Any] | None = None
) -> InputPerturbation | None:
    """The same as the perturbation that it is."""
    options = options or {}
    match = _PGD.fullmatch(name)
    if name != "fgsm" and match is None:
        return None
    check_options(name, options, ("loss",) if match is None else _PGD_OPTIONS)
    try:
        if match is None:
            return fgsm(threat.norm, threat.eps, **options)
        settings: dict[str, Any] = {"steps": 20, "restarts": 1, "loss": "ce"}
        for key, given in match.groupdict().items():
            if given is not None:
                settings[key] = given if key == "loss" else int(given)
        settings |= options
        if settings["steps"] == 0:
            raise ValueError("no step is no attack, but a random start")
        return pgd(threat.norm, threat.eps, **settings)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"The attack {name!r} cannot be made: {error}") from error


def perturbation(attack: InputPerturbation, task: Task, name: str | None = None) -> Attack:
    """One of the package's own perturbations as an attack.

    Every restart attacks what the ones before left standing, so the result is the worst case over
    the restarts, not the restart of the highest loss.

    Raises:
        UserError: If its ball is another than the task's.
    """
    name = title(attack) if name is None else name
    same = attack.ball.norm == task.norm and math.isclose(
        attack.ball.radius, task.eps, rel_tol=1e-9
    )
    if not same:
        raise UserError(
            f"The attack {name} is one in the {norm_name(attack.ball.norm)} ball of "
            f"{attack.ball.radius:g}, but the evaluation is for {task.norm_name}, "
            f"{task.eps:g}. Give evaluate the same norm and eps."
        )
    if attack.loss == "dlr" and task.classes < 3:
        raise UserError("The DLR loss needs at least 3 classes, the model has 2: use 'margin'.")
    single = replace(attack, restarts=1)

    def run(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(seed)
        found = x.clone()
        left = torch.arange(len(x), device=x.device)
        for _ in range(attack.restarts):
            x_adv = single(model, x[left], y[left], generator=generator)
            wrong = model(x_adv).argmax(1) != y[left]
            found[left] = x_adv
            left = left[~wrong]
            if not len(left):
                break
        return found

    ascent = attack.ascent
    identity = {
        "attack": "perturbation",
        "norm": task.norm_name,
        "steps": ascent.steps,
        "step_size": ascent.step_size,
        "start": ascent.start,
        "direction": ascent.direction,
        "keep": ascent.keep,
        "loss": attack.loss,
        "restarts": attack.restarts,
        "box": None if attack.box is None else list(attack.box),
    }
    # The KL attack also needs the clean output, "best" the value at the end; then it is judged.
    passes = attack.restarts * (2 * ascent.steps + 3) + 1
    return Attack(name=name, identity=identity, run=run, passes=passes)


def title(attack: InputPerturbation) -> str:
    """The name of a perturbation, such as "pgd-10" or "pgd-50-10:margin"."""
    if attack.name == "fgsm":
        return attack.name
    restarts = f"-{attack.restarts}" if attack.restarts > 1 else ""
    loss = f":{attack.loss}" if attack.loss != "ce" else ""
    return f"{attack.name}-{attack.ascent.steps}{restarts}{loss}"
