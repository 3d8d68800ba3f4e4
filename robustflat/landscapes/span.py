"""Owns the line or plane of weight space through checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

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
        first, *rest = self._states = list(states.values())
        model.load_state_dict(dict(first))
        self.moved = {n: p for n, p in model.named_parameters() if n in first}
        self._buffers = {
            n: b for n, b in model.named_buffers() if n in first and b.is_floating_point()
        }
        edges = [[o[n].to(p) - first[n].to(p) for n, p in self.moved.items()] for o in rest]
        lengths = [_norm(edge) for edge in edges]
        if min(lengths) == 0:
            raise UserError(
                f"Two of the checkpoints {', '.join(self._labels)} have the same weights, so there "
                "is nothing between them."
            )
        axes = [list(torch._foreach_div(edges[0], lengths[0]))]
        self._corners = [(0.0,) * len(edges), (lengths[0], 0.0)[: len(edges)]]
        if len(edges) == 2:
            along = float(_dot(edges[1], axes[0]))
            across = list(torch._foreach_sub(edges[1], torch._foreach_mul(axes[0], along)))
            height = _norm(across)
            if height < 1e-6 * lengths[1]:
                raise UserError(
                    f"The checkpoints {', '.join(self._labels)} lie on one line in weight space, "
                    "so they span no plane. Draw the line between two of them."
                )
            axes.append(list(torch._foreach_div(across, height)))
            self._corners.append((along, height))
        self.axes = axes

    @property
    def points(self) -> dict[str, tuple[float, ...]]:
        """Each state's coordinates."""
        return dict(zip(self._labels, self._corners, strict=True))

    def shares(self, at: Sequence[float]) -> list[float]:
        """The weight of each state in the affine combination at given coordinates; they add to 1.

        At a state it is 1 and the others' are 0, without rounding.
        """
        length = self._corners[1][0]
        if len(at) == 1:
            rest = [at[0] / length]
        else:
            along, height = self._corners[2]
            third = at[1] / height
            rest = [(at[0] - third * along) / length, third]
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


def _norm(a: list[Tensor]) -> float:
    return math.sqrt(float(_dot(a, a)))
