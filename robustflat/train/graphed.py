"""The attacked model's passes as CUDA graphs: recorded once, replayed by one launch each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from robustflat.errors import UserError, reason
from robustflat.perturb.modes import frozen

Pass = Callable[[Tensor], Tensor]


class Graphed(nn.Module):
    """A model whose passes for the gradient of the images are replayed from CUDA graphs.

    What is replayed are the kernels of the eager pass, at the weights as they are: the logits and
    the gradient are bit for bit the same, and the launches, on which a fast GPU waits, are gone.
    Each shape, precision and mode is recorded at its first pass. Passes without a gradient of the
    images are the model's own. A pass must be over, backward included, before the next begins.

    Args:
        model: the network, on a GPU; it stands in whatever mode the attack puts it.
        record: makes of a function of images, and images like those it will get, one that
            replays it.

    Source: CUDA graphs as in https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/.
    """

    def __init__(self, model: nn.Module, record: Callable[[Pass, Tensor], Pass] | None = None):
        super().__init__()
        self.model = model
        self._record = record or recorded
        self._within = list(model.modules())
        self._passes: dict[object, Pass] = {}
        self._addresses: list[int] = []
        self._turn = 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``x``.

        Raises:
            UserError: if passes overlap, or the model's pass cannot be recorded; torch then leaves
                the GPU's own random generator unusable in this process.
        """
        if not (x.requires_grad and torch.is_grad_enabled()):
            logits: Tensor = self.model(x)
            return logits
        addresses = self._where()
        if addresses != self._addresses:  # a graph reads the memory that it was recorded with
            self._passes.clear()
            self._addresses = addresses
        key = (x.shape, x.stride(), x.dtype, _autocast(x), self._modes())
        if key not in self._passes:
            self._passes[key] = self._recorded(x)
        self._turn += 1
        # A replay overwrites what the last one returned.
        return self._passes[key](_Own.apply(x, self)).clone()

    def _recorded(self, x: Tensor) -> Pass:
        try:
            with frozen(self.model):
                return self._record(lambda images: self.model(images), x)
        except RuntimeError as error:
            raise UserError(
                "train.cuda_graphs is true, but this model's pass cannot be recorded: "
                f"{reason(error)}. A pass must not wait for the GPU, as "
                ".item() does. Leave train.cuda_graphs out."
            ) from error

    def _where(self) -> list[int]:
        # Of every pass: Module.parameters() would take as long as the replay.
        return [
            tensor.data_ptr()
            for module in self._within
            for tensor in chain(module._parameters.values(), module._buffers.values())
            if tensor is not None
        ]

    def _modes(self) -> tuple[bool, ...]:
        # Of BatchNorm the attack switches both flags.
        return tuple(
            flag
            for module in self._within
            for flag in (module.training, getattr(module, "track_running_stats", True))
        )


class _Own(torch.autograd.Function):
    """Images as they are; their gradient as a copy, if it is that of the last pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, graphed: Graphed) -> Tensor:
        ctx.graphed, ctx.turn = graphed, graphed._turn
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if ctx.turn != ctx.graphed._turn:
            raise UserError(
                "train.cuda_graphs is true, but the attack begins a pass before it has taken the "
                "gradient of the last. Leave train.cuda_graphs out."
            )
        return gradients[0].clone(), None


def recorded(function: Pass, x: Tensor) -> Pass:
    """``function`` and its gradient by images like ``x``, as CUDA graphs.

    The random numbers of trial passes are given back. No copy of a weight in low precision is
    kept beyond a pass, so that every replay makes its own.
    """
    dtype = _autocast(x)
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng([x.device]),
        torch.autocast(
            x.device.type, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False
        ),
    ):
        # Its trial passes and its recording are on two streams, in an order that it sees to itself.
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
        sample = x.detach().clone().requires_grad_()
        return cast(Pass, torch.cuda.make_graphed_callables(function, (sample,)))


def _autocast(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
