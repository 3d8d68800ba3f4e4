"""Owns the promise that a measurement leaves no trace: modes, buffers and random states."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from robustflat.numerics import float32
from robustflat.perturb import buffers_kept, evaluating


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Hold ``model`` in eval mode, in full float32; what was before comes back on exit.

    Weights are kept by whoever moves them (``displaced``), so that only one copy is held. torch's
    (all devices'), numpy's and Python's global random states are restored: a data loader or a
    user's transformation may have drawn from them.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with (
            torch.random.fork_rng(devices=range(torch.cuda.device_count())),
            buffers_kept(model),
            evaluating(model),
            float32(),
        ):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
