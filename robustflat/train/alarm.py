"""The alarm for catastrophic overfitting: robust validation accuracy that collapses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robustflat.config.schema import AlarmConfig


class Alarm:
    """Watches robust validation accuracy from epoch to epoch.

    Single-step adversarial training can lose all its robustness within an epoch while the loss of
    its own attack goes on falling (Wong et al. 2020, section 5.4). Robust overfitting is slower and
    does not raise the alarm: in the logs of Rice et al. 2020 it costs a fifth of the best accuracy
    in a hundred epochs. Nor do the ups and downs of the first epochs, before the best is twice
    that of guessing.

    Args:
        config: what is a collapse, and what to do then.
        classes: how many there are.
    """

    def __init__(self, config: AlarmConfig, classes: int) -> None:
        self._config = config
        self._guessing = 1 / classes
        self._best = 0.0
        # The collapse after which the run went back, and the one that was just seen.
        self.raised: dict[str, Any] | None = None

    @property
    def can_go_back(self) -> bool:
        """Whether a collapse is answered by going back: once, if that is wanted."""
        return self._config.then == "restart" and self.steps is None

    @property
    def steps(self) -> int | None:
        """Steps of the stronger attack, once the run went back."""
        return None if self.raised is None else int(self.raised["steps"])

    def collapsed(self, robust: float, epoch: int) -> dict[str, Any] | None:
        """What happened if this, after ``epoch``, is a collapse; else remember the best."""
        known = self._best >= 2 * self._guessing
        if known and robust < (1 - self._config.drop) * self._best:
            return {
                "epoch": epoch,
                "robust_accuracy": robust,
                "best": self._best,
                "steps": self._config.steps,
            }
        self._best = max(self._best, robust)
        return None

    def sentence(self, collapse: dict[str, Any], best: Path | None) -> str:
        """Why the run ends, and what can be done."""
        kept = f" The best checkpoint is {best}." if best is not None else ""
        again = "" if self.raised is None else f", although the attack had {self.steps} steps"
        return (
            f"Robust validation accuracy fell from {collapse['best']:.1%} to "
            f"{collapse['robust_accuracy']:.1%} by epoch {collapse['epoch']}{again}: catastrophic "
            f"overfitting.{kept} Give the attack more steps, train with attack: nfgsm, or set "
            "train.alarm.then: restart."
        )

    def state_dict(self) -> dict[str, Any]:
        """What is remembered."""
        return {"best": self._best, "raised": self.raised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._best, self.raised = state["best"], state["raised"]
