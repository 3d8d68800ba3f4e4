"""The only code that writes weights in place, and that puts every bit of them back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustflat.perturb.sharded import part

Move = Callable[[list[Tensor]], None]


@contextmanager
def kept(tensors: Iterable[Tensor], *, on_error_only: bool = False) -> Iterator[list[Tensor]]:
    """Copy ``tensors`` and, on exit, whatever happened inside, copy their values back.

    Args:
        tensors: what to keep.
        on_error_only: on a normal exit, leave them as they then are.

    Yields:
        The copies: the values at entry. Do not change them.
    """
    tensors = list(tensors)
    saved = [t.detach().clone() for t in tensors]
    failed = True
    try:
        yield saved
        failed = False
    finally:
        if failed or not on_error_only:
            try:
                _write(tensors, saved)
            except BaseException:
                # An interrupt can land in the restoring itself: finish it, then let it through.
                _write(tensors, saved)
                raise


@contextmanager
def buffers_kept(model: nn.Module, *, on_error_only: bool = False) -> Iterator[None]:
    """Keep every buffer of ``model``, such as BatchNorm's running statistics and counters.

    A buffer that a forward pass assigns anew, rather than changes in place, is put back too.
    """
    places = [
        (module._buffers, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    failed = True
    with kept([buffer for *_, buffer in places], on_error_only=on_error_only):
        try:
            yield
            failed = False
        finally:
            if failed or not on_error_only:
                for buffers, name, buffer in places:
                    buffers[name] = buffer


@contextmanager
def displaced(parameters: Iterable[Tensor], *, carry: bool = False) -> Iterator[Move]:
    """Lend ``parameters`` to be moved around their present values, the centre.

    Args:
        parameters: leaf tensors; each should appear once (``model.parameters()`` sees to that).
        carry: on a normal exit, subtract the last displacement instead of restoring the centre, so
            that an optimizer step taken inside is kept (the order of AWP's released code). Costs
            one more copy of the displacement. After an exception the centre is restored.

    Yields:
        ``move(delta)``, which puts the parameters at centre + delta. Displacements do not add up:
        each starts from the centre, so nothing drifts.
    """
    parameters = list(parameters)
    last: list[Tensor] = []

    with kept(parameters) as centre:

        def move(delta: list[Tensor]) -> None:
            _write(parameters, centre, delta)
            if carry:
                last[:] = delta

        yield move
        if carry and last:
            # The result becomes the centre that `kept` writes back; in one assignment, so that
            # a failure before it leaves the old centre.
            with torch.no_grad():
                centre[:] = torch._foreach_sub(parameters, last)


@torch.no_grad()
def _write(tensors: list[Tensor], values: list[Tensor], delta: list[Tensor] | None = None) -> None:
    if not tensors:
        return
    held = [part(t, t) for t in tensors]
    torch._foreach_copy_(held, [part(v, t) for v, t in zip(values, tensors, strict=True)])
    if delta is not None:
        torch._foreach_add_(held, [part(d, t) for d, t in zip(delta, tensors, strict=True)])
    # Inside an autocast region, low-precision copies of the weights are cached: without this the
    # model would go on computing with the old ones.
    torch.clear_autocast_cache()
