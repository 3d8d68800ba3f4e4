"""Owns the adapter over pyautoattack: each component of AutoAttack as an attack on a batch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.evaluate.attacks.apgd import apgd
from robustflat.evaluate.attacks.base import Attack, Suite, check_options
from robustflat.evaluate.attacks.targets import Targets
from robustflat.evaluate.threat import Task

COMPONENTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
# Three wrong classes, of which a linear model would reach the nearest first (Melamed et al. 2024).
_MALT = "apgd:dlr:malt-3"
VERSIONS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    # For development, not for reports: as strong as `apgd-ce` and `apgd-t` on the networks of
    # docs/results.md, at half their time.
    "fast": ("apgd-ce", _MALT),
}
# Square's smallest square for l2 and l1 is a fifth of the height; below this it has no pixel.
_LEAST_HEIGHT = 5

_log = logging.getLogger(__name__)
_log.addHandler(logging.NullHandler())


def suite(version: str, options: Mapping[str, Any], task: Task) -> Suite:
    """A version of AutoAttack (Croce & Hein 2020; L1: 2021).

    Settings, seeding and algorithm are the library's, and run in the official order on what still
    stands in batches of the same size they find bit for bit what the official driver finds. One
    exception: in a custom list, the library gives `fab` one restart instead of five if `fab-t`
    came before it; here it always has five. The library's driver is not used: its checks replace
    the process's tracer, and its state file cannot be read back.

    With few classes, the number of targets is at most the number of wrong classes. The targeted
    DLR loss divides by a difference to the fourth largest logit and the DLR loss to the third, so
    with three classes `apgd-t` becomes `apgd-dlr`, and with two both are left out. Square is left
    out for l2 and l1 on images less than five pixels high, on which it fails. `apgd:dlr:malt-3` of
    `fast`, which is no part of AutoAttack, is treated as `apgd-t` is.

    Args:
        version: "", "standard", "plus", "rand", "fast" or "custom=NAME,NAME".
        options: In place of `version`: "version", and for "custom" a list "attacks".
        task: The threat, the number of classes and the shape of the images.

    Returns:
        The attacks, with a note for every change these rules made.

    Raises:
        UserError: If a name is unknown or nothing is left to run.
    """
    check_options("autoattack", options, ("version", "attacks"))
    version = str(options.get("version", version)) or "standard"
    version, _, listed = version.partition("=")
    names = tuple(options.get("attacks", listed.split(",") if listed else ()))
    if version == "custom":
        unknown = [name for name in names if name not in COMPONENTS]
        if unknown or not names:
            raise UserError(
                f"A custom AutoAttack is written autoattack:custom=apgd-ce,apgd-t with some of "
                f"{', '.join(COMPONENTS)}; got {', '.join(map(str, unknown)) or 'none'}."
            )
        title = f"autoattack:custom={','.join(names)}"
    elif version not in VERSIONS or names:
        raise UserError(
            f"AutoAttack's versions are {', '.join(VERSIONS)} and custom=ATTACK,ATTACK; got "
            f"{version!r}{' with a list of attacks' if names else ''}."
        )
    else:
        names = VERSIONS[version]
        title = "autoattack" if version == "standard" else f"autoattack:{version}"
    # The first attack of `fast` is that of `standard`, so that going on to it does not repeat it.
    return _fitting(title, names, "standard" if version == "fast" else version, task)


def alone(name: str, options: Mapping[str, Any], task: Task) -> Suite:
    """One component with the settings of `standard`, on all that the model classifies.

    Raises:
        UserError: If it has options, or cannot run here.
    """
    check_options(name, options, ())
    return _fitting(name, (name,), "standard", task)


def _fitting(title: str, names: tuple[str, ...], version: str, task: Task) -> Suite:
    """The components that can run with this many classes on images of this size."""
    fitting: list[str] = []
    notes: list[str] = []
    for name in names:
        kept: str | None = name
        if name in ("apgd-t", _MALT) and task.classes == 3:
            kept = "apgd-dlr"
            notes.append(
                "With 3 classes the targeted DLR loss is not defined: apgd-dlr was run in place of "
                f"{name}."
            )
        elif name in ("apgd-t", _MALT, "apgd-dlr") and task.classes < 3:
            kept = None
            notes.append(
                f"With {task.classes} classes the DLR loss is not defined: {name} was left out."
            )
        elif name == "square" and not square_fits(task):
            kept = None
            notes.append(
                f"Square cannot attack images {task.shape[1]} pixels high in "
                f"{task.norm_name}: it was left out."
            )
        if kept is not None and kept not in fitting:
            fitting.append(kept)
    if not fitting:
        raise UserError(
            f"None of {', '.join(names)} can run with {task.classes} classes on images of "
            f"{task.shape[1]}x{task.shape[2]} pixels."
        )
    made = [_component(name, version, task) for name in fitting]
    return Suite(name=title, attacks=made, notes=notes)


def _component(name: str, version: str, task: Task) -> Attack:
    """One component with the settings that `version` gives it.

    Images must be contiguous, or its gradient check fails; `Examples` sees to that.
    """
    if name == _MALT:
        targets = Targets(ranking="malt", count=3)
        return apgd(name, task, loss="dlr", steps=100, restarts=1, targets=targets)

    def run(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        from pyautoattack import AutoAttack

        # Made anew for every batch: nothing is carried over, so any batch can be repeated.
        driver = AutoAttack(
            model,
            norm=task.norm_name.capitalize(),
            eps=task.eps,
            seed=seed,
            version=version,
            attacks=[name] if version == "custom" else None,
            device=x.device,
        )
        wrong_classes = task.classes - 1
        if name.startswith("apgd"):
            attack = driver.apgd_targeted if name == "apgd-t" else driver.apgd
            attack.logger = _log
            if name == "apgd-t":
                attack.n_target_classes = min(attack.n_target_classes, wrong_classes)
            else:
                attack.loss = name.removeprefix("apgd-")
        elif name == "square":
            attack = driver.square
        else:
            attack = driver.fab
            attack.targeted = name == "fab-t"
            if attack.targeted:
                attack.n_restarts = 1
                attack.n_target_classes = min(attack.n_target_classes, wrong_classes)
        attack.seed = seed
        with torch.no_grad():
            found: Tensor = attack.perturb(x, y)
        return found

    identity = {
        "attack": f"autoattack:{name}",
        "version": version,
        "norm": task.norm_name,
        "classes": task.classes,
    }
    return Attack(
        name=name,
        identity=identity,
        run=run,
        black_box=name == "square",
        passes=_passes(name, version, task.classes),
    )


def _passes(name: str, version: str, classes: int) -> int:
    """Forward passes for an image at most, one with a gradient counted twice."""
    targets = min(9, classes - 1)
    if name == "square":
        return 5010
    if name.startswith("fab"):
        # A step takes a gradient (of every class without targets) and looks at the new point.
        return 3 + (targets * 100 * 4 if name == "fab-t" else 5 * 100 * (2 * classes + 2))
    samples = 20 if version == "rand" else 1
    rounds = targets if name == "apgd-t" else 1 if version in ("standard", "rand") else 5
    return 3 + rounds * (2 * samples * 101 + 3)


def square(model: nn.Module, x: Tensor, y: Tensor, task: Task, queries: int) -> Tensor:
    """Square (Andriushchenko et al. 2020) with a budget of its own, for the sanity checks.

    Args:
        model: The model.
        x: Images in [0, 1], float32 [N, C, H, W].
        y: Labels [N].
        task: The threat; with l2 and l1 the images must be five pixels high.
        queries: Outputs it may look at.

    Returns:
        Images of the shape of `x`.
    """
    from pyautoattack.square import SquareAttack

    attack = SquareAttack(
        model,
        norm=task.norm_name.capitalize(),
        n_queries=queries,
        eps=task.eps,
        seed=0,
        device=x.device,
        resc_schedule=True,
    )
    with torch.no_grad():
        found: Tensor = attack.perturb(x, y)
    return found


def square_fits(task: Task) -> bool:
    """Whether Square can attack images of this size in this norm."""
    return task.norm == float("inf") or task.shape[1] >= _LEAST_HEIGHT
