"""What the trainer, and any loop, asks of a weight perturbation, wrapped or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Loss = Callable[..., Tensor]
Sync = Literal["local", "global"]


class Perturbation:
    """A gradient estimator: what to descend instead of the gradient at the present weights.

    The base of one's own: a subclass writes :meth:`backward`, and overrides what else is not so of
    it.

    Attributes:
        name: as reports call it.
        parameters: the selection of weights that it moves.
        batches: how many batches a step looks at; the first is descended.
    """

    name: str = "own"
    parameters: str = "all"
    batches: int = 1

    @property
    def is_off(self) -> bool:
        """Whether nothing is perturbed and nothing extra computed."""
        return False

    @property
    def passes(self) -> int:
        """Forward and backward passes of the next :meth:`backward`; the last is the descent."""
        return 2

    @property
    def wants_rows(self) -> bool:
        """Whether the closure must return one loss a row, ``[N]``, because examples are chosen."""
        return False

    @property
    def splits(self) -> bool:
        """Whether parts of the batch have perturbed weights of their own; closures take slices."""
        return False

    @property
    def least_rows(self) -> int:
        """The smallest batch it can work on."""
        return 1

    @property
    def remembers(self) -> bool:
        """Whether a step depends on the steps before it, so that this object serves one model."""
        return False

    def backward(
        self,
        loss: Loss,
        model: nn.Module,
        *,
        rows: int | None = None,
        generator: torch.Generator | None = None,
        scaler: torch.amp.GradScaler | None = None,
        step: Callable[[], object] | None = None,
    ) -> Tensor:
        """Add the gradient to descend to ``.grad``; leave the weights as they were.

        Args:
            loss: computes the loss of the batch from ``model``'s present weights, with gradient.
            model: holds the parameters, perhaps in DistributedDataParallel.
            rows: rows in the batch, for those that split it.
            generator: source of randomness, on the model's device.
            scaler: a gradient scaler for float16, by which ``.grad`` is to be scaled.
            step: to be called while the weights stand perturbed, with ``.grad`` ready.

        Returns:
            The loss at the perturbed weights, a detached scalar.

        Raises:
            NotImplementedError: unless a subclass says how.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method backward.")

    def scaled(self, factor: float) -> Perturbation:
        """The same method, its memory included, with ``factor`` times the radius.

        Raises:
            ValueError: if it has none.
        """
        raise ValueError(f"{self.name} has no radius that could be scaled. Use radius: constant.")

    def synchronised(self, sync: Sync) -> Perturbation:
        """The same method, each process climbing its own rows ("local") or all the whole batch.

        Raises:
            ValueError: if it knows only the former.
        """
        if sync != "local":
            raise ValueError(f"{self.name} climbs in each process by itself. Use sync: local.")
        return self

    def state_dict(self) -> dict[str, Any]:
        """What it remembers from step to step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""


def radius_of(method: object) -> float | None:
    """The radius of a method's ball, or of the method's within it; None where there is none."""
    ball = getattr(getattr(method, "inner", method), "ball", None)
    return None if ball is None else float(ball.radius)
