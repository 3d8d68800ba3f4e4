"""Owns the directions and planes of weight space along which a landscape is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.flatness.options import Options
from robustflat.flatness.spectrum import Hessian, largest
from robustflat.flatness.subject import LossKind, Subject
from robustflat.perturb import SCALES, Ball

State = Mapping[str, Tensor]


def filter_normalised(
    subject: Subject, named: Mapping[str, Tensor], count: int
) -> list[list[Tensor]]:
    """Random directions whose every filter has the norm of the model's (Li et al. 2018).

    They depend on the seed and the shapes alone but for that norm, so that models of one
    architecture are seen along the same directions.
    """
    weights = [p.detach() for p in named.values()]
    scale = SCALES["row_norm"](list(named), weights)
    assert scale is not None
    ball = Ball(2.0, 1.0, "row")
    found = []
    for index in range(count):
        u = subject.draw(partial(ball.sample, surface=True), weights, "direction", index)
        found.append(list(torch._foreach_mul(u, scale)))
    return found


def eigenvectors(
    subject: Subject, options: Options, named: Mapping[str, Any], loss: LossKind, count: int
) -> list[list[Tensor]]:
    """The Hessian's top eigenvectors, each as long as the weights that it moves.

    A coordinate is then a relative displacement, as it is for filter-normalised directions. The
    sign is such that the largest entry is positive.
    """
    hessian = Hessian(
        subject.closure(options, "clean" if loss == "clean" else "robust_fixed"), dict(named)
    )
    pairs = largest(
        hessian,
        count,
        tolerance=options.tolerance,
        max_hvps=options.max_hvps,
        seed=subject.generator("lanczos", "directions").initial_seed() % 2**32,
    )
    if len(pairs.values) < count:
        raise UserError(
            f"Only {len(pairs.values)} of {count} eigenvectors converged within {options.max_hvps} "
            "Hessian-vector products. Raise max_hvps, or tolerance."
        )
    length = float(torch.stack([p.detach().norm() for p in named.values()]).norm())
    found = []
    for column in torch.from_numpy(pairs.vectors.copy()).T:
        sign = 1.0 if column[column.abs().argmax()] >= 0 else -1.0
        found.append(hessian.split(column * (sign * length)))
    return found


class Span:
    """The line or plane through two or three states of one model (Garipov et al. 2018).

    Coordinates are distances in weight space from the first state: the first axis points to the
    second state, the second is orthogonal to it. Floating-point buffers go along by the same
    affine combination, cut to the range that the states have.

    Args:
        states: state dicts by label, two or three.
        model: tells which entries are parameters.

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
        first, *rest = states.values()
        self.first = first
        self._states = list(states.values())
        self.moved = {n: p for n, p in model.named_parameters() if n in first}
        self._buffers = {
            n: b for n, b in model.named_buffers() if n in first and b.is_floating_point()
        }
        edges = [self._difference(other, first, self.moved) for other in rest]
        self._sides = [self._difference(other, first, self._buffers) for other in rest]
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
        """The affine weights of the second (and third) state at given coordinates."""
        length = self._corners[1][0]
        if len(at) == 1:
            return [at[0] / length]
        along, height = self._corners[2]
        third = at[1] / height
        return [(at[0] - third * along) / length, third]

    @torch.no_grad()
    def set_buffers(self, at: Sequence[float]) -> None:
        """Interpolate the model's floating-point buffers at given coordinates."""
        for index, (name, buffer) in enumerate(self._buffers.items()):
            value = self.first[name].to(buffer)
            for share, side in zip(self.shares(at), self._sides, strict=True):
                value = value + side[index] * share
            ends = [state[name].to(buffer) for state in self._states]
            low, high = torch.stack(ends).aminmax(dim=0)
            buffer.copy_(value.clamp(low, high))

    @staticmethod
    def _difference(a: State, b: State, like: Mapping[str, Tensor]) -> list[Tensor]:
        return [a[name].to(tensor) - b[name].to(tensor) for name, tensor in like.items()]


def copied(state: State | nn.Module) -> dict[str, Any]:
    """A state that does not change with the model, of which it may be the very tensors."""
    entries = state.state_dict() if isinstance(state, nn.Module) else state
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in entries.items()}


def _check_fit(states: Mapping[str, State], model: nn.Module) -> None:
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items() if _is_tensor(t)}
    for label, state in states.items():
        got = {name: tuple(t.shape) for name, t in state.items() if _is_tensor(t)}
        if got != wanted:
            odd = sorted(set(got.items()) ^ set(wanted.items()))
            raise UserError(
                f"The checkpoint {label!r} does not fit the model: {odd[0][0]} is missing, "
                "additional or of another shape. A landscape needs checkpoints of one architecture."
            )


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(s * t).sum() for s, t in zip(a, b, strict=True)]).sum()


def _norm(a: list[Tensor]) -> float:
    return math.sqrt(float(_dot(a, a)))
