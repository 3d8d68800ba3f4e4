"""Owns the state in which a model is evaluated, and puts the model and all randomness back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.numerics import float32
from robustflat.perturb import buffers_kept, evaluating
from robustflat.perturb.modes import frozen


class Plain(nn.Module):
    """What attacks are given to attack: float32 logits, and no way to switch the model's mode.

    Args:
        net: The model.
        bf16: Whether it computes under autocast to bfloat16.
    """

    def __init__(self, net: nn.Module, bf16: bool = False) -> None:
        super().__init__()
        self.net = net
        self.bf16 = bf16
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, C], float32, in storage of their own (Square writes into them)."""
        if self.bf16:
            with torch.autocast(x.device.type, dtype=torch.bfloat16):
                logits: Tensor = self.net(x)
        else:
            logits = self.net(x)
        return logits.clone() if logits.dtype == torch.float32 else logits.float()

    def train(self, mode: bool = True) -> Plain:
        """Do nothing: the mode is not the attack's to choose."""
        del mode
        return self


def device_of(model: nn.Module, default: torch.device) -> torch.device:
    """Where the model's first parameter or buffer lies, or `default` if it has none."""
    for tensor in chain(model.parameters(), model.buffers()):
        return tensor.device
    return default


@contextmanager
def held(model: nn.Module) -> Iterator[torch.device]:
    """Hold `model` in eval mode, its parameters frozen, outside autocast and autograd.

    On exit, whatever happened: modes, buffers and requires_grad of the model are as before, no
    gradient has been left on it, and torch's generators stand where they stood.

    Args:
        model: The model.

    Yields:
        Where it computes.

    Raises:
        UserError: If its weights are not float32, or were made in inference mode.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise UserError(
                f"The parameter {name} was made inside torch.inference_mode(), so no gradient can "
                "pass it. Make or load the model outside."
            )
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise UserError(
                f"Models are evaluated in float32, but the parameter {name} is {parameter.dtype}. "
                "Convert the model with model.float(); precision='bf16' speeds the search up."
            )
    device = device_of(model, torch.device("cpu"))
    with ExitStack() as stack:
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        # A seed set by an attack reaches every CUDA device in use.
        stack.enter_context(
            torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else [])
        )
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(float32())
        stack.enter_context(evaluating(model))
        stack.enter_context(buffers_kept(model))
        stack.enter_context(frozen(model))  # FAB would leave a gradient on each
        yield device
