"""What is looked at between epochs; looking never changes the training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.config import RunConfig
from robustflat.config.perturbations import NoAttackConfig
from robustflat.data.split import proportional
from robustflat.evaluate.accuracy import measure
from robustflat.flatness import flatness
from robustflat.perturb import InputPerturbation, evaluating, pgd
from robustflat.train.randomness import derived_seed


class Monitor:
    """Clean and robust loss and accuracy on fixed images, in eval mode, at the centre weights.

    Args:
        config: of the run; the attack has its norm and eps and ``monitor.steps`` steps.
        splits: images and labels of each split, ``[N, C, H, W]`` in [0, 1] and ``[N]``.
        device: where to compute.
    """

    def __init__(
        self,
        config: RunConfig,
        splits: dict[str, tuple[Tensor, Tensor]],
        device: torch.device,
    ) -> None:
        self._splits = splits
        self._device = device
        self._seed = config.seed
        self._config = config.monitor
        self._batch_size = config.evaluate.batch_size
        self.attack = monitoring_attack(config, config.monitor.steps)

    def __call__(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Measure every split, always with the same random starts."""
        return {name: self._measure(model, *split) for name, split in self._splits.items()}

    def flatness(self, model: nn.Module) -> dict[str, float | None]:
        """The configured flatness measures, on training images; no bit of the training changes."""
        x, y = self._splits["train"]
        # All classes by their shares: the images may be sorted by class.
        chosen = proportional(y.cpu(), min(self._config.flatness_samples, len(y)), seed=0)
        chosen = chosen.to(y.device)
        x, y = x[chosen].to(self._device), y[chosen].to(self._device)
        # Without a training attack eps is 0, and the robust loss is the clean one.
        attack = self.attack or pgd("linf", 0.0)
        with evaluating(model):
            found = flatness(
                model,
                (x, y),
                self._config.flatness,
                seed=self._seed,
                batch_size=self._batch_size,
                attack=attack,
            )
        return {name: figure.value for name, figure in found.items()}

    def _measure(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for rows in range(0, len(y), self._batch_size):
                part = slice(rows, rows + self._batch_size)
                yield x[part].to(self._device), y[part].to(self._device)

        clean = measure(model, batches())
        found = {"clean_accuracy": clean.accuracy, "clean_loss": clean.loss}
        if self.attack is not None:
            generator = torch.Generator(self._device)
            generator.manual_seed(derived_seed(self._seed, "monitor"))
            robust = measure(model, batches(), attack=self.attack, generator=generator)
            found |= {"robust_accuracy": robust.accuracy, "robust_loss": robust.loss}
        return found


def monitoring_attack(config: RunConfig, steps: int) -> InputPerturbation | None:
    """PGD with the norm and eps of the training attack; None if the run has none."""
    if isinstance(config.attack, NoAttackConfig):
        return None
    return pgd(config.attack.norm, config.attack.eps, steps)


def score(measured: dict[str, Any]) -> float:
    """What the best checkpoint is chosen by: robust validation accuracy, or clean without one."""
    validation = measured["validation"]
    return float(validation.get("robust_accuracy", validation["clean_accuracy"]))
