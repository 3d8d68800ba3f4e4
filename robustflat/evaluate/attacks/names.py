"""Owns the names of attacks: what is asked for in words becomes attacks that can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from robustflat.errors import UserError, nearest
from robustflat.evaluate.attacks import ascent, autoattack, torchattacks
from robustflat.evaluate.attacks.base import Suite
from robustflat.evaluate.attacks.own import own
from robustflat.evaluate.attacks.transfer import transfer
from robustflat.evaluate.examples import Examples
from robustflat.evaluate.threat import Task
from robustflat.perturb import InputPerturbation
from robustflat.plugins import imported, is_plugin

Request = str | Mapping[str, Any] | InputPerturbation | Callable[..., Any]


def plan(
    requests: Sequence[Request] | Request,
    task: Task,
    precision: str = "fp32",
    examples: Examples | None = None,
) -> list[Suite]:
    """Turn names, mappings and perturbations into attacks.

    Known names: "fgsm"; "pgd", "pgd-STEPS", "pgd-STEPS-RESTARTS" and the same of "apgd", each
    optionally followed by ":LOSS" (ce, margin, probability_margin, dlr; kl of pgd) and by
    ":logits-COUNT" or ":malt-COUNT", so many targets in that order (`Targets`); "autoattack" and
    "autoattack:VERSION" with the versions standard, plus, rand, fast and custom=ATTACK,ATTACK; each
    component of AutoAttack by its own name, with the settings of `standard`; "torchattacks:NAME";
    "package.module:function" or a function of your own (`own`); "transfer:FILE.npz", examples that
    were saved before, or with the option "model" those of that surrogate (`transfer`). A mapping
    has such a name or function under "name", and options beside it. What is asked for twice is run
    once.

    Args:
        requests: What to run, in this order.
        task: The threat, the number of classes and the shape of the images.
        precision: In which they search.
        examples: What is attacked, with which stored examples are compared; None if only the names
            are looked at.

    Returns:
        A suite for every request.

    Raises:
        UserError: If a name or option is unknown or cannot work here.
    """
    if isinstance(requests, (str, Mapping)) or callable(requests):
        requests = [requests]
    suites: list[Suite] = []
    for request in requests:
        suite = _suite(request, task, examples)
        made = [attack.searching_in(precision) for attack in suite.attacks]
        identities = [attack.identity for attack in made]
        if any(identities == [a.identity for a in other.attacks] for other in suites):
            continue
        mark = "" if precision == "fp32" else f"@{precision}"
        suites.append(Suite(name=suite.name + mark, attacks=made, notes=suite.notes))
    return suites


def _suite(request: Request, task: Task, examples: Examples | None) -> Suite:
    if isinstance(request, InputPerturbation):
        return _single(ascent.perturbation(request, task))
    name: Any = request
    options: dict[str, Any] = {}
    if isinstance(request, Mapping):
        options = {key: value for key, value in request.items() if key != "name"}
        name = request.get("name")
    if callable(name):
        return _single(own(name, options, task))
    if not isinstance(name, str):
        raise UserError(
            "An attack is a name, a function, a mapping with one of these under 'name', or what "
            f"rf.pgd(...) returns; got {request!r}."
        )
    kind, _, rest = name.partition(":")
    if kind == "autoattack":
        return autoattack.suite(rest, options, task)
    if name in autoattack.COMPONENTS:
        return autoattack.alone(name, options, task)
    if kind == "transfer":
        return transfer(rest, options, task, examples)
    if kind == "torchattacks":
        return _single(torchattacks.torchattack(rest, options, task))
    found = ascent.by_name(name, options, task)
    if found is None and is_plugin(name):
        return _single(own(imported(name, "attack"), options, task, name))
    if found is None:
        known = ["fgsm", "pgd", "pgd-20", "pgd-50-10", "autoattack", "autoattack:fast"]
        hint = nearest(name, [*known, *autoattack.COMPONENTS], 1)
        raise UserError(
            f"Unknown attack {name!r}.{hint} There are fgsm, pgd, pgd-STEPS, pgd-STEPS-RESTARTS, "
            f"apgd, autoattack, autoattack:VERSION, {', '.join(autoattack.COMPONENTS)}, "
            "torchattacks:NAME, transfer:FILE.npz and package.module:function."
        )
    return _single(found)


def _single(attack: Any) -> Suite:
    return Suite(name=attack.name, attacks=[attack])
