"""Owns landscapes: the loss on a grid of weights along directions or between checkpoints."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.flatness.batchnorm import recompute_statistics
from robustflat.flatness.closure import Kind, attack_cost
from robustflat.flatness.directions import Span, State, copied, eigenvectors, filter_normalised
from robustflat.flatness.examples import Data, read_examples
from robustflat.flatness.figure import UNITS, Cost, Passes, Progress
from robustflat.flatness.grid import Landscape
from robustflat.flatness.measuring import check_model
from robustflat.flatness.options import Options
from robustflat.flatness.store import Store, fingerprint, tensors_digest
from robustflat.flatness.subject import LossKind, Subject
from robustflat.flatness.undisturbed import undisturbed
from robustflat.perturb import InputPerturbation, displaced, kept, pgd

Directions = Literal["filter", "eigenvectors"]
_SPANS: dict[str, float] = {"filter": 1.0, "eigenvectors": 0.05}
_NAMES = {
    "filter": "filter-normalised random direction",
    "eigenvectors": "eigenvector of the Hessian",
}
_log = logging.getLogger("robustflat.flatness")
# Sets the model to a point of the grid.
_Place = Callable[[tuple[float, ...]], None]


def landscape(
    model: nn.Module,
    data: Data,
    *,
    directions: Directions = "filter",
    dimensions: int = 1,
    span: float | None = None,
    points: int | None = None,
    losses: Sequence[LossKind] = ("clean", "robust"),
    eps: float = 8 / 255,
    norm: str | float = "linf",
    attack: InputPerturbation | None = None,
    seed: int = 0,
    batch_size: int = 128,
    examples: int | None = None,
    parameters: str = "matrices",
    hessian: Literal["clean", "robust"] = "clean",
    recompute_batchnorm: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    store: str | os.PathLike[str] | None = None,
) -> Landscape:
    """The loss around the model's weights along one or two directions.

    The defaults draw the weight-loss landscape of Wu et al. (2020): filter-normalised random
    directions, adversarial examples remade at every point. Models measured with the same seed are
    seen along the same directions and from the same attack starts.

    Args:
        model: maps images in [0, 1] to logits. It is left as it was, bit for bit.
        data: as :func:`robustflat.flatness.flatness` takes it.
        directions: "filter" or "eigenvectors" (of the Hessian).
        dimensions: 1 or 2.
        span: the grid reaches from -span to span, in norms of the weights; 1 (filter) or 0.05.
        points: along each axis, odd so that the centre is one; 21, or 11 in two dimensions.
        losses: any of "clean", "robust" (examples remade at every point), "robust_fixed" (those of
            the centre).
        eps: of the attack.
        norm: of the attack.
        attack: ``rf.pgd(norm, eps, steps=10)`` if None.
        seed: of directions and attack starts.
        batch_size: examples in a pass.
        examples: take the first so many.
        parameters: which weights move.
        hessian: whose eigenvectors.
        recompute_batchnorm: at every point, set BatchNorm's statistics from the clean images.
        on_progress: told how far it has come.
        store: a JSON file that keeps finished points, to be resumed.

    Returns:
        Losses and accuracies on the grid.

    Raises:
        UserError: for settings that cannot work.
    """
    if dimensions not in (1, 2):
        raise UserError(f"A landscape has 1 or 2 dimensions, got {dimensions}.")
    if directions not in _SPANS:
        raise UserError(f"directions must be one of {get_args(Directions)}, got {directions!r}.")
    count = (21 if dimensions == 1 else 11) if points is None else points
    if count < 3 or count % 2 == 0:
        raise UserError(
            f"points must be odd and at least 3, so that the model itself is one, got {count}."
        )
    reach = _SPANS[directions] if span is None else span
    if not 0 < reach < float("inf"):
        raise UserError(f"span must be positive and finite, got {reach}.")
    axis = [reach * (2 * i - count + 1) / (count - 1) for i in range(count)]
    about = {"directions": directions, "parameters": parameters, "hessian": hessian}
    with undisturbed(model):
        scene = _Scene(
            model, data, losses, eps, norm, attack, seed, batch_size, examples,
            recompute_batchnorm, (axis,) * dimensions, about, on_progress, store,
        )  # fmt: skip
        named = scene.subject.parameters(scene.options, parameters)
        if directions == "filter":
            ways = filter_normalised(scene.subject, named, dimensions)
        else:
            ways = eigenvectors(scene.subject, scene.options, named, hessian, dimensions)
        names = tuple(f"{_NAMES[directions]} {i + 1}" for i in range(dimensions))
        with displaced(named.values()) as move:
            return scene.draw(
                lambda at: move(_combine(ways, at)), names, {"model": (0.0,) * dimensions}
            )


def between(
    model: nn.Module,
    states: Mapping[str, State | nn.Module],
    data: Data,
    *,
    margin: float = 0.25,
    points: int | None = None,
    losses: Sequence[LossKind] = ("clean", "robust"),
    eps: float = 8 / 255,
    norm: str | float = "linf",
    attack: InputPerturbation | None = None,
    seed: int = 0,
    batch_size: int = 128,
    examples: int | None = None,
    recompute_batchnorm: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    store: str | os.PathLike[str] | None = None,
) -> Landscape:
    """The loss on the line through two checkpoints or the plane through three.

    Coordinates are distances in weight space. BatchNorm's statistics are combined like the
    weights (and never reach beyond those of the checkpoints, as a variance must stay positive), or
    recomputed; between independent checkpoints only the latter is fair to the weights.

    Args:
        model: of the checkpoints' architecture; its own weights do not matter and stay.
        states: two or three state dicts, or models, by label.
        data: as :func:`landscape` takes it.
        margin: how far the grid reaches beyond the checkpoints, relative to their extent.
        points: along each axis; 25, or 13 in a plane. With these and the margin as it is, the ends
            of a line are points of the grid.
        losses: as there; "robust_fixed" takes the first checkpoint's examples.
        eps: as there.
        norm: as there.
        attack: as there.
        seed: as there.
        batch_size: as there.
        examples: as there.
        recompute_batchnorm: as there.
        on_progress: as there.
        store: as there.

    Returns:
        Losses and accuracies on the grid, with the checkpoints' coordinates.

    Raises:
        UserError: for settings that cannot work or checkpoints that do not fit.
    """
    if not 0 <= margin < float("inf"):
        raise UserError(f"margin must be finite and at least 0, got {margin}.")
    dicts = {label: copied(state) for label, state in states.items()}
    held = [*model.parameters(), *model.buffers()]
    with undisturbed(model), kept(held):
        span = Span(dicts, model)
        model.load_state_dict(dict(span.first))
        count = (25 if len(span.axes) == 1 else 13) if points is None else points
        if count < 2:
            raise UserError(f"points must be at least 2, got {count}.")
        axes = tuple(
            _axis([corner[i] for corner in span.points.values()], margin, count)
            for i in range(len(span.axes))
        )
        about = {
            "directions": "checkpoints",
            "parameters": "all",
            "checkpoints": {label: tensors_digest(state)[:16] for label, state in dicts.items()},
        }
        scene = _Scene(
            model, data, losses, eps, norm, attack, seed, batch_size, examples,
            recompute_batchnorm, axes, about, on_progress, store,
        )  # fmt: skip
        with displaced(span.moved.values()) as move:

            def place(at: tuple[float, ...]) -> None:
                move(_combine(span.axes, at))
                span.set_buffers(at)

            names = tuple(f"distance {i + 1}" for i in range(len(axes)))
            return scene.draw(place, names, span.points)


class _Scene:
    """What both kinds of landscape share: the examples, the losses and the walk over the grid."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        losses: Sequence[LossKind],
        eps: float,
        norm: str | float,
        attack: InputPerturbation | None,
        seed: int,
        batch_size: int,
        examples: int | None,
        recompute_batchnorm: bool,
        axes: tuple[list[float], ...],
        about: Mapping[str, Any],
        on_progress: Callable[[Progress], None] | None,
        store: str | os.PathLike[str] | None,
    ) -> None:
        unknown = [loss for loss in losses if loss not in get_args(LossKind)]
        if unknown or not losses:
            raise UserError(
                f"losses must be some of {', '.join(get_args(LossKind))}, got {tuple(losses)!r}."
            )
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        try:
            self.options = Options(attack=pgd(norm, eps, 10) if attack is None else attack)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from None
        x, y = read_examples(data, examples)
        check_model(model, x[:batch_size], y[:batch_size])
        self._model, self._losses, self._axes = model, list(dict.fromkeys(losses)), axes
        self._recompute = recompute_batchnorm
        self._about = {
            **about,
            "losses": self._losses,
            "seed": seed,
            "examples": len(x),
            "attack": repr(self.options.attack),
            "recompute_batchnorm": recompute_batchnorm,
        }
        self._on_progress, self._done = on_progress, 0.0
        self._cost = landscape_cost(
            tuple(map(len, axes)), len(x), self._losses, self.options.attack
        )
        _log.info("%s", self._cost)
        mark = ""
        if store is not None:
            mark = fingerprint(model, [x, y], {**self._about, "axes": axes})
        self.subject = Subject(
            model, x, y, batch_size=batch_size, seed=seed, store=Store(store, mark),
            count=self._count,
        )  # fmt: skip

    def draw(
        self, place: _Place, names: tuple[str, ...], points: Mapping[str, tuple[float, ...]]
    ) -> Landscape:
        # Fixed examples are made here, at the centre.
        closures = {loss: self.subject.closure(self.options, loss) for loss in self._losses}

        def at(coordinates: tuple[float, ...]) -> dict[str, list[float]]:
            place(coordinates)
            if self._recompute:
                recompute_statistics(self._model, self.subject.x, self.subject.batch_size)
            found: dict[str, list[float]] = {}
            for loss, closure in closures.items():
                values, right = closure.outcomes()
                found[loss] = [float(values.mean()), float(right.double().mean())]
            return found

        shape = tuple(map(len, self._axes))
        grids: dict[str, NDArray[np.float64]] = {
            loss: np.full((*shape, 2), np.nan) for loss in self._losses
        }
        for index in product(*(range(size) for size in shape)):
            coordinates = tuple(axis[i] for axis, i in zip(self._axes, index, strict=True))
            key = "/".join(map(str, index))
            # JSON has no infinity: a loss that overflows is kept as null.
            part = self.subject.part(key, partial(_finite, at, coordinates))
            for loss, pair in part.items():
                grids[loss][index] = [np.nan if v is None else v for v in pair]
        return Landscape(
            axes=self._axes,
            names=names,
            losses={loss: grid[..., 0] for loss, grid in grids.items()},
            accuracies={loss: grid[..., 1] for loss, grid in grids.items()},
            points=dict(points),
            about=self._about,
        )

    def _count(self, kind: Kind, examples: int) -> None:
        self._done += UNITS[kind] * examples / self._cost.examples
        if self._on_progress is not None:
            total = max(self._cost.total.units, self._done)
            self._on_progress(Progress(measure="landscape", done=self._done, total=total))


def landscape_cost(
    shape: tuple[int, ...], examples: int, losses: Sequence[LossKind], attack: InputPerturbation
) -> Cost:
    """What a landscape costs (without eigenvectors and BatchNorm's recomputing).

    Args:
        shape: points along each axis.
        examples: how many.
        losses: which.
        attack: of the robust losses.
    """
    size = float(np.prod(shape))
    making = Passes(**attack_cost(attack))
    each: dict[str, Passes] = {}
    for loss in losses:
        each[loss] = Passes(forward=size)
        if loss != "clean":
            each[loss] = each[loss] + making.times(size if loss == "robust" else 1)
    return Cost(examples=examples, measures=each, total=sum(each.values(), Passes()))


def _finite(
    at: Callable[[tuple[float, ...]], dict[str, list[float]]], coordinates: tuple[float, ...]
) -> dict[str, list[float | None]]:
    return {
        loss: [v if np.isfinite(v) else None for v in pair]
        for loss, pair in at(coordinates).items()
    }


def _combine(ways: list[list[Tensor]], at: Sequence[float]) -> list[Tensor]:
    total = list(torch._foreach_mul(ways[0], at[0]))
    for way, coordinate in zip(ways[1:], at[1:], strict=True):
        torch._foreach_add_(total, way, alpha=coordinate)
    return total


def _axis(corners: list[float], margin: float, count: int) -> list[float]:
    low, extent = min(corners), max(corners) - min(corners)
    # In this order 0, the first checkpoint's coordinate, is met exactly where the grid has it.
    return [low + extent * (i * (1 + 2 * margin) / (count - 1) - margin) for i in range(count)]
