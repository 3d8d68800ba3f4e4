"""Owns the names of attacks, and the one interface behind which every attack runs."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.perturb import InputPerturbation, fgsm, parse_norm, pgd

Run = Callable[[nn.Module, Tensor, Tensor, int], Tensor]
Request = str | Mapping[str, Any] | InputPerturbation


@dataclass(frozen=True, kw_only=True, eq=False)
class Attack:
    """An attack on a batch.

    Attributes:
        name: As shown beside its figure.
        identity: Its parameters, as JSON: two attacks with equal identities are the same.
        run: From the model (eval mode, frozen, float32 logits), images [N, C, H, W], labels [N]
            and a seed to images of the same shape; those not broken may be anything. It keeps
            nothing between calls, so that a batch can be attacked again after a kill.
        black_box: Whether it only looks at outputs.
        bounded: Whether it keeps to the ball by itself; if not, its images outside are no surprise.
    """

    name: str
    identity: dict[str, Any]
    run: Run
    black_box: bool = False
    bounded: bool = True


@dataclass(frozen=True, kw_only=True)
class Threat:
    """What the attacks may do, and what they attack.

    Attributes:
        norm: p of the ball: 1, 2 or inf.
        eps: Its radius in image units.
        classes: Number of logits.
        shape: Of an image: channels, height, width.
    """

    norm: float
    eps: float
    classes: int
    shape: tuple[int, int, int]

    @property
    def norm_name(self) -> str:
        """The norm as it is written: "linf", "l2" or "l1"."""
        return norm_name(self.norm)


def norm_name(norm: float) -> str:
    """The name of the exponent p: "linf", "l2" or "l1"."""
    return "linf" if math.isinf(norm) else f"l{norm:g}"


@dataclass(kw_only=True)
class Plan:
    """The attacks to run, in order, and sentences on how they differ from what was asked for."""

    attacks: list[Attack] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plan(requests: Sequence[Request] | Request, threat: Threat) -> Plan:
    """Turn names, mappings and perturbations into attacks.

    Known names: "fgsm"; "pgd", "pgd-STEPS", "pgd-STEPS-RESTARTS", each optionally followed by
    ":LOSS" (ce, margin, dlr, kl); "autoattack" and "autoattack:VERSION" with the versions
    standard, plus, rand, fast and custom=ATTACK,ATTACK; "torchattacks:NAME". A mapping has such a
    name under "name", and options beside it. An attack that is asked for twice is run once.

    Args:
        requests: What to run, in this order.
        threat: The ball, the number of classes and the shape of the images.

    Returns:
        The attacks.

    Raises:
        UserError: If a name or option is unknown or cannot work here.
    """
    if isinstance(requests, (str, Mapping, InputPerturbation)):
        requests = [requests]
    made = Plan()
    for request in requests:
        for attack in _made(request, threat, made.notes):
            if all(attack.identity != other.identity for other in made.attacks):
                made.attacks.append(attack)
    return made


def _made(request: Request, threat: Threat, notes: list[str]) -> list[Attack]:
    # Late, because these modules import the interface from here.
    from robustflat.evaluate import autoattack, external

    if isinstance(request, InputPerturbation):
        return [_ours(request, _title(request), threat)]
    if isinstance(request, str):
        name, options = request, {}
    elif isinstance(request, Mapping) and isinstance(request.get("name"), str):
        options = {key: value for key, value in request.items() if key != "name"}
        name = request["name"]
    else:
        raise UserError(
            f"An attack is a name, a mapping with the key 'name', or what rf.pgd(...) returns; got "
            f"{request!r}."
        )
    kind, _, rest = name.partition(":")
    if kind == "autoattack":
        return autoattack.components(rest, options, threat, notes)
    if kind == "torchattacks":
        return [external.torchattack(rest, options, threat)]
    return [_by_name(name, options, threat)]


_PGD = re.compile(r"pgd(?:-(?P<steps>\d+)(?:-(?P<restarts>\d+))?)?(?::(?P<loss>\w+))?")
_PGD_OPTIONS = ("steps", "restarts", "loss", "step_size", "start", "keep")


def _by_name(name: str, options: dict[str, Any], threat: Threat) -> Attack:
    """FGSM or PGD from its name and options."""
    match = _PGD.fullmatch(name)
    if name != "fgsm" and match is None:
        known = ["fgsm", "pgd", "pgd-20", "pgd-50-10", "autoattack", "autoattack:fast"]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"Unknown attack {name!r}.{hint} There are fgsm, pgd, pgd-STEPS, pgd-STEPS-RESTARTS, "
            "autoattack, autoattack:VERSION and torchattacks:NAME."
        )
    allowed = ("loss",) if match is None else _PGD_OPTIONS
    check_options(name, options, allowed)
    try:
        if match is None:
            return _ours(fgsm(threat.norm, threat.eps, **options), name, threat)
        settings: dict[str, Any] = {"steps": 20, "restarts": 1, "loss": "ce"}
        for key, given in match.groupdict().items():
            if given is not None:
                settings[key] = given if key == "loss" else int(given)
        settings |= options
        made = pgd(threat.norm, threat.eps, **settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"The attack {name!r} cannot be made: {error}") from error
    return _ours(made, _title(made) if options else name, threat)


def check_options(name: str, options: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Refuse options that an attack does not have.

    Raises:
        UserError: Naming the first unknown option and the nearest known one.
    """
    for key in options:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"The attack {name!r} has no option {key!r}.{hint} Its options: "
                f"{', '.join(allowed)}."
            )


def _title(attack: InputPerturbation) -> str:
    if attack.name == "fgsm":
        return attack.name
    restarts = f"-{attack.restarts}" if attack.restarts > 1 else ""
    loss = f":{attack.loss}" if attack.loss != "ce" else ""
    return f"{attack.name}-{attack.ascent.steps}{restarts}{loss}"


def _ours(attack: InputPerturbation, name: str, threat: Threat) -> Attack:
    """One of the package's own perturbations as an attack.

    Every restart attacks what the ones before left standing, so the result is the worst case over
    the restarts, not the restart of the highest loss.
    """
    same = attack.ball.norm == threat.norm and math.isclose(
        attack.ball.radius, threat.eps, rel_tol=1e-9
    )
    if not same:
        raise UserError(
            f"The attack {name} is one in the {norm_name(attack.ball.norm)} ball of "
            f"{attack.ball.radius:g}, but the evaluation is for {threat.norm_name}, "
            f"{threat.eps:g}. Give evaluate the same norm and eps."
        )
    if attack.loss == "dlr" and threat.classes < 3:
        raise UserError("The DLR loss needs at least 3 classes, the model has 2: use 'margin'.")
    single = replace(attack, restarts=1)

    def run(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(seed)
        found = x.clone()
        left = torch.arange(len(x), device=x.device)
        for _ in range(attack.restarts):
            x_adv = single(model, x[left], y[left], generator=generator)
            wrong = model(x_adv).argmax(1) != y[left]
            found[left[wrong]] = x_adv[wrong]
            left = left[~wrong]
            if not len(left):
                break
        return found

    ascent = attack.ascent
    identity = {
        "attack": "perturbation",
        "norm": threat.norm_name,
        "steps": ascent.steps,
        "step_size": ascent.step_size,
        "start": ascent.start,
        "direction": ascent.direction,
        "keep": ascent.keep,
        "loss": attack.loss,
        "restarts": attack.restarts,
        "box": None if attack.box is None else list(attack.box),
    }
    return Attack(name=name, identity=identity, run=run)


def threat_norm(norm: str | float) -> float:
    """The exponent of a norm in which models are evaluated.

    Raises:
        UserError: If it is none of linf, l2, l1.
    """
    try:
        p = parse_norm(norm)
    except (ValueError, TypeError):
        p = 0.0
    if p not in (1.0, 2.0, math.inf):
        raise UserError(f"The norm must be 'linf', 'l2' or 'l1', got {norm!r}.")
    return p
