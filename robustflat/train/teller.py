"""Owns what a run tells its listeners, and when: the values of steps, epochs, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from robustflat.config import RunConfig
from robustflat.perturb import InputPerturbation, Perturbation, Watch
from robustflat.perturb.perturbation import radius_of
from robustflat.train.listeners import Listener, Outbox
from robustflat.train.monitor import Monitor
from robustflat.train.parallel import Processes

_PICTURE_STEPS = 5000


class Teller:
    """Looks at steps and tells of them; no bit of the training changes.

    All processes look, the first one tells.

    Args:
        config: of the run.
        listeners: who is told.
        monitor: measures the edge of stability and takes the pictures.
        processes: this process among those that train together.
        device: where the values are.
        steps: of an epoch.

    Attributes:
        aside: seconds that the last look took and that are not training.
    """

    def __init__(
        self,
        config: RunConfig,
        listeners: Sequence[Listener],
        monitor: Monitor,
        processes: Processes,
        device: torch.device,
        steps: int,
    ) -> None:
        self._config, self._monitor, self._processes = config, monitor, processes
        self.listeners = listeners if processes.is_first else ()
        self._device, self._steps = device, steps
        self._watch = Watch()
        self._edge: dict[str, float] | None = None
        self._looks = False
        self.aside = 0.0

    def start(self, epoch: int, step: int) -> None:
        """The run begins or goes on there."""
        self._outbox = Outbox(self.listeners, self._device, self._config.train.batch_size)
        # An epoch that did not end is told (again), at its last step.
        done = epoch * self._steps + min(step, self._steps - 1)
        for listener in self.listeners:
            listener.on_start(self._config.train.epochs, self._steps, done)

    def restart_clock(self) -> None:
        """What was done since the last step is not training."""
        self._outbox.restart_clock()

    def look(
        self, epoch: int, step: int, model: nn.Module, optimizer: Optimizer, weights: Perturbation
    ) -> AbstractContextManager[None]:
        """Look at the step that is taken in this context, if its turn has come."""
        every, done = self._config.monitor.step_every, epoch * self._steps + step
        self._edge = self._edge_now(epoch, step, model, optimizer, weights)
        self._looks = (every > 0 and done % every == 0) or self._edge is not None
        self.aside = self._edge["edge/seconds"] if self._edge else 0.0
        if self.aside:
            self._outbox.restart_clock()
        return self._watch.step(looks=self._looks, keeps=every > 0 and (done + 1) % every == 0)

    def step(
        self,
        epoch: int,
        step: int,
        norm: Tensor,
        share: float,
        lr: float,
        weights: Perturbation,
        attack: InputPerturbation | None,
    ) -> None:
        """Tell of a step that was taken.

        Args:
            epoch: from 0.
            step: from 0.
            norm: the gradient's.
            share: what this process's rows count in the mean over all processes.
            lr: the learning rate.
            weights: what perturbed the weights.
            attack: what perturbed the inputs.
        """
        values, told = None, {"lr": lr}
        if self._looks:
            # Losses are parts of the mean over all rows; what the attack shows is of own rows.
            found = self._watch.values | {"gradient_norm": norm}
            found = {n: v * share if n.startswith("attack/") else v for n, v in found.items()}
            together = torch.stack([value.float() for value in found.values()])
            values = tuple(found), self._processes.mean(together)
            radii = {"radius": radius_of(weights), "eps": radius_of(attack)}
            told |= {name: radius for name, radius in radii.items() if radius is not None}
        self._outbox.post(epoch, step, values, told | (self._edge or {}))

    def deliver(self) -> None:
        """Tell all that was posted, waiting for the device."""
        self._outbox.deliver(wait=True)

    def epoch(
        self, row: dict[str, Any], model: nn.Module, classes: tuple[str, ...], *, last: bool
    ) -> None:
        """Tell of an epoch, and show pictures if their turn has come."""
        every, now = self._config.monitor.pictures_every, row["steps"]
        if every is None:
            due = now // _PICTURE_STEPS > (now - self._steps) // _PICTURE_STEPS
        else:
            due = every > 0 and row["epoch"] % every == 0
        if self.listeners and (due or (last and every != 0)):
            seen = self._monitor.pictures(model, classes)
            for listener in self.listeners:
                listener.on_pictures(row, seen)
        for listener in self.listeners:
            listener.on_epoch(row)

    def end(self) -> None:
        """The run ends or stops."""
        for listener in self.listeners:
            listener.on_end()

    def _edge_now(
        self, epoch: int, step: int, model: nn.Module, optimizer: Optimizer, weights: Perturbation
    ) -> dict[str, float] | None:
        """How this step stands to the edge of stability, if that is looked at now.

        One process looks; the others wait for it in their next step.
        """
        asked = self._config.monitor.edge
        if asked is None:
            return None
        steps = asked.unit == "steps"
        number = epoch * self._steps + step if steps else epoch
        if number % asked.every or (step and not steps):
            return None
        return self._monitor.at_edge(model, optimizer, weights) if self.listeners else {}
