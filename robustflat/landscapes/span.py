"""Owns the line or plane of weight space through checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustflat.errors import UserError

State = Mapping[str, Tensor]


class Span:
    """The line or plane through two or three states of one model (Garipov et al. 2018).

    Coordinates are distances in weight space from the first state: the first axis points to the
    second state, the second is orthogonal to it. Floating-point buffers go along by the same
    affine combination, cut to the range that the states have.

    Args:
        states: state dicts by label, two or three.
        model: tells which entries are parameters; it is left with the first state.

    Raises:
        UserError: if the states do not fit the model, coincide or lie on one line.
    """

    def __init__(self, states: Mapping[str, State], model: nn.Module) -> None:
        if len(states) not in (2, 3):
            raise UserError(
                f"A landscape between checkpoints needs two (a line) or three (a plane), got "
                f"{len(states)}."
            )
        self._labels = list(states)
        _check_fit(states, model)
        first, *others = self._states = list(states.values())
        model.load_state_dict(dict(first))
        self.moved = {n: p for n, p in model.named_parameters() if n in first}
        self._buffers = {
            n: b for n, b in model.named_buffers() if n in first and b.is_floating_point()
        }
        edges = [[o[n].to(p) - first[n].to(p) for n, p in self.moved.items()] for o in others]
        # Gram-Schmidt: a state's coordinates are its components along the axes.
        self.axes: list[list[Tensor]] = []
        corners = []
        for edge in edges:
            along = [float(_dot(edge, axis)) for axis in self.axes]
            rest = edge
            for share, axis in zip(along, self.axes, strict=True):
                rest = list(torch._foreach_sub(rest, axis, alpha=share))
            height = math.sqrt(float(_dot(rest, rest)))
            if height <= 1e-6 * math.sqrt(float(_dot(edge, edge))):
                raise UserError(
                    f"Of the checkpoints {', '.join(self._labels)} some have the same weights or "
                    "lie on one line in weight space, so there is no "
                    f"{'line' if len(edges) == 1 else 'plane'} through them."
                )
            self.axes.append(list(torch._foreach_div(rest, height)))
            corners.append((*along, height))
        self._corners = [(*corner, 0.0)[: len(edges)] for corner in [(0.0,), *corners]]

    @property
    def points(self) -> dict[str, tuple[float, ...]]:
        """Each state's coordinates."""
        return dict(zip(self._labels, self._corners, strict=True))

    def shares(self, at: Sequence[float]) -> list[float]:
        """The weights, adding to 1, of the states whose affine combination lies at ``at``."""
        rest = np.linalg.solve(np.transpose(self._corners[1:]), np.array(at)).tolist()
        return [1 - sum(rest), *rest]

    @torch.no_grad()
    def set_buffers(self, at: Sequence[float]) -> None:
        """Interpolate the model's floating-point buffers at given coordinates."""
        for name, buffer in self._buffers.items():
            ends = torch.stack([state[name].to(buffer) for state in self._states])
            low, high = ends.aminmax(dim=0)
            value = torch.tensordot(ends.new_tensor(self.shares(at)), ends, dims=1)
            buffer.copy_(value.clamp(low, high))


def copied(state: State | nn.Module) -> dict[str, Any]:
    """A state that does not change with the model, of which it may be the very tensors."""
    entries = state.state_dict() if isinstance(state, nn.Module) else state
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in entries.items()}


def _check_fit(states: Mapping[str, State], model: nn.Module) -> None:
    for label, state in states.items():
        try:
            model.load_state_dict(dict(state))
        except RuntimeError as error:
            raise UserError(
                f"The checkpoint {label!r} does not fit the model: "
                f"{str(error).splitlines()[-1].strip()} A landscape needs checkpoints of one "
                "architecture."
            ) from None


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(s * t).sum() for s, t in zip(a, b, strict=True)]).sum()
