"""Owns the compiled model that attacks search with; what they find, the eager model judges."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from robustflat.perturb.compiled import Compiled, check_compiler

_log = logging.getLogger("robustflat.evaluate")


@contextmanager
def compiled(
    model: nn.Module, shape: tuple[int, ...], device: torch.device
) -> Iterator[nn.Module | None]:
    """A held model compiled for batches of any size; None, with a warning, where that cannot be.

    Args:
        model: In eval mode, frozen.
        shape: Of an image.
        device: Where it is.
    """
    # Some attacks go back through one pass several times, which needs its buffers.
    with torch._functorch.config.patch(donated_buffer=False):
        yield _tried(model, shape, device)


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
