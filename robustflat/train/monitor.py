"""What is looked at between epochs; looking never changes the training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustflat.config import RunConfig
from robustflat.evaluate.accuracy import Metrics, joined, measure
from robustflat.flatness import flatness
from robustflat.perturb import InputPerturbation, Perturbation, evaluating, pgd
from robustflat.train.edge import Edge
from robustflat.train.parallel import Processes
from robustflat.train.pictures import Pictures, take
from robustflat.train.randomness import derived_seed


class Monitor:
    """Clean and robust loss and accuracy on fixed images, in eval mode, at the centre weights.

    Several processes share the batches (and the flatness measures) among them; the figures are
    those of one process, and every process gets them.

    Args:
        config: of the run; the attack has its norm and eps and ``monitor.steps`` steps.
        splits: images and labels of each split, ``[N, C, H, W]`` in [0, 1] and ``[N]``.
        device: where to compute.
        processes: this process among those that train together.
    """

    def __init__(
        self,
        config: RunConfig,
        splits: dict[str, tuple[Tensor, Tensor]],
        device: torch.device,
        processes: Processes,
    ) -> None:
        self._splits = splits
        self._processes = processes
        self._device = device
        self._seed = config.seed
        self._config = config.monitor
        self._batch_size = config.evaluate.batch_size
        self.attack = monitoring_attack(config, config.monitor.steps)
        self._edge: Edge | None = None

    def __call__(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Measure every split, always with the same random starts."""
        size, world = self._batch_size, self._processes.world
        batches = [(s, at) for s, (_, y) in self._splits.items() for at in range(0, len(y), size)]
        own = {
            (split, at): self._measure(model, split, slice(at, at + size))
            for split, at in batches[self._processes.rank :: world]
        }
        found = {key: pair for part in self._processes.gather(own) for key, pair in part.items()}
        measured: dict[str, dict[str, float]] = {}
        for split in self._splits:
            parts = [found[key] for key in batches if key[0] == split]
            clean = joined([pair[0] for pair in parts])
            measured[split] = {"clean_accuracy": clean.accuracy, "clean_loss": clean.loss}
            if self.attack is not None:
                robust = joined([pair[1] for pair in parts])
                measured[split]["robust_accuracy"] = robust.accuracy
                measured[split]["robust_loss"] = robust.loss
        return measured

    def flatness(self, model: nn.Module) -> dict[str, float | None]:
        """The configured flatness measures, on training images; no bit of the training changes."""
        x, y = self._splits["train"]
        x, y = x.to(self._device), y.to(self._device)
        # Without a training attack eps is 0, and the robust loss is the clean one.
        attack = self.attack or pgd("linf", 0.0)
        own = self._config.flatness[self._processes.rank :: self._processes.world]
        with evaluating(model):
            figures = (
                {}
                if not own
                else flatness(
                    model,
                    (x, y),
                    own,
                    seed=self._seed,
                    batch_size=self._batch_size,
                    attack=attack,
                    examples=min(self._config.flatness_samples, len(y)),
                )
            )
        values = {name: figure.value for name, figure in figures.items()}
        found = {name: v for part in self._processes.gather(values) for name, v in part.items()}
        return {name: found[name] for name in self._config.flatness}

    def at_edge(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, weights: Perturbation
    ) -> dict[str, float]:
        """How the curvature stands to the edge of stability; this process alone looks."""
        asked = self._config.edge
        assert asked is not None
        if self._edge is None:
            x, y = self._splits["train"]
            self._edge = Edge(
                (x, y), asked.samples, self.attack, self._batch_size, self._seed, asked.max_hvps
            )
        return self._edge(model, optimizer, weights)

    def pictures(self, model: nn.Module, classes: tuple[str, ...]) -> Pictures:
        """Examples, and the loss along a line; this process alone looks."""
        return take(
            model,
            self._splits,
            classes,
            self.attack,
            self._device,
            seed=self._seed,
            batch_size=self._batch_size,
        )

    def _measure(self, model: nn.Module, split: str, rows: slice) -> list[Metrics]:
        """What the clean images of a batch give, and the attacked ones if there is an attack."""
        x, y = (t[rows].to(self._device) for t in self._splits[split])
        clean = measure(model, [(x, y)])
        if self.attack is None:
            return [clean]
        generator = torch.Generator(self._device)
        generator.manual_seed(derived_seed(self._seed, "monitor", rows.start))
        return [clean, measure(model, [(x, y)], self.attack, generator)]


def monitoring_attack(config: RunConfig, steps: int) -> InputPerturbation | None:
    """PGD with the norm and eps of the training attack; None if the run has none."""
    return None if config.threat is None else pgd(*config.threat, steps)


def score(measured: dict[str, Any]) -> float:
    """What the best checkpoint is chosen by: robust validation accuracy, or clean without one."""
    validation = measured["validation"]
    return float(validation.get("robust_accuracy", validation["clean_accuracy"]))


def training_loss(figures: dict[str, dict[str, float]]) -> float:
    """What ``train.stop_at_loss`` is held against: the robust loss, or the clean one without it."""
    train = figures["train"]
    return train.get("robust_loss", train["clean_loss"])
