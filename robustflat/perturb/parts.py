"""A batch that passes through the network in parts, whose graphs never stand together."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from robustflat.perturb.sharded import is_sharded


def slices(rows: int, parts: int) -> list[slice]:
    """``rows`` cut into so many parts, whose sizes differ by one at most.

    No part of several is smaller than two rows: BatchNorm could not normalise it.
    """
    count = max(1, min(parts, rows // 2))
    ends = [rows * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


def accumulated(
    loss: Callable[[slice], Tensor],
    parts: list[slice],
    model: nn.Module,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """The mean loss of all rows, with one part's graph in memory at a time.

    Its gradient is taken part by part at once, at the present weights, and handed on by whatever
    ``backward`` or ``autograd.grad`` follows, so that a weight perturbation climbs and descends
    the loss of the whole batch. Needs one copy of the gradients, and no further pass.

    Args:
        loss: maps rows of the batch to their mean loss.
        parts: the rows of each part.
        model: its trainable parameters have the gradient.
        scaler: a gradient scaler for float16, by which the parts' backward passes are scaled.

    Returns:
        A scalar with gradient (once differentiable, with respect to parameters alone).

    Raises:
        ValueError: if processes hold parts of the weights.
    """
    rows = parts[-1].stop - parts[0].start
    shares = [(part.stop - part.start) / rows for part in parts]
    if not torch.is_grad_enabled():
        return torch.stack([loss(p) * s for p, s in zip(parts, shares, strict=True)]).sum()
    if is_sharded(model):
        raise ValueError(
            "accumulate takes gradients part by part, which a model of fully_shard gives in .grad "
            "alone. Use smaller batches, or more processes."
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    value: Tensor = _Accumulated.apply(loss, parts, shares, scaler, *parameters)
    return value


class _Accumulated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss: Callable[[slice], Tensor],
        parts: list[slice],
        shares: list[float],
        scaler: torch.amp.GradScaler | None,
        *parameters: Tensor,
    ) -> Tensor:
        values: list[Tensor] = []
        total: list[Tensor | None] = [None] * len(parameters)
        for part, share in zip(parts, shares, strict=True):
            with torch.enable_grad():
                value = loss(part) * share
                scaled = value if scaler is None else scaler.scale(value)
                found = torch.autograd.grad(scaled, parameters, allow_unused=True)
            values.append(value.detach())
            total = [_sum(a, b) for a, b in zip(total, found, strict=True)]
        ctx.gradients = total
        ctx.unit = None if scaler is None else scaler.scale(torch.ones_like(values[0]))
        return torch.stack(values).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        factor = outer[0] if ctx.unit is None else outer[0] / ctx.unit
        gradients = [None if g is None else g * factor for g in ctx.gradients]
        return (None, None, None, None, *gradients)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Not in place: autograd may return one tensor for two parameters."""
    return b if a is None else a if b is None else a + b
