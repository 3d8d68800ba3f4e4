"""What every training objective is: a loss a row, and perhaps a memory from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, get_type_hints

from torch import Tensor, nn

from robustflat.bounds import refuse

# The mean of a tensor over the processes that train together.
Mean = Callable[[Tensor], Tensor]


def alone(value: Tensor) -> Tensor:
    """The mean over a single process: ``value`` itself."""
    return value


class Objective:
    """What is climbed by the weight adversary and descended by the optimizer: one closure.

    A subclass writes :meth:`rows`. One that remembers something from step to step keeps it itself,
    apart from its settings, and overrides the six methods after it; whoever trains calls them::

        objective.start(model)
        for epoch, ...:
            for x, y in batches:
                ...
                optimizer.step()
                objective.after_step(model, epoch)
            objective.after_epoch(model, epoch)
    """

    # What its own inner maximisation over inputs uses, where the user does not say.
    attack_options: ClassVar[Mapping[str, Any]] = {"loss": "ce", "start": "normal"}
    # Whether it looks at adversarial images, and whether it looks at clean ones.
    needs_attack: ClassVar[bool] = True
    sees_clean: ClassVar[bool] = True
    # Whether it is defined for labels that are probabilities, and whether it is a mean over rows.
    takes_soft_labels: ClassVar[bool] = True
    has_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse settings, of a dataclass, outside the bounds of their annotations."""
        kind = type(self)
        hints: dict[str, Any] = {}
        with suppress(NameError):  # one of a user's may name what is not imported
            hints = get_type_hints(kind, include_extras=True)
        for name, hint in hints.items():
            refuse(kind.__name__, name, getattr(self, name), getattr(hint, "__metadata__", ()))

    def __call__(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar with gradient; see :meth:`rows`."""
        return self.rows(model, x, x_adv, y).mean()

    def rows(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The loss of every row.

        Args:
            model: maps images to logits ``[N, C]``.
            x: clean images ``[N, ...]``.
            x_adv: adversarial images, of the same shape.
            y: labels, int64 ``[N]`` or soft ``[N, C]``.

        Returns:
            ``[N]``, with gradient.

        Raises:
            ValueError: if the objective is no mean over rows, or is not defined for these labels.
        """
        raise NotImplementedError(f"The objective {type(self).__name__} has no method rows.")

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is seen inside are the parts of one batch, in one pass."""
        yield

    def start(self, model: nn.Module) -> None:
        """Begin to remember, before the first step; ``model`` has its initial weights."""

    def after_step(self, model: nn.Module, epoch: int = 0, mean: Mean = alone) -> None:
        """Remember what a step showed.

        Args:
            model: the network after the optimizer's step.
            epoch: the epoch of the step, from 0.
            mean: the mean of a tensor over the processes that train together.
        """

    def after_epoch(self, model: nn.Module, epoch: int = 0) -> None:
        """Remember what ``epoch`` (from 0) showed, after its last step."""

    def state_dict(self) -> dict[str, Any]:
        """What is remembered: tensors and plain values, equal on all processes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, after :meth:`start`."""


class FromFunction(Objective):
    """Any function of model, images, adversarial images and labels as an objective.

    Args:
        function: returns the loss of a batch, a scalar with gradient.
    """

    has_rows: ClassVar[bool] = False

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function

    def __call__(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """What the function returns."""
        return self._function(model, x, x_adv, y)
