"""The attacked model, compiled: parameters frozen, storage shared with the trained one."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from robustflat.errors import UserError, reason
from robustflat.perturb.displace import buffers_kept
from robustflat.perturb.modes import Mode, attack_mode, frozen


class Compiled(nn.Module):
    """A model whose passes are compiled for the gradient of the images alone.

    Its parameters are frozen while a pass is recorded: compiled code decides what it computes
    before it is asked for, and else would compute the gradient of the weights too. They are the
    model's own, so what changes them in place is seen, and nothing is compiled anew.

    Args:
        model: the network; it stands in whatever mode the attack puts it.
        backend: of torch.compile.
        any_size: compile once for batches of any size, as where images that are broken are left
            out of the batch. Else every shape is compiled by itself: what is computed does not hang
            on the batches before, and a resumed run repeats it bit for bit.
    """

    def __init__(
        self, model: nn.Module, backend: str = "inductor", *, any_size: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.any_size = any_size

        # A function: a compiled module would be one more module to be walked and switched.
        def logits(x: Tensor) -> Tensor:
            found: Tensor = model(x)
            return found

        # With code of its own, of which torch compiles eight versions and no more.
        logits.__code__ = logits.__code__.replace()
        dynamic = None if any_size else False
        self._logits = torch.compile(logits, fullgraph=True, dynamic=dynamic, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``x``.

        Raises:
            UserError: if the model cannot be compiled.
        """
        count = len(x)
        if self.any_size:
            # One row would be compiled as a case of its own.
            x = x if count > 1 else torch.cat([x, x])
            torch._dynamo.mark_dynamic(x, 0)
        try:
            with frozen(self.model), warnings.catch_warnings():
                # Of train.precision: fp32, which is a choice.
                warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
                logits: Tensor = self._logits(x)
        except (
            torch._dynamo.exc.TorchDynamoException,
            torch._dynamo.exc.FailOnRecompileLimitHit,
        ) as error:
            raise UserError(
                f"torch.compile cannot compile this model as a whole: {reason(error)}. Leave "
                "train.compile or --compile out."
            ) from None
        return logits[:count]


def check_compiler(device: torch.device) -> None:
    """Compile next to nothing.

    Raises:
        UserError: if torch.compile, or the compiler that it needs, is missing or does not work.
    """
    try:
        torch.compile(lambda x: x + 1, fullgraph=True, dynamic=False)(torch.ones(2, device=device))
    except Exception as error:  # of as many types as there are causes
        raise UserError(
            f"torch.compile does not work on {device}: {reason(error)}. It needs a C++ compiler "
            "such as g++ and Python's headers, on a GPU Triton too. Install them, or leave "
            "train.compile or --compile out."
        ) from None


def check_compiled(
    model: nn.Module, shape: tuple[int, ...], device: torch.device, mode: Mode
) -> None:
    """Record one pass as the attack makes it, and compile nothing: seconds, not a minute.

    Raises:
        UserError: if the model cannot be recorded as a whole.
    """
    with attack_mode(model, mode), buffers_kept(model):
        Compiled(model, backend="eager")(torch.zeros(2, *shape, device=device))
