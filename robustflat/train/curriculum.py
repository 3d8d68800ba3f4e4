"""The attack of a step: how it grows over the training, and what an alarm made of it."""

from __future__ import annotations

from robustflat.config import RunConfig
from robustflat.perturb import InputPerturbation, pgd


class Curriculum:
    """The attack as a function of epoch and step.

    Args:
        config: of the run; its attack must have an eps for whatever here is not constant.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._grow = config.attack.curriculum
        self._strong: int | None = None
        overrides = [s.model_dump(exclude_none=True) for s in self._grow.stages]
        self._stages = [(0, config.attack)] + [
            (o.pop("from_epoch") - 1, config.attack.model_copy(update=o)) for o in overrides
        ]
        self._build()

    def strengthen(self, steps: int | None) -> None:
        """From here on attack by PGD with so many steps; None is the configured attack."""
        if steps != self._strong:
            self._strong = steps
            self._build()

    def __call__(self, epoch: int, step: int, steps: int) -> InputPerturbation | None:
        """The attack of a step.

        Args:
            epoch: of the step, from 0.
            step: of the epoch, from 0.
            steps: of an epoch.
        """
        attack = next(a for start, a in reversed(self._attacks) if epoch >= start)
        if attack is None or self._grow.warmup_epochs == 0:
            return attack
        done = epoch + 1 if self._grow.by == "epoch" else epoch + step / steps
        share = max(self._grow.start, min(done / self._grow.warmup_epochs, 1.0))
        return attack if share == 1.0 else attack.scaled(share)

    def _build(self) -> None:
        self._attacks: list[tuple[int, InputPerturbation | None]] = []
        needed = self._config.objective.build().needs_attack
        for start, section in self._stages:
            if not needed:
                attack = None
            elif self._strong is None:
                attack = section.build()
            else:
                more = {k: getattr(section, k) for k in ("loss", "mode") if k in section.own}
                attack = pgd(section.norm, section.eps, self._strong, **more)
            self._attacks.append((start, attack))
