"""Owns transfer attacks: examples that were made of another model, from a file or made now."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.evaluate.adversarial import Adversarial
from robustflat.evaluate.attacks.ascent import pgd_by_name
from robustflat.evaluate.attacks.base import Attack, Suite, check_options
from robustflat.evaluate.examples import Examples
from robustflat.evaluate.frozen import Plain, held
from robustflat.evaluate.record import fingerprint_of
from robustflat.evaluate.threat import Task

_ATTACK = "pgd-20"


def transfer(source: str, options: dict[str, Any], task: Task, examples: Examples | None) -> Suite:
    """A transfer attack, of which the attacked model sees nothing.

    Args:
        source: An .npz file of adversarial examples; or whatever the surrogate is called.
        options: "model": the surrogate, which takes images in [0, 1] and returns as many logits;
            with it "attack": pgd-STEPS..., with a loss or fgsm, by which it is attacked
            (pgd-20 if left out).
        task: The threat.
        examples: What is evaluated; None if only the request is looked at.

    Raises:
        UserError: If the examples are those of another threat or data set, or the surrogate does
            not fit.
    """
    check_options("transfer", options, ("model", "attack"))
    name = f"transfer:{source}"
    if "model" in options:
        return Suite(name=name, attacks=[_surrogate(name, options, task)])
    if not Path(source).is_file():
        raise UserError(
            f"The attack {name} needs the examples or the model that it names: an .npz file as "
            "--save-adversarial writes it, or the folder of a run (in Python a mapping with a "
            "'model'). Of any other model evaluate and save the examples first."
        )
    stored = Adversarial.load(Path(source))
    identity = {"attack": "transfer", "examples": _digest(stored)}
    if examples is None:
        return Suite(name=name, attacks=[Attack(name=name, identity=identity, run=_nothing)])
    rows = stored.rows(examples, task, Path(source))

    def at(places: Tensor) -> Tensor:
        found = examples.images(places).clone()
        have = rows[places] >= 0
        found[have] = stored.x_adv[rows[places][have]]
        return found

    lacking = int((rows < 0).sum())
    note = (
        f"{source} holds images for {len(rows) - lacking} of the {len(rows)} examples: {name} "
        "leaves the others as they are."
    )
    attack = Attack(name=name, identity=identity, run=_nothing, stored=at, passes=0)
    return Suite(name=name, attacks=[attack], notes=[note] if lacking else [])


def _surrogate(name: str, options: dict[str, Any], task: Task) -> Attack:
    model, by = options["model"], options.get("attack", _ATTACK)
    if not isinstance(model, nn.Module):
        raise UserError(f"The model of {name} must be a torch.nn.Module, got {type(model)}.")
    attack = pgd_by_name(by, task) if isinstance(by, str) else None
    if attack is None:
        raise UserError(
            f"The surrogate of {name} is attacked by fgsm, pgd-STEPS or pgd-STEPS-RESTARTS, got "
            f"{by!r}. Examples of any other attack are saved first (--save-adversarial)."
        )
    with held(model) as place:
        try:
            logits = model(torch.zeros(1, *task.shape, device=place))
            shape = tuple(logits.shape)
        except Exception as error:  # of any model
            shape = (f"{type(error).__name__}: {error}",)
    if shape != (1, task.classes):
        raise UserError(
            f"The surrogate of {name} must classify images of the shape {list(task.shape)} into "
            f"{task.classes} classes, got {', '.join(map(str, shape))}."
        )

    def run(_: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        with held(model) as place:
            generator = torch.Generator(place).manual_seed(seed)
            found = attack(Plain(model), x.to(place), y.to(place), generator=generator)
        return found.to(x.device)

    identity = {"attack": "transfer", "model": fingerprint_of(model), "by": by}
    return Attack(name=name, identity=identity, run=run)


def _nothing(_: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
    del y, seed
    return x


def _digest(stored: Adversarial) -> str:
    found = hashlib.sha256()
    for tensor in (stored.positions, stored.x_adv):
        found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()
