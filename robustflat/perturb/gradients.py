"""Gradients of a closure with respect to chosen weights, alone or among processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robustflat.perturb.displace import buffers_kept
from robustflat.perturb.sharded import is_sharded


def bare(model: nn.Module) -> nn.Module:
    """The model itself, whose parameters' names have no wrapper's prefix."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def precise(t: Tensor) -> Tensor:
    """``t``, in float32 where it is of lower precision: the ball's arithmetic needs it."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def unsynchronised(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which backward passes leave each process its own gradient."""
    if not isinstance(model, DistributedDataParallel):
        return nullcontext()
    context: AbstractContextManager[None] = model.no_sync()
    return context


def synchronises(model: nn.Module) -> bool:
    """Whether a backward pass would now average gradients over the processes."""
    return isinstance(model, DistributedDataParallel) and model.require_backward_grad_sync


@torch.no_grad()
def average(tensors: list[Tensor]) -> None:
    """Replace tensors by their means over all processes."""
    for tensor in tensors:
        dist.all_reduce(tensor)
    if tensors:
        torch._foreach_div_(tensors, dist.get_world_size())


def average_climbed(model: nn.Module, value: Tensor, gradient: list[Tensor]) -> list[Tensor]:
    """Replace ``value`` by its mean over all processes, and return that of ``gradient``."""
    if isinstance(model, DistributedDataParallel):
        gradient = [t.clone() for t in gradient]
        average([value, *gradient])
    elif is_sharded(model):  # which has averaged the gradient itself
        average([value])
    return gradient


def average_grads(model: nn.Module) -> None:
    """Replace every ``.grad`` by its mean over all processes."""
    average([p.grad for p in model.parameters() if p.grad is not None])


def check_wrapper(model: nn.Module) -> None:
    """Refuse a wrapper under which several passes a step go wrong without a word.

    Raises:
        ValueError: for DistributedDataParallel with a static graph, and for the older FSDP.
    """
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError(
            "FullyShardedDataParallel (FSDP1) lays many weights into one flat tensor, in which a "
            "weight perturbation finds no layers. Use torch.distributed.fsdp.fully_shard."
        )
    if isinstance(model, DistributedDataParallel) and model.static_graph:
        raise ValueError(
            "DistributedDataParallel(static_graph=True) counts on one forward pass a step, but a "
            "weight perturbation makes several, so the replicas would drift apart. Leave "
            "static_graph out."
        )


def take(
    closure: Callable[[], Tensor],
    model: nn.Module,
    parameters: list[nn.Parameter],
    scaler: torch.amp.GradScaler | None,
    *,
    updates: bool,
) -> tuple[Tensor, list[Tensor]]:
    """A loss and its gradient, in each process of its own rows: the only place that takes one.

    Args:
        closure: the scalar loss, with gradient.
        model: whose buffers and synchronisation are held.
        parameters: with respect to which; one that plays no part has the gradient 0.
        scaler: a gradient scaler for float16; what is returned is not scaled.
        updates: whether the forward pass may change buffers.
    """
    keep = nullcontext() if updates else buffers_kept(model)
    with torch.enable_grad(), unsynchronised(model), keep:
        if is_sharded(model):  # whose weights are in no graph: only .grad is filled
            with set_aside(model, returns=True):
                value = closure()
                value.backward()
                found = tuple(p.grad for p in parameters)
        else:
            value = closure()
            scaled = value if scaler is None else scaler.scale(value)
            found = torch.autograd.grad(scaled, parameters, allow_unused=True)
    gradient = [
        torch.zeros_like(precise(p)) if g is None else precise(g)
        for p, g in zip(parameters, found, strict=True)
    ]
    return value.detach(), unscaled(gradient, scaler)


def unscaled(gradient: list[Tensor], scaler: torch.amp.GradScaler | None) -> list[Tensor]:
    """``gradient`` without the factor of ``scaler``."""
    if scaler is None or not gradient:
        return gradient
    unit = scaler.scale(torch.ones((), device=gradient[0].device))
    return list(torch._foreach_div(gradient, unit))


@contextmanager
def set_aside(model: nn.Module, *, returns: bool = False) -> Iterator[None]:
    """Let a gradient be made in empty ``.grad``; then add it to what ``.grad`` held before.

    After an exception, and if it ``returns`` anyhow, ``.grad`` is as it was.
    """
    earlier = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in earlier:
        parameter.grad = None
    try:
        yield
    except BaseException:
        returns = True
        raise
    finally:
        if returns:
            for parameter, gradient in earlier:
                parameter.grad = gradient
    with torch.no_grad():
        for parameter, gradient in earlier:
            if gradient is not None and not returns:
                new, parameter.grad = parameter.grad, gradient
                if new is not None:
                    gradient.add_(new)
