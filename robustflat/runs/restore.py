"""A finished (or interrupted) run read back: configuration, images, network at a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from robustflat.config import RunConfig
from robustflat.config.perturbations import NoAttackConfig
from robustflat.data import Data
from robustflat.errors import UserError
from robustflat.train.checkpoint import load_checkpoint
from robustflat.train.folder import RunFolder
from robustflat.train.setup import build_model, load_data, resolve_device, use_threads

CheckpointName = Literal["best", "last"]
CHECKPOINTS: tuple[CheckpointName, ...] = ("best", "last")
WeightsName = Literal["auto", "raw", "average"]


@dataclass(frozen=True, eq=False)
class Network:
    """A run's network at one checkpoint, in eval mode."""

    model: nn.Module
    epoch: int
    weights: str


class Run:
    """A run's folder with what can be made from it.

    Args:
        root: the folder.
        device: where its networks shall be; "auto" is a GPU if there is one.

    Raises:
        UserError: if the folder is no run.
    """

    def __init__(self, root: str | Path, device: str = "auto") -> None:
        self.folder = RunFolder(root)
        self.config: RunConfig = self.folder.read_config()
        self.device = resolve_device(device)
        use_threads(self.config)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.name

    @cached_property
    def data(self) -> Data:
        """The images, split as they were for training.

        Raises:
            UserError: if they are no longer there.
        """
        return load_data(self.config)

    def threat(self) -> tuple[str | float, float]:
        """Norm and eps of the attack that the run trained against.

        Raises:
            UserError: if it trained without one.
        """
        attack = self.config.attack
        if isinstance(attack, NoAttackConfig):
            raise UserError(
                f"{self.folder.root} was trained without an attack, so it names no norm and eps to "
                "evaluate at. Say them: --norm linf --eps 8/255."
            )
        return attack.norm, attack.eps

    def checkpoints(self) -> list[CheckpointName]:
        """The checkpoints that the run has."""
        return [name for name in CHECKPOINTS if self._file(name).is_file()]

    def network(self, checkpoint: CheckpointName, weights: WeightsName = "auto") -> Network:
        """The network at a checkpoint.

        Args:
            checkpoint: "best" by robust validation accuracy, or "last".
            weights: "raw", their "average" (EMA or SWA), or "auto": the average if there is one.

        Raises:
            UserError: if the checkpoint is missing or damaged, or has no average.
        """
        saved = load_checkpoint(self._file(checkpoint))
        average = saved["average_model"]
        if weights == "average" and average is None:
            raise UserError(
                f"The checkpoint {self._file(checkpoint)} holds no averaged weights: the run has "
                "no train.average, or had not begun to average. Use --weights raw."
            )
        averaged = average is not None and weights != "raw"
        model = build_model(self.config, self.data, self.device)
        try:
            model.load_state_dict(average if averaged else saved["model"])
        except RuntimeError as error:
            raise UserError(
                f"The checkpoint {self._file(checkpoint)} does not fit the model of "
                f"{self.folder.config_file}: {str(error).splitlines()[-1].strip()} Was the "
                "configuration edited?"
            ) from None
        model.eval()
        return Network(model, saved["epoch"], "average" if averaged else "raw")

    def train_tensors(self, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A fixed, un-augmented choice of training images."""
        return self.data.train.tensors(min(limit, len(self.data.train)))

    def test_tensors(self, limit: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The test images, or a fixed choice of them."""
        test = self.data.test
        return test.tensors(None if limit is None else min(limit, len(test)))

    def _file(self, checkpoint: CheckpointName) -> Path:
        return self.folder.best if checkpoint == "best" else self.folder.last
