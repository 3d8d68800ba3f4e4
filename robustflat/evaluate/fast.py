"""Owns what a compiled search does otherwise; what it finds, the eager model judges."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn

from robustflat.perturb.compiled import Compiled, check_compiler

_log = logging.getLogger("robustflat.evaluate")


@contextmanager
def compiled(
    model: nn.Module, shape: tuple[int, ...], device: torch.device
) -> Iterator[nn.Module | None]:
    """A held model compiled for batches of any size; None, with a warning, where that cannot be.

    FAB's projection in linf, which on a small network takes longer than its passes, is then taken
    without a sort (`nearest_linf`).

    Args:
        model: In eval mode, frozen.
        shape: Of an image.
        device: Where it is.
    """
    # Some attacks go back through one pass several times, which needs its buffers.
    with torch._functorch.config.patch(donated_buffer=False):
        net = _tried(model, shape, device)
        if net is None:
            yield None
            return
        with patch("pyautoattack.fab_base.projection_linf", nearest_linf):
            yield net


def _tried(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> nn.Module | None:
    try:
        check_compiler(device)
        net = Compiled(model, any_size=True)
        some = torch.zeros(2, *shape, device=device)
        net(some)
        with torch.enable_grad():
            moved = some.clone().requires_grad_()
            torch.autograd.grad(net(moved).sum(), moved)
    except Exception as error:  # of as many types as there are causes
        _log.warning("The search is not compiled, and takes longer: %s", error)
        return None
    return net


def nearest_linf(points: Tensor, normals: Tensor, offsets: Tensor) -> Tensor:
    """The smallest step in linf from points of the box [0, 1] onto a hyperplane, inside the box.

    Every coordinate moves by the same length, or as far as the box lets it. How far that brings a
    point is a concave, piecewise linear function of the length, of which Newton's method finds the
    root in a few passes over the coordinates; the sort of FAB's own projection takes four times as
    long (Croce & Hein 2020, "Minimally distorted adversarial examples", appendix).

    Args:
        points: [N, D], in [0, 1].
        normals: Of the hyperplanes, [N, D].
        offsets: Theirs, [N]: a point x lies on its hyperplane where normal . x = offset.

    Returns:
        Steps [N, D]: onto the hyperplane, or as near to it as the box allows.
    """
    lack = offsets - (normals * points).sum(1)
    rises = normals * torch.where(lack > 0, 1.0, -1.0)[:, None] > 0
    size = normals.abs()
    room = torch.where(rises, 1 - points, points) * (size > 0)
    need, length = lack.abs(), torch.zeros_like(lack)
    # From below it never passes the root, and ends: every step but the last closes a coordinate.
    while True:
        reached = torch.minimum(room, length[:, None])
        slope = (size * (room > length[:, None])).sum(1)
        further = (need - (size * reached).sum(1)).clamp(min=0) / slope
        longer = torch.where(slope > 0, length + further, length)
        if not (longer > length).any():
            return torch.where(rises, reached, -reached)
        length = longer
