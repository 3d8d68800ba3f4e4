"""What a weight perturbation knows within one step, and what it remembers from step to step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Trail:
    """What a step has found so far: all that the rules of a method may look at.

    Args:
        gradients: those taken so far, each a list like the perturbed parameters. The first is that
            at the centre weights, if they were visited; in the end the last is the descended one.
        losses: for closures that return one loss a row, those rows ``[N]`` at each of the points.
        memory: what :class:`Memory` held at the start of the step; None in the first.
        step: the number of steps before this one.
        generator: source of randomness, on the weights' device.
    """

    memory: list[Tensor] | None = None
    step: int = 0
    generator: torch.Generator | None = None
    gradients: list[list[Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)


# A rule of a method: from the trail to a list like the perturbed parameters.
Rule = Callable[[Trail], list[Tensor]]
# From the losses of all rows [N] at the present point to the scalar that is climbed or descended.
Choice = Callable[[Tensor, Trail], Tensor]


class Memory:
    """One tensor for every perturbed parameter, and the number of steps taken.

    It serves one model: with another one it begins anew. It moves to the device of the weights by
    itself.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] | None = None
        self.steps = 0
        self._owner: weakref.ref[nn.Parameter] | None = None

    def recall(self, parameters: list[nn.Parameter]) -> list[Tensor] | None:
        """The tensors, where the parameters are; None at the first step of a model.

        Raises:
            ValueError: if what was loaded does not fit the parameters.
        """
        owner = None if self._owner is None else self._owner()
        if self._owner is not None and owner is not parameters[0]:
            self.tensors, self.steps = None, 0
        self._owner = weakref.ref(parameters[0])
        if not self.tensors:
            return None
        if [t.shape for t in self.tensors] != [p.shape for p in parameters]:
            raise ValueError(
                f"What this weight perturbation remembers ({len(self.tensors)} tensors) does not "
                f"fit the {len(parameters)} parameters that it moves. Begin with a new one."
            )
        return [t.to(p.device) for t, p in zip(self.tensors, parameters, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: the tensors and the number of steps."""
        tensors = None if self.tensors is None else list(self.tensors)
        return {"steps": self.steps, "tensors": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, with the same model or its copy."""
        self.steps, tensors = int(state["steps"]), state["tensors"]
        self.tensors = None if tensors is None else list(tensors)
        self._owner = None

    def to(self, device: torch.device | str) -> None:
        """Move the tensors."""
        if self.tensors is not None:
            self.tensors = [t.to(device) for t in self.tensors]
