"""The attacked model, compiled: parameters frozen, storage shared with the trained one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.perturb.modes import frozen


class Compiled(nn.Module):
    """A model whose passes are compiled for the gradient of the images alone.

    Its parameters are frozen while a pass is recorded, so that no gradient of weights is computed,
    not even by the compiled code, which decides before it knows what is asked for. They are the
    model's own: what changes them in place is seen, and nothing is compiled anew. Every shape of a
    batch is compiled by itself, so that what is computed does not hang on the batches before: a
    resumed run repeats it bit for bit.

    Args:
        model: the network; its modes are as the attack sets them.
        backend: of torch.compile.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        super().__init__()
        self.model = model
        # Of a function: what torch makes of a module is a module, and would be walked as a part.
        self._pass = torch.compile(
            lambda x: model(x), fullgraph=True, dynamic=False, backend=backend
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``x``."""
        with frozen(self.model):
            logits: Tensor = self._pass(x)
        return logits
