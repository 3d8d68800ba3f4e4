"""Owns APGD with any loss of the package and any choice of targets, on pyautoattack's search."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.evaluate.attacks.base import Attack
from robustflat.evaluate.attacks.targets import Targets
from robustflat.evaluate.threat import Task
from robustflat.perturb.inputs import LossName, attack_losses, targeted_losses

# The library tells of zero gradients there; the doubts of an evaluation say it too.
_log = logging.getLogger(__name__)
_log.addHandler(logging.NullHandler())


def apgd(
    name: str,
    task: Task,
    *,
    loss: LossName,
    steps: int,
    restarts: int,
    targets: Targets | None,
) -> Attack:
    """APGD (Croce & Hein 2020) on a loss of ours; each restart and target attacks what is left.

    For linf and l2, with loss "dlr", 100 steps, one restart and nine targets ranked by logits it is
    AutoAttack's `apgd-t`, bit for bit; with "ce" or "dlr" and no targets `apgd-ce` and `apgd-dlr`.

    Args:
        name: As it is shown.
        task: The threat and the number of classes.
        loss: "ce", "margin", "dlr" or "probability_margin".
        steps: Of each run.
        restarts: Random starts, of every target.
        targets: The wrong classes that are climbed towards; None: away from the label.
    """

    def run(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        from pyautoattack.autopgd_base import APGDAttack

        # Called "dlr", the loss is the method of that name, which is replaced.
        search = APGDAttack(
            model, n_iter=steps, norm=task.norm_name.capitalize(), n_restarts=restarts,
            eps=task.eps, seed=seed, loss="dlr", use_largereps=task.norm == 1, device=x.device,
            logger=_log,
        )  # fmt: skip
        with torch.no_grad():
            if targets is None:
                search.dlr_loss = attack_losses[loss]
                untargeted: Tensor = search.perturb(x, y)
                return untargeted
            order = targets.chosen(model, x, y, task.norm)
            search.init_hyperparam(x)
            torch.manual_seed(seed)
            found = x.clone()
            left = (model(x).argmax(1) == y).nonzero().flatten()
            for column in order.unbind(1):
                for _ in range(restarts):
                    if not len(left):
                        return found
                    goal = torch.stack([y[left], column[left]], 1)
                    search.dlr_loss = _towards(loss, goal)
                    standing, x_adv = _once(search, x[left], y[left], steps)
                    found[left] = x_adv
                    left = left[standing]
        return found

    identity = {
        "attack": "apgd",
        "norm": task.norm_name,
        "steps": steps,
        "restarts": restarts,
        "loss": loss,
        "ranking": None if targets is None else targets.ranking,
        "targets": None if targets is None else targets.count,
    }
    rounds = restarts * (1 if targets is None else min(targets.count, task.classes - 1))
    ranking = 0 if targets is None else targets.passes(task.classes)
    passes = 3 + ranking + rounds * (2 * (steps + 1) + 3)
    return Attack(name=name, identity=identity, run=run, passes=passes)


def _towards(loss: str, goal: Tensor) -> Any:
    return lambda logits, _: targeted_losses[loss](logits, goal)


def _once(search: Any, x: Tensor, y: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Which stand (bool [N]) after one run, and its images."""
    if search.use_largereps:  # its schedule for l1: from three times the radius
        epss = [3.0 * search.eps_orig, 2.0 * search.eps_orig, 1.0 * search.eps_orig]
        # Rounded up as the library does it.
        first = -(-3 * steps // 10)
        _, standing, _, x_adv = search.decr_eps_pgd(x, y, epss, [first, first, steps - 2 * first])
    else:
        _, standing, _, x_adv = search.attack_single_run(x, y)
    return standing.bool(), x_adv
