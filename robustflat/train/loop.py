"""The training loop: epochs, checkpoints and resuming; everything else is called from here."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from robustflat.config import RunConfig
from robustflat.data import Data
from robustflat.errors import TrainingDivergedError, UserError
from robustflat.numerics import deterministic, float32, warn_of_emulation
from robustflat.perturb import Perturbation, no_perturbation
from robustflat.train.account import Account
from robustflat.train.alarm import Alarm
from robustflat.train.around import stop_signals
from robustflat.train.averaging import Average
from robustflat.train.checkpoint import load_checkpoint, save_checkpoint
from robustflat.train.curriculum import Curriculum
from robustflat.train.drift import Drift
from robustflat.train.feed import Feed
from robustflat.train.folder import RunFolder
from robustflat.train.listeners import Listener
from robustflat.train.monitor import Monitor, score, training_loss
from robustflat.train.parallel import Processes, replica, synchronised
from robustflat.train.randomness import derived_seed
from robustflat.train.setup import build_model, build_step
from robustflat.train.step import Autocast, TrainStep
from robustflat.train.teller import Teller

Ending = Literal["stop_at_loss", "patience"]  # keys of `train`
_CHECK_EVERY = 50  # steps between two looks, which wait for the device


class Trainer:
    """One run, from its configuration to its last checkpoint.

    Args:
        config: the whole run.
        dataset: its images.
        device: where to train.
        folder: where to write, or None to write nothing.
        processes: this process among those that train together.
        listeners: told of every step and epoch.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Data,
        device: torch.device,
        *,
        folder: RunFolder | None = None,
        processes: Processes | None = None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self.config, self.device, self.folder = config, device, folder
        self.processes = processes or Processes()
        self.stop_requested = self.requeue_requested = False

        self.model = build_model(config, dataset, device)
        if config.train.sync_batchnorm and self.processes.world > 1:
            self.model = synchronised(self.model, device)
        self._replica: nn.Module = self.model
        if self.processes.world > 1:
            self._replica = replica(self.model, device)
        if config.train.precision == "bf16" and self.processes.is_first:
            warn_of_emulation(device)
        self._step = build_step(config, self.model, device, dataset.shape)
        self._objective = self._step.objective
        self._objective.start(Autocast(self.model, self._step.precision))
        self._curriculum = Curriculum(config)
        alarm = config.train.alarm
        self._alarm = None if alarm is None else Alarm(alarm, len(dataset.classes))
        self._drift = Drift(self.model)
        self._weights = config.weights.build()
        average = config.train.average
        self.average = None if average is None else Average(average.build(), self.model)
        self._lr_factor = config.schedule.build()

        self._feed = Feed(config, dataset, device, self.processes, self._weights)
        self.steps_per_epoch = self._feed.steps_per_epoch
        seen = min(config.monitor.train_samples, len(dataset.train))
        splits = {"train": dataset.train.tensors(seen)}
        if dataset.validation is not None:
            splits["validation"] = dataset.validation.tensors()
        self._classes = tuple(map(str, dataset.classes))
        self._monitor = Monitor(config, splits, device, self.processes)
        self.teller = Teller(
            config, listeners, self._monitor, self.processes, device, self.steps_per_epoch
        )

        # What a checkpoint holds of each, under this name.
        self._parts: dict[str, Any] = {
            "model": self.model,
            "optimizer": self._step.optimizer,
            "scaler": self._step.scaler,
            "weights": self._weights,
            "objective": self._objective,
            "alarm": self._alarm,
            "drift": self._drift,
            "average": self.average,
        }
        self.epoch, self.step = 0, 0
        self.best: dict[str, Any] | None = None
        self.ended: Ending | None = None
        self._account = Account(device)
        self._seconds = 0.0

    def run(self) -> bool:
        """Train to the end, or until a SIGTERM or SIGUSR1. Returns whether the end was reached.

        Raises:
            TrainingDivergedError: if loss or gradient is not finite and the policy is to stop.
        """
        self.teller.start(self.epoch, self.step)
        try:
            with (
                float32(tf32=self.config.train.precision == "tf32"),
                deterministic(self.config.train.deterministic),
                stop_signals(self._ask_to_stop, kept_after_a_fault=self.processes.world > 1),
            ):
                while self.epoch < self.config.train.epochs and self.ended is None:
                    if not self._train_epoch():
                        self._save_last()
                        return False
                    self._end_epoch()
        finally:
            self.teller.end()
        return True

    def resume(self) -> bool:
        """Go on from the last checkpoint, if there is one. Returns whether there was."""
        if self.folder is None:
            return False
        saved = self._read(self.folder.last)
        if saved is None:
            return False
        with self.processes.together():
            self._go_on_from(saved, self.folder)
        return True

    def _read(self, path: Path) -> dict[str, Any] | None:
        """A checkpoint, the same for all processes whatever the disks of other hosts hold."""
        saved: dict[str, Any] | None = None
        with self.processes.together():
            if self.processes.is_first and path.is_file():
                saved = load_checkpoint(path)
        return self.processes.from_first(saved)

    def _go_on_from(self, saved: dict[str, Any], folder: RunFolder) -> None:
        here = self.processes.world
        world = saved.get("world", here)
        if world != here:
            raise UserError(
                f"The run {folder.root} was begun by {world} process(es) and cannot go on with "
                f"{here}: each draws its own random starts and normalises its own "
                "rows, so the figures would be another run's. Resume it with "
                f"{'torchrun --nproc-per-node=' + str(world) if world > 1 else 'one process'}, or "
                "train anew with --overwrite."
            )
        lacks = [name for name, part in self._parts.items() if part is not None]
        lacks = [name for name in (*lacks, "ended", "totals") if name not in saved]
        if lacks:
            raise UserError(
                f"The checkpoint {folder.last} has no {' and no '.join(lacks)}: another version of "
                "robustflat wrote it, from which this one cannot go on exactly. Go on with that "
                "version, or train anew with --overwrite."
            )
        try:
            self._restore(saved)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = str(error).splitlines()[-1].strip().rstrip(".")
            raise UserError(
                f"The checkpoint {folder.last} does not fit this run: {reason}. It was not "
                "written by it. Train anew with --overwrite, or put the run's own back."
            ) from None

    def _restore(self, saved: dict[str, Any]) -> None:
        for name, part in self._parts.items():
            if part is not None:
                part.load_state_dict(saved[name])
        if self._alarm is not None:
            self._curriculum.strengthen(self._alarm.steps)
        self.epoch, self.step, self.best = saved["epoch"], saved["step"], saved["best"]
        self.ended = saved["ended"]
        self._account.totals = saved["totals"].to(self.device)
        self._seconds = saved["seconds"]

    def _train_epoch(self) -> bool:
        """Take the remaining steps of the epoch. Returns whether it was finished."""
        config, began = self.config, time.monotonic()
        generator, of_weights = torch.Generator(self.device), torch.Generator(self.device)
        # Where all processes climb together, they start from the same point.
        apart = self.processes.rank if config.weights.step.sync == "local" else 0
        saved_at = time.monotonic()
        self._replica.train()
        self.teller.restart_clock()
        for batches in self._feed.batches(self.epoch, self.step):
            where = (self.epoch, self.step, self.processes.rank)
            torch.manual_seed(derived_seed(config.seed, "global", *where))
            generator.manual_seed(derived_seed(config.seed, "attack", *where))
            of_weights.manual_seed(derived_seed(config.seed, "weights", *where[:2], apart))
            length = 1 / self.steps_per_epoch
            factor = self._lr_factor(self.epoch + self.step * length, config.train.epochs, length)
            for group in self._step.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            weights = self._weights_now(factor)
            if weights.is_off:  # n-SAM's further batches are climbed only
                batches = batches[:1]
            share = self._feed.share(self.step)
            step, optimizer = self._step_now(), self._step.optimizer
            looking = self.teller.look(self.epoch, self.step, self.model, optimizer, weights)
            began += self.teller.aside
            with looking:
                value, norm = step(
                    self._replica,
                    batches,
                    weights,
                    generator,
                    of_weights,
                    share,
                )
            self.processes.share_buffers(self.model)
            self._objective.after_step(self.model, self.epoch, self.processes.mean)
            # The loss of all rows, in every process, so that the first one's checkpoint is all's.
            self._account.add(self.processes.mean(value), norm, self.step)
            if self.average is not None:
                self.average.after_step(self.model, self.epoch)
            lr = float(optimizer.param_groups[0]["lr"])
            self.teller.step(self.epoch, self.step, norm, share, lr, weights, step.attack)
            self.step += 1
            if self.step % _CHECK_EVERY == 0 or self.step == self.steps_per_epoch:
                self._check_finite()
                self.teller.deliver()
            if self._should_stop():
                self._seconds += time.monotonic() - began
                return False
            if time.monotonic() - saved_at > 60 * config.train.checkpoint_minutes:
                self._save_last()
                saved_at = time.monotonic()
        self._seconds += time.monotonic() - began
        return True

    def _end_epoch(self) -> None:
        """Measure, record and save what the epoch made."""
        config = self.config
        self._objective.after_epoch(self.model, self.epoch)
        if self.average is not None:
            self.average.after_epoch(self.model, self.epoch)
        row = self._row() | {"batchnorm_drift": self._drift()}
        self.epoch, self.step = self.epoch + 1, 0
        self._account.totals.zero_()
        self._seconds = 0.0
        measured: dict[str, Any] = {}
        last, every = self.epoch == config.train.epochs, config.monitor.every
        monitored = every > 0 and (last or self.epoch % every == 0)
        if last or monitored:
            self._refresh_average()
        if monitored:
            measured = self._measure()
        row["monitor"] = measured.get("raw")
        row["monitor_average"] = measured.get("average")
        chosen = measured.get("average") or measured.get("raw")
        if self._alarm is not None:
            row["alarm"] = self._alarm.raised
            collapse = measured and self._alarm.collapsed(score(measured["raw"]), self.epoch)
            if collapse:
                self._go_back(self._alarm, row | {"alarm": collapse, "is_best": False})
                return
        if config.monitor.flatness_every and self.epoch % config.monitor.flatness_every == 0:
            row["flatness"] = self._monitor.flatness(self.model)
        row["is_best"] = bool(chosen and "validation" in chosen and self._is_best(score(chosen)))
        if row["is_best"]:
            assert chosen is not None
            self.best = {"epoch": self.epoch, "score": score(chosen)}
        if self.best is not None and chosen and "validation" in chosen:
            row["best_minus_last"] = self.best["score"] - score(chosen)
        row["ended"] = self.ended = self._ending(measured)
        if self.processes.is_first and self.folder is not None:
            if row["is_best"]:
                save_checkpoint(self.folder.best, self._weights_state())
            self.folder.append_metrics(row)
        # Before the checkpoint: an epoch told and then not saved is told again on resuming.
        over = last or self.ended is not None
        self.teller.epoch(row, self.model, self._classes, last=over)
        self._save_last()
        if self._alarm is not None and self._alarm.can_go_back and measured:
            self._save(self.folder.good if self.folder else None)
        self.processes.wait()

    def _go_back(self, alarm: Alarm, row: dict[str, Any]) -> None:
        """Leave the epochs since the last good one behind, and go on with a stronger attack.

        Raises:
            TrainingDivergedError: if that is not asked for, or was done before.
        """
        folder = self.folder
        good = self._read(folder.good) if alarm.can_go_back and folder is not None else None
        if good is None:
            best = folder.best if folder is not None and folder.best.is_file() else None
            raise TrainingDivergedError(alarm.sentence(row["alarm"], best))
        self.teller.epoch(row, self.model, self._classes, last=False)
        self.teller.end()
        self._restore(good)
        alarm.raised = row["alarm"]
        self._curriculum.strengthen(alarm.steps)
        self._save_last()
        self.processes.wait()
        self.teller.start(self.epoch, self.step)

    def _refresh_average(self) -> None:
        """Make the average usable, if there is one that is not."""
        average = self.average
        if average is not None and average.needs_refresh:
            models = average.model, self.model
            inputs = self._feed.refresh_inputs(self._step_now(), *models, self.epoch)
            average.refresh(inputs, self.processes)

    def _measure(self) -> dict[str, Any]:
        """Figures of the raw and of the averaged weights."""
        measured = {"raw": self._monitor(self.model)}
        if self.average is not None and self.average.started:
            measured["average"] = self._monitor(self.average.model)
        return measured

    def _step_now(self) -> TrainStep:
        """The step, with the attack that it has come to."""
        attack = self._curriculum(self.epoch, self.step, self.steps_per_epoch)
        return replace(self._step, attack=attack)

    def _weights_now(self, factor: float) -> Perturbation:
        """The weight perturbation of this step."""
        when = self.config.weights.when
        done = self.epoch * self.steps_per_epoch + self.step
        over = when.until_epoch is not None and self.epoch >= when.until_epoch
        if self.epoch + 1 < when.from_epoch or over or done % when.every:
            return no_perturbation()
        return self._weights if when.radius == "constant" else self._weights.scaled(factor)

    def _check_finite(self) -> None:
        if self._step.skip_nonfinite or self._step.scaler is not None:
            return
        last = self.folder.last if self.folder is not None and self.folder.last.is_file() else None
        self._account.check(self.epoch, self.steps_per_epoch, last)

    def _row(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch + 1,
            "steps": (self.epoch + 1) * self.steps_per_epoch,
            "lr": self._step.optimizer.param_groups[0]["lr"],
            **self._account.figures(self.steps_per_epoch),
            "seconds": self._seconds,
        }

    def _ending(self, measured: dict[str, Any]) -> Ending | None:
        """Why the run is over before its last epoch, if it is."""
        limit, patience = self.config.train.stop_at_loss, self.config.train.patience
        if limit is not None and measured and training_loss(measured["raw"]) <= limit:
            return "stop_at_loss"
        waited = self.epoch - self.best["epoch"] if self.best is not None and measured else 0
        return "patience" if patience is not None and waited >= patience else None

    def _is_best(self, value: float) -> bool:
        return self.best is None or value > self.best["score"]

    def _weights_state(self) -> dict[str, Any]:
        average = self.average
        return {
            "config": self.config.model_dump(mode="json"),
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "average_model": average.model.state_dict() if average and average.usable else None,
        }

    def _save_last(self) -> None:
        self._check_finite()
        self._save(self.folder.last if self.folder else None)

    def _save(self, path: Path | None) -> None:
        if path is None or not self.processes.is_first:
            return
        parts = {name: part and part.state_dict() for name, part in self._parts.items()}
        save_checkpoint(
            path,
            self._weights_state()
            | parts
            | {
                "world": self.processes.world,
                "step": self.step,
                "best": self.best,
                "ended": self.ended,
                "totals": self._account.totals,
                "seconds": self._seconds,
            },
        )

    def _should_stop(self) -> bool:
        """Whether any process was asked to; all find out after the same step."""
        wish = self.processes.greatest(self.stop_requested + self.requeue_requested)
        self.stop_requested, self.requeue_requested = wish > 0, wish > 1
        return self.stop_requested

    def _ask_to_stop(self, signum: int) -> None:
        self.stop_requested = True
        self.requeue_requested |= signum == signal.SIGUSR1
