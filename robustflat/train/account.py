"""The account of an epoch's steps, kept on the device: loss, gradient norm, what was not finite."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from robustflat.errors import TrainingDivergedError


class Account:
    """Totals over the steps of an epoch; adding to them does not wait for the device.

    Args:
        device: where they are kept.
    """

    def __init__(self, device: torch.device) -> None:
        # Sums of loss and norm over finite steps, their number, the first bad step (from 1).
        self.totals = torch.zeros(4, device=device, dtype=torch.float64)

    def add(self, value: Tensor, norm: Tensor, step: int) -> None:
        """Add a step (from 0) with its loss and gradient norm."""
        finite = torch.isfinite(norm)
        totals, zero = self.totals, torch.zeros_like(norm)
        totals[0] += torch.where(finite, value, zero)
        totals[1] += torch.where(finite, norm, zero)
        totals[2] += finite
        totals[3] = torch.where(finite | (totals[3] > 0), totals[3], step + 1)

    def check(self, epoch: int, steps: int, last: Path | None) -> None:
        """See whether every step was finite; waits for the device.

        Args:
            epoch: the epoch, from 0.
            steps: of an epoch.
            last: the last checkpoint, if there is one.

        Raises:
            TrainingDivergedError: if one was not.
        """
        bad = int(self.totals[3])
        if not bad:
            return
        good = f"The last good checkpoint is {last}." if last else "No checkpoint was written yet."
        raise TrainingDivergedError(
            f"Loss or gradient stopped being finite in epoch {epoch + 1}, step {bad} (batch "
            f"{bad} of {steps}). {good} Lower optimizer.lr or the radius of the weight "
            "perturbation, set optimizer.clip, or train.on_nonfinite: skip."
        )

    def figures(self, steps: int) -> dict[str, float | None]:
        """Mean loss and gradient norm over the finite steps, and how many were not."""
        loss, norm, count, _ = self.totals.tolist()
        return {
            "train_loss": loss / count if count else None,
            "gradient_norm": norm / count if count else None,
            "skipped_steps": steps - int(count),
        }
