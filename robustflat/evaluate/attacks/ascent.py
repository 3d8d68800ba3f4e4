"""Owns the package's own attacks: FGSM, PGD and APGD, by name or as they are made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.evaluate.attacks.apgd import apgd
from robustflat.evaluate.attacks.base import Attack, check_options
from robustflat.evaluate.attacks.targets import Targets
from robustflat.evaluate.threat import Task, Threat, norm_name
from robustflat.perturb import InputPerturbation, fgsm, pgd

_PGD = re.compile(
    r"(?P<kind>a?pgd)(?:-(?P<steps>\d+)(?:-(?P<restarts>\d+))?)?(?::(?P<loss>[a-z]\w*))?"
    r"(?::(?P<ranking>[a-z]+)-(?P<targets>\d+))?"
)
_TARGETS = ("ranking", "targets")
_APGD_OPTIONS = ("steps", "restarts", "loss")
_PGD_OPTIONS = (*_APGD_OPTIONS, "step_size", "start", "keep")


def by_name(name: str, options: dict[str, Any], task: Task) -> Attack | None:
    """FGSM, PGD or APGD from its name and options; None if it is none of them.

    Raises:
        UserError: If an option is unknown or cannot work here.
    """
    match = _PGD.fullmatch(name)
    if match is None:
        made = pgd_by_name(name, task, options)
        return None if made is None else perturbation(made, task, None if options else name)
    known = _APGD_OPTIONS if match["kind"] == "apgd" else _PGD_OPTIONS
    check_options(name, options, (*known, *_TARGETS))
    settings = _settings(match) | options
    targets = Targets.of(settings)
    _check_targets(name, settings["loss"], targets, task)
    if match["kind"] == "pgd":
        made = _pgd(name, task, settings)
        return perturbation(made, task, None if options else name, targets)
    settings = {"restarts": 1, **settings}
    # The same bounds, and words, as those of PGD.
    _pgd(name, task, settings)
    if settings["loss"] == "kl":
        raise UserError("apgd has no loss kl: use ce, margin, probability_margin or dlr.")
    parts = [f"apgd-{settings['steps']}-{settings['restarts']}:{settings['loss']}"]
    parts += [f"{targets.ranking}-{targets.count}"] if targets else []
    return apgd(":".join(parts) if options else name, task, targets=targets, **settings)


def pgd_by_name(
    name: str, threat: Threat, options: Mapping[str, Any] | None = None
) -> InputPerturbation | None:
    """FGSM or PGD, which are perturbations; None if it is neither, or tries targets."""
    options = options or {}
    if name == "fgsm":
        check_options(name, options, ("loss",))
        try:
            return fgsm(threat.norm, threat.eps, **options)
        except (ValueError, TypeError) as error:
            raise UserError(f"The attack {name!r} cannot be made: {error}") from error
    match = _PGD.fullmatch(name)
    if match is None or match["kind"] != "pgd" or match["targets"]:
        return None
    check_options(name, options, _PGD_OPTIONS)
    return _pgd(name, threat, _settings(match) | dict(options))


def _settings(match: re.Match[str]) -> dict[str, Any]:
    """What a name of PGD or APGD says."""
    usual = {"steps": 20 if match["kind"] == "pgd" else 100, "restarts": 1, "loss": "ce"}
    said = {key: value for key, value in match.groupdict().items() if value is not None}
    del said["kind"]
    numbers = {key: int(said[key]) for key in ("steps", "restarts", "targets") if key in said}
    return usual | said | numbers


def _pgd(name: str, threat: Threat, settings: dict[str, Any]) -> InputPerturbation:
    try:
        if settings["steps"] == 0:
            raise ValueError("no step is no attack, but a random start")
        return pgd(threat.norm, threat.eps, **settings)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"The attack {name!r} cannot be made: {error}") from error


def _check_targets(name: str, loss: object, targets: Targets | None, task: Task) -> None:
    """Refuse losses that are not defined for so few classes, or for a target."""
    if targets is not None and loss == "kl":
        raise UserError(f"The attack {name!r}: the loss kl knows no target. Use ce or margin.")
    least = 4 if targets is not None else 3
    if loss == "dlr" and task.classes < least:
        what = "targeted DLR" if targets is not None else "DLR"
        raise UserError(
            f"The {what} loss needs at least {least} classes, the model has {task.classes}: use "
            "'margin'."
        )


def perturbation(
    attack: InputPerturbation, task: Task, name: str | None = None, targets: Targets | None = None
) -> Attack:
    """One of the package's own perturbations as an attack; with targets, towards one by one.

    Every restart and target attacks what the ones before left standing, so the result is the worst
    case over them, not that of the highest loss.

    Raises:
        UserError: If its ball is another than the task's.
    """
    name = title(attack, targets) if name is None else name
    same = attack.ball.norm == task.norm and math.isclose(
        attack.ball.radius, task.eps, rel_tol=1e-9
    )
    if not same:
        raise UserError(
            f"The attack {name} is one in the {norm_name(attack.ball.norm)} ball of "
            f"{attack.ball.radius:g}, but the evaluation is for {task.norm_name}, "
            f"{task.eps:g}. Give evaluate the same norm and eps."
        )
    _check_targets(name, attack.loss, targets, task)
    single = replace(attack, restarts=1)

    def run(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(seed)
        found = x.clone()
        left = torch.arange(len(x), device=x.device)
        goals = [y]
        if targets is not None:
            chosen = targets.chosen(model, x, y, task.norm)
            goals = [torch.stack([y, target], 1) for target in chosen.unbind(1)]
        for goal in goals:
            for _ in range(attack.restarts):
                if not len(left):
                    return found
                x_adv = single(model, x[left], goal[left], generator=generator)
                wrong = model(x_adv).argmax(1) != y[left]
                found[left] = x_adv
                left = left[~wrong]
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
        **({} if targets is None else asdict(targets)),
    }
    # The KL attack also needs the clean output, "best" the value at the end; then it is judged.
    rounds = attack.restarts * (1 if targets is None else min(targets.count, task.classes - 1))
    ranking = 0 if targets is None else targets.passes(task.classes)
    passes = ranking + rounds * (2 * ascent.steps + 3) + 1
    return Attack(name=name, identity=identity, run=run, passes=passes)


def title(attack: InputPerturbation, targets: Targets | None = None) -> str:
    """The name of a perturbation, such as "pgd-10" or "pgd-50-10:margin:malt-3"."""
    if attack.name == "fgsm":
        return attack.name
    restarts = f"-{attack.restarts}" if attack.restarts > 1 else ""
    loss = f":{attack.loss}" if attack.loss != "ce" else ""
    tried = "" if targets is None else f":{targets.ranking}-{targets.count}"
    return f"{attack.name}-{attack.ascent.steps}{restarts}{loss}{tried}"
