"""Weights of which every process holds a part: torch's fully_shard (FSDP2) and its DTensors.

DTensors reckon with the whole: the norm of one is that of all its parts. What is not so of them,
gradients (``autograd.grad`` does not see them), writing in place and drawing at random, is here, in
:mod:`robustflat.perturb.gradients`, ``displace`` and ``ball``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of the model's parameters."""
    # FSDP2 adds it to the model's class; importing its module would cost half a second.
    return any(hasattr(m, "set_requires_gradient_sync") for m in model.modules())


def placed(tensor: Any, like: Any) -> Any:
    """``tensor`` cut into parts as ``like`` is: what was computed may be cut otherwise."""
    if not hasattr(like, "device_mesh") or tensor.placements == like.placements:
        return tensor
    return tensor.redistribute(like.device_mesh, like.placements)


def part(tensor: Any, like: Any) -> Tensor:
    """The part of ``tensor`` that this process holds of it as of ``like``, sharing its storage."""
    local: Tensor = placed(tensor, like).to_local() if hasattr(like, "device_mesh") else tensor
    return local


@contextmanager
def parts_only(model: nn.Module) -> Iterator[None]:
    """Let go of weights that a forward pass put together, before and after.

    Whatever is written meanwhile would not reach them, and the next pass would compute with them.
    """
    try:
        _let_go(model)
        yield
    finally:
        _let_go(model)


def _let_go(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "set_requires_gradient_sync"):
            module.reshard()


def check_sharded(method: Any, model: nn.Module, *, scaled: bool) -> None:
    """Refuse what does not work, or means something else, on parts of weights.

    Raises:
        ValueError: saying what.
    """
    if not is_sharded(model):
        return
    why = ""
    if method.sync != "global":
        why = (
            "cannot let each process climb by itself (sync='local') where all hold parts of the "
            'same weights. Use .synchronised("global")'
        )
    elif scaled:
        why = "takes no gradient scaler. Use bfloat16 (MixedPrecisionPolicy), or leave it out"
    elif any(p.device_mesh.size() != dist.get_world_size() for p in _sharded(model)):
        why = (
            "needs all processes to hold parts of every parameter: those of a pipeline, or of "
            "several models, would wait for each other. Shard over all of them"
        )
    elif any(not hasattr(p, "device_mesh") for p in model.parameters() if p.requires_grad):
        why = "needs all parameters sharded: wrap the whole model by fully_shard too"
    elif method.ball.norm == 1 and not method.ascent.stays_inside:
        why = "cannot be projected onto an l1 ball, for which entries are sorted. Use l2 or linf"
    if why:
        raise ValueError(f"{method.name} on a model of fully_shard {why}.")


def _sharded(model: nn.Module) -> Iterator[Any]:
    return (p for p in model.parameters() if hasattr(p, "device_mesh"))
