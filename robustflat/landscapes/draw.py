"""Draws landscapes: the loss around a model's weights, or on the line or plane through models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.evaluate.record import fingerprint_of_state
from robustflat.flatness.examples import Data
from robustflat.flatness.subject import LossKind
from robustflat.flatness.undisturbed import undisturbed
from robustflat.landscapes.directions import DIRECTIONS, RANDOM, Random, eigenvectors, gradient
from robustflat.landscapes.record import Landscape
from robustflat.landscapes.scene import Common, Place, Scene
from robustflat.landscapes.span import Span, State, copied
from robustflat.perturb import displaced, kept

if TYPE_CHECKING:
    from typing_extensions import Unpack


def landscape(
    model: nn.Module,
    data: Data,
    *,
    directions: str = "filter",
    dimensions: int = 1,
    draws: int = 1,
    span: float | None = None,
    points: int | None = None,
    parameters: str = "matrices",
    direction_loss: Literal["clean", "robust"] = "clean",
    **common: Unpack[Common],
) -> Landscape:
    """The loss around the model's weights along one or two directions.

    The defaults draw the weight-loss landscape of Wu et al. (2020): filter-normalised random
    directions, adversarial examples remade at every point.

    Args:
        model: maps images in [0, 1] to logits. It is left as it was, bit for bit.
        data: as :func:`robustflat.flatness.flatness` takes it.
        directions: random ones, each filter ("filter", Li et al. 2018), tensor ("layer") or all
            weights together ("global") as long as the model's; "eigenvectors" of the Hessian, the
            top first; or the "gradient" of the loss, in one dimension.
        dimensions: 1 or 2.
        draws: how many random directions (in two dimensions, pairs), for a mean and a spread.
        span: the grid reaches from -span to span, in norms of the weights; 1, or 0.05 along
            eigenvectors and the gradient.
        points: along each axis, odd so that the centre is one; 21, or 11 in two dimensions.
        parameters: which weights move: "matrices", "all", or as `perturb.select` takes it.
        direction_loss: of which loss the eigenvectors or the gradient are, the robust one at fixed
            adversarial examples.
        **common: see :class:`robustflat.landscapes.Common`.

    Returns:
        Losses and accuracies on the grid.

    Raises:
        UserError: for settings that cannot work.
    """
    if dimensions not in (1, 2):
        raise UserError(f"A landscape has 1 or 2 dimensions, got {dimensions}.")
    if directions not in DIRECTIONS:
        raise UserError(f"directions must be one of {', '.join(DIRECTIONS)}, got {directions!r}.")
    if direction_loss not in ("clean", "robust"):
        raise UserError(f"direction_loss must be clean or robust, got {direction_loss!r}.")
    if directions == "gradient" and dimensions == 2:
        raise UserError("There is one gradient: draw it in one dimension, or other directions.")
    if draws < 1 or (draws > 1 and directions not in RANDOM):
        raise UserError(
            f"draws must be at least 1, and 1 for {directions}, got {draws}: several are drawn of "
            f"random directions ({', '.join(RANDOM)})."
        )
    count = (21 if dimensions == 1 else 11) if points is None else points
    if count < 3 or count % 2 == 0:
        raise UserError(
            f"points must be odd and at least 3, so that the model itself is one, got {count}."
        )
    title, usual = DIRECTIONS[directions]
    reach = usual if span is None else span
    if not 0 < reach < float("inf"):
        raise UserError(f"span must be positive and finite, got {reach}.")
    axis = [reach * (2 * i - count + 1) / (count - 1) for i in range(count)]
    with undisturbed(model):
        aimed = directions not in RANDOM
        scene = Scene(
            model, data, ("keep", "refresh"), common,
            attacked=aimed and direction_loss == "robust",
        )  # fmt: skip
        subject = scene.subject
        named = subject.parameters(scene.options, parameters)

        def prepare() -> Place:
            ways = _ways(scene, named, directions, dimensions, parameters, direction_loss)
            return lambda draw, at: move(_combine(ways(draw), at))

        with displaced(named.values()) as move:
            return scene.draw(
                axes=(axis,) * dimensions,
                names=(title,) if dimensions == 1 else (f"{title} 1", f"{title} 2"),
                points={"model": (0.0,) * dimensions},
                about={
                    "directions": directions,
                    "direction_loss": direction_loss if aimed else None,
                    "parameters": parameters,
                    "span": reach,
                },
                draws=draws,
                prepare=prepare,
            )


def between(
    model: nn.Module,
    states: Mapping[str, State | nn.Module],
    data: Data,
    *,
    margin: float = 0.25,
    points: int | None = None,
    **common: Unpack[Common],
) -> Landscape:
    """The loss on the line through two checkpoints or the plane through three.

    Coordinates are distances in weight space. BatchNorm's statistics are interpolated unless
    ``batchnorm`` says otherwise (and never reach beyond those of the checkpoints, as a variance
    must stay positive); between independent checkpoints only "refresh" is fair to the weights.

    Args:
        model: of the checkpoints' architecture; its own weights do not matter and stay.
        states: two or three state dicts, or models, by label.
        data: as :func:`landscape` takes it.
        margin: how far the grid reaches beyond the checkpoints, relative to their extent.
        points: along each axis; 25, or 13 in a plane. With these and the margin as it is, the ends
            of a line are points of the grid.
        **common: see :class:`robustflat.landscapes.Common`.

    Returns:
        Losses and accuracies on the grid, with the checkpoints' coordinates.

    Raises:
        UserError: for settings that cannot work or checkpoints that do not fit.
    """
    if not 0 <= margin < float("inf"):
        raise UserError(f"margin must be finite and at least 0, got {margin}.")
    dicts = {label: copied(state) for label, state in states.items()}
    with undisturbed(model), kept([*model.parameters(), *model.buffers()]):
        span = Span(dicts, model)
        count = (25 if len(span.axes) == 1 else 13) if points is None else points
        if count < 2:
            raise UserError(f"points must be at least 2, got {count}.")
        scene = Scene(model, data, ("interpolate", "refresh", "keep"), common)
        with displaced(span.moved.values()) as move:

            def place(draw: int, at: Sequence[float]) -> None:
                move(_combine(span.axes, at))
                if scene.batchnorm == "interpolate":
                    span.set_buffers(at)

            return scene.draw(
                axes=tuple(
                    _axis([corner[i] for corner in span.points.values()], margin, count)
                    for i in range(len(span.axes))
                ),
                names=("distance", "distance across")[: len(span.axes)],
                points=span.points,
                about={"directions": "checkpoints", "parameters": "all", "margin": margin},
                prepare=lambda: place,
                states=[fingerprint_of_state(state) for state in dicts.values()],
            )


def _ways(
    scene: Scene,
    named: Mapping[str, nn.Parameter],
    directions: str,
    dimensions: int,
    parameters: str,
    direction_loss: LossKind,
) -> Callable[[int], list[list[Tensor]]]:
    """From the number of a draw to its directions, one an axis; made at the centre."""
    subject = scene.subject
    if directions in RANDOM:
        source = Random(named, directions)
        return lru_cache(maxsize=1)(
            lambda draw: [
                source.draw(subject.generator("direction", axis, draw))
                for axis in range(dimensions)
            ]
        )
    options = replace(scene.options, parameters=parameters, k=dimensions)

    def made() -> list[list[Tensor]]:
        if directions == "gradient":
            return [gradient(subject, options, direction_loss, named)]
        return eigenvectors(subject, options, direction_loss, named)

    # The processes of a team must go the same way to the last bit, each on its own device.
    found = scene.team.once(lambda: [[t.cpu() for t in way] for way in made()])
    ways = [[t.to(p) for t, p in zip(way, named.values(), strict=True)] for way in found]
    return lambda draw: ways


def _combine(ways: list[list[Tensor]], at: Sequence[float]) -> list[Tensor]:
    total = list(torch._foreach_mul(ways[0], at[0]))
    for way, coordinate in zip(ways[1:], at[1:], strict=True):
        torch._foreach_add_(total, way, alpha=coordinate)
    return total


def _axis(corners: list[float], margin: float, count: int) -> list[float]:
    low, extent = min(corners), max(corners) - min(corners)
    # In this order 0, the first checkpoint's coordinate, is met exactly where the grid has it.
    return [low + extent * (i * (1 + 2 * margin) / (count - 1) - margin) for i in range(count)]
